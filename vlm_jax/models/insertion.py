"""Inserts modules into an existing, unchanged model: adapters, low rank, prefixes, prompts, contexts.

    adapted = inserted(model, Adapter(where=r"image/.*/mlp", width=32), LowRank())
    params = begin(rng, adapted, params, images, token_ids)   # the model's parameters and the new ones

In a config: `model.insertions=[dict(type="LowRank", rank=4)]` with `optimizer.params=insertion.TABLE`; `model_init`
names the initial model. The result is a model of a subclass of the same class. The parameter tree holds a new parameter
beside the module that the insertion changes (`image/blocks/mlp/inserted_down`; stacked for scanned blocks). Optimizer
tables, partition rules and checkpoints treat new parameters like all others; `NEW` matches the names. Adapters follow
the unified view of He et al. 2022 (arXiv:2110.04366): h <- h + s dh, where dh reads a module's output (serial) or its
input (parallel).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax import catalogue, config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.block import Block
from vlm_jax.models.layers import ACTIVATIONS, Attention, KeyValues
from vlm_jax.models.transformer import Encoder
from vlm_jax.params.table import check_alike, named_leaves

NEW = r"(.*/)?inserted_.*"
TABLE = ((NEW, {}), (".*", dict(freeze=True)))
"""The optimizer's parameter table that trains only the new parameters."""


@method(family="insertions", differs="a bottleneck beside or after a module")
class Adapter(NamedTuple):
    """dh = act(x down + b) up + c, with up and c 0 at init (Houlsby et al. 2019, arXiv:1902.00751, section 2.1).

    2 D r + r + D parameters at each place.

    Attributes:
      where: regex of the modules, by their whole path: attention ("attn", "cross_attn") or "mlp" of blocks.
      width: r.
      form: "serial": x is the module's output (Houlsby); "parallel": its input (AdaptFormer, arXiv:2205.13535).
      scale: s.
      activation: a key of `ACTIVATIONS`.
    """

    where: str = r".*/mlp"
    width: int = 64
    form: str = "serial"
    scale: float = 1.0
    activation: str = "relu"

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        result = call(x, *args, **kwargs)
        h, *others = result if isinstance(result, tuple) else (result,)
        source = config.choose({"serial": h, "parallel": x}, self.form, "the form of an adapter")
        new = functools.partial(new_parameter, module)
        down = new("down", nn.initializers.lecun_normal(), (source.shape[-1], self.width))
        up = new("up", nn.initializers.zeros, (self.width, h.shape[-1]))
        act = config.choose(ACTIVATIONS, self.activation, "the activation of an adapter")
        hidden = act(_dot(source, down) + new("down_bias", nn.initializers.zeros, down.shape[-1:]))
        h = h + (self.scale * (_dot(hidden, up) + new("up_bias", nn.initializers.zeros, up.shape[-1:]))).astype(h.dtype)
        return (h, *others) if others else h


@method(family="insertions", differs="a low-rank update of a dense layer")
class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3): h = x W + (alpha / r) x a b, with b 0 at init.

    r (in + out) parameters at each place; `merge` adds them to plain kernels.

    Attributes:
      where: regex of the dense layers, by their whole path.
      rank: r.
      alpha: None means r.
      importance: whether (x a)_i is weighted by a parameter w_i, N(0, 1) at init (CoDyRA, arXiv:2412.01004).
    """

    where: str = r".*/attn/(query|value)"
    rank: int = 4
    alpha: float | None = None
    importance: bool = False

    @property
    def factor(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x):
        h = call(x)
        # U(-1 / sqrt(in), 1 / sqrt(in)), as in the authors' code
        a = new_parameter(
            module, "a", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], self.rank)
        )
        b = new_parameter(module, "b", nn.initializers.zeros, (self.rank, h.shape[-1]))
        if self.importance:
            a = a * new_parameter(module, "importance", nn.initializers.normal(1.0), (self.rank,))
        return h + (self.factor * _dot(_dot(x, a), b)).astype(h.dtype)


@method(family="insertions", differs="keys and values that every token sees")
class Prefix(NamedTuple):
    """Keys and values that every token sees before the others (Li and Liang 2021, arXiv:2101.00190, section 4.2).

    2 P D parameters at each place.

    Attributes:
      where: regex of the attention modules, by their whole path.
      length: P.
      std: standard deviation at init.
    """

    where: str = r".*/attn"
    length: int = 10
    std: float = 0.02

    def takes(self, module, method):
        return isinstance(module, Attention) and method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        shape = (self.length, module.heads, module.head_dim or x.shape[-1] // module.heads)
        init = nn.initializers.normal(self.std)
        return call(
            x,
            *args,
            **kwargs,
            prefix=KeyValues(*(new_parameter(module, name, init, shape) for name in ("key", "value"))),
        )


@method(family="insertions", differs="learned tokens before a tower's own")
class Prompt(NamedTuple):
    """Learned tokens before a tower's own (visual prompt tuning, Jia et al. 2022, arXiv:2203.12119, section 3.2).

    n D parameters, or n D in each block. The tower returns its tokens without the prompts. Prompts join after the norm
    that follows the positions (in CLIP). Their initial values are the authors' for patches of 16.

    Attributes:
      where: regex of the tower's path: "image" or "text".
      length: n.
      depth: number of first blocks that begin with their own prompts; None: all blocks ("deep").
    """

    where: str = "image"
    length: int = 8
    depth: int | None = 1

    def takes(self, module, method):
        if self.depth is not None and self.depth < 1:
            raise UserError(f"the depth of prompts is {self.depth}; expected 1 or more, or None for all blocks")
        if isinstance(module, Block):
            return self.depth != 1 and method == "__call__"
        if method == "run" and re.fullmatch(self.where, "/".join(module.path)):
            raise UserError(f"prompts stand before the tokens of a tower; `{'/'.join(module.path)}` reads a text")
        return isinstance(module, Encoder) and method == "encode"

    def path(self, module):
        return module.path[:-1] if isinstance(module, Block) else module.path

    def __call__(self, call, module, x, *args, **kwargs):
        tokens = lambda: jnp.broadcast_to(self._tokens(module, x.shape[-1]).astype(x.dtype), (len(x), *shape))
        shape = (self.length, x.shape[-1])
        if isinstance(module, Block):
            _, layer, _ = args
            before, own = x[:, : self.length], x[:, self.length :]
            return call(jnp.concatenate([_of_first(self.depth, layer, tokens(), before), own], axis=1), *args, **kwargs)
        first = tokens() if self.depth == 1 else jnp.zeros((len(x), *shape), x.dtype)
        if (mask := kwargs.get("mask")) is not None:
            if mask.ndim == 3:
                raise UserError("prompts before packed texts belong to no text; unpack the texts")
            kwargs["mask"] = jnp.pad(mask, ((0, 0), (self.length, 0)), constant_values=True)
        stacked = call(jnp.concatenate([first, x], axis=1), *args, **kwargs)
        own = lambda tokens: tokens[:, self.length :]
        kept = {name: jax.tree.map(own, value) for name, value in stacked.aux.items() if name == "layers"}
        return stacked._replace(tokens=own(stacked.tokens), aux=stacked.aux | kept)

    def _tokens(self, module, width):
        bound = (6 / (3 * 16**2 + width)) ** 0.5
        init = lambda rng, shape: jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
        return new_parameter(module, "prompt", init, (self.length, width))


@method(family="insertions", differs="learned vectors in the place of a prompt's words")
class Context(NamedTuple):
    """Learned vectors in the place of a prompt's words (CoOp, Zhou et al. 2022, arXiv:2109.01134, section 3.2).

    n D parameters, or n D for the tokens and n D in each block. Texts must have n tokens there. Any ids will do; they
    are overwritten. The data op `room(n, at)` inserts such tokens.

    Attributes:
      where: regex of the tower's path.
      length: n.
      at: index of the first learned vector: 1 after a start token.
      depth: number of first blocks with their own vectors (MaPLe, arXiv:2210.03117, section 3.2.1); None: all blocks.
      image_width: E, width of the image embeddings, for a Meta-Net that moves the vectors by the picture's embedding
        (CoCoOp, Zhou et al. 2022, arXiv:2203.05557, section 3.2: E (E / 16) + E / 16 + (E / 16) D + D more parameters);
        None: no Meta-Net.
      std: standard deviation of the vectors at init.
    """

    where: str = "text"
    length: int = 4
    at: int = 1
    depth: int | None = 1
    image_width: int | None = None
    std: float = 0.02

    def takes(self, module, method):
        return isinstance(module, nn.Embed if self.depth == 1 else nn.Embed | Block) and method == "__call__"

    def path(self, module):
        return module.path[:-1]

    def __call__(self, call, module, x, *args, **kwargs):
        if isinstance(module, nn.Embed):
            x = call(x)
        place = slice(self.at, self.at + self.length)
        if x.shape[1] <= place.stop:
            seen = f"texts have {x.shape[1]} tokens"
            raise UserError(f"a context of {self.length} from token {self.at} on does not fit: {seen}")
        context = new_parameter(module, "context", nn.initializers.normal(self.std), (self.length, x.shape[-1])).astype(
            x.dtype
        )
        if not isinstance(module, nn.Embed):
            _, layer, _ = args
            context = _of_first(self.depth, layer, jnp.where(layer > 0, context, x[:, place]), x[:, place])
            return call(x.at[:, place].set(context), *args, **kwargs)
        if self.image_width is not None:
            self._meta_net(module, x.shape[-1])
        return x.at[:, place].set(context)

    def _meta_net(self, module, width):
        """Creates the Meta-Net's parameters; `pair_logits` applies the Meta-Net."""
        hidden = max(self.image_width // 16, 1)
        for name, (inputs, outputs) in (("down", (self.image_width, hidden)), ("up", (hidden, width))):
            uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            new_parameter(module, f"meta_{name}", uniform, (inputs, outputs))
            new_parameter(module, f"meta_{name}_bias", nn.initializers.zeros, (outputs,))

    @property
    def by_pairs(self) -> bool:
        return self.image_width is not None

    def pair_logits(self, model, params, images, token_ids):
        """Each picture has texts of its own, with contexts v_m + net(x), x its embedding (CoCoOp, equation 3)."""
        found = model.apply({"params": params}, images, None)
        leaves = named_leaves(params)
        (place,) = [name.removesuffix("context") for name in leaves if name.endswith("token_embed/inserted_context")]
        down, down_bias, up, up_bias = (
            leaves[f"{place}meta_{name}"] for name in ("down", "down_bias", "up", "up_bias")
        )
        moves = jax.nn.relu(found.image @ down + down_bias) @ up + up_bias

        def one(picture):
            x, move = picture
            own = unflatten_dict(leaves | {f"{place}context": leaves[f"{place}context"] + move}, sep="/")
            return found.scale * model.apply({"params": own}, None, token_ids).text @ x

        return jax.lax.map(one, (found.image, moves), batch_size=8)


def _of_first(depth, layer, new, old):
    return new if depth is None else jnp.where(layer < depth, new, old)


def of_sections(sections: Sequence[Mapping[str, Any]], where: str) -> tuple:
    """Builds insertions from a config: [dict(type="LowRank", rank=4), ...]; `type` is the name of an insertion."""
    insertions = []
    for section in sections:
        fields = dict(section)
        kind = catalogue.get("insertions", fields.pop("type", None), f"the type of {where}")
        insertions.append(config.call(kind, fields, where))
    return tuple(insertions)


def inserted(model: nn.Module, *insertions: Any) -> nn.Module:
    """Returns the model with more insertions, as a subclass of the model's class; earlier insertions stay."""
    return _with(model, (*getattr(model, "insertions", ()), *insertions))


def removed(model: nn.Module) -> nn.Module:
    """Returns the model without insertions."""
    return type(model).__bases__[0](**_fields(model)) if hasattr(model, "insertions") else model


def _with(model, insertions):
    return _class(type(removed(model)))(**_fields(model), insertions=insertions)


def _fields(model):
    skipped = ("parent", "name", "insertions")
    return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init and f.name not in skipped}


def begin(rng: jax.Array, model: nn.Module, params: Any, *inputs: Any) -> Any:
    """Returns the parameters of a model with insertions: `params`, and new parameters drawn with rng.

    Args:
      rng: a `jax.random.key`.
      model: the result of `inserted`.
      params: parameters of the model without insertions.
      inputs: inputs of the model; only their shapes and dtypes matter.

    Raises:
      UserError: an insertion matches no module, or the parameters belong to another model.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)

    @jax.jit  # traced once, for the shapes and for the new parameters
    def init(rng):
        return model.init(rng, *jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))["params"]

    begun = jax.eval_shape(init, rng)
    new = new_leaves(begun)
    check_alike({name: leaf for name, leaf in named_leaves(begun).items() if name not in new}, named_leaves(params))
    for insertion in model.insertions:
        if len(model.insertions) > 1:
            new = new_leaves(jax.eval_shape(_with(model, (insertion,)).init, rng, *shapes)["params"])
        if not new:
            raise UserError(f"{insertion} changes nothing: its `where` matches no module of the model")
    draw = jax.jit(lambda rng: new_leaves(init(rng)))  # jit drops the model's own parameters
    return unflatten_dict(named_leaves(params) | draw(rng), sep="/")


def merge(params: Any, insertions: tuple) -> Any:
    """Returns plain parameters of a model with one `LowRank` insertion: each kernel is W + (alpha / r) a diag(w) b."""
    if len(insertions) != 1 or not isinstance(insertions[0], LowRank):
        raise UserError(f"merge needs exactly one insertion, a LowRank; got {insertions}")
    leaves, new = named_leaves(params), new_leaves(params)

    def plain(name):
        module, _, last = name.rpartition("/")
        if last != "kernel" or f"{module}/inserted_a" not in new:
            return leaves[name]
        a = new[f"{module}/inserted_a"] * new.get(f"{module}/inserted_importance", jnp.ones(1))[..., None, :]
        return leaves[name] + insertions[0].factor * (a @ new[f"{module}/inserted_b"])

    return unflatten_dict({name: plain(name) for name in leaves if name not in new}, sep="/")


def new_leaves(params: Any) -> dict[str, jax.Array]:
    """Returns the parameters of insertions, by name."""
    return {name: leaf for name, leaf in named_leaves(params).items() if re.fullmatch(NEW, name)}


@functools.cache
def _class(base: type) -> type:
    class Inserted(base):
        insertions: tuple = ()

        @nn.nowrap
        def init(self, *args, **kwargs):
            with nn.intercept_methods(functools.partial(_intercept, self.insertions)):
                return super().init(*args, **kwargs)

        @nn.nowrap
        def apply(self, *args, **kwargs):
            with nn.intercept_methods(functools.partial(_intercept, self.insertions)):
                return super().apply(*args, **kwargs)

    Inserted.__name__ = Inserted.__qualname__ = f"Inserted{base.__name__}"
    return Inserted


def _intercept(insertions, call, args, kwargs, context):
    module, method = context.module, context.method_name
    for insertion in insertions:
        if insertion.takes(module, method):
            path = insertion.path(module) if hasattr(insertion, "path") else module.path
            if re.fullmatch(insertion.where, "/".join(path)):
                call = functools.partial(insertion, call, module)
    return call(*args, **kwargs)


def new_parameter(module, name, init, shape):
    """Returns a new parameter in a module's scope; scans slice and initialise it like the module's own parameters."""
    return module.scope.param(f"inserted_{name}", init, shape)


def _dot(x, matrix):
    return jnp.matmul(x, matrix.astype(x.dtype))
