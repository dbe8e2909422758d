"""Modules put into a model that is there, without a change to it: adapters, low rank, prefixes, prompts, contexts.

    adapted = inserted(model, Adapter(where=r"image/.*/mlp", width=32), LowRank())
    params = begin(rng, adapted, params, images, token_ids)   # the model's own, and what is new

The result is a model of the same class. What is new stands in the parameter tree beside the module that it changes
(`image/blocks/mlp/inserted_down`; scanned blocks have it stacked), so that optimizer tables, partition rules and
checkpoints treat it like any parameter; `NEW` matches it. Adapters are the unified view of He et al. 2022
(arXiv:2110.04366): h <- h + s dh, where dh reads a module's output (serial) or its input (parallel).
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax.adapt.masks import check_alike
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.layers import ACTIVATIONS, Attention, KeyValues
from vlm_jax.models.transformer import Block, Encoder
from vlm_jax.parameter_table import named_leaves

NEW = r"(.*/)?inserted_.*"
TABLE = ((NEW, {}), (".*", dict(freeze=True)))
"""The optimizer's parameter table that trains what is new."""


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
        source = choose({"serial": h, "parallel": x}, self.form, "the form of an adapter")
        new = functools.partial(_new, module)
        down = new("down", nn.initializers.lecun_normal(), (source.shape[-1], self.width))
        up = new("up", nn.initializers.zeros, (self.width, h.shape[-1]))
        act = choose(ACTIVATIONS, self.activation, "the activation of an adapter")
        hidden = act(_dot(source, down) + new("down_bias", nn.initializers.zeros, down.shape[-1:]))
        h = h + (self.scale * (_dot(hidden, up) + new("up_bias", nn.initializers.zeros, up.shape[-1:]))).astype(h.dtype)
        return (h, *others) if others else h


class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3): h = x W + (alpha / r) x a b, with b 0 at init.

    r (in + out) parameters at each place; `merge` makes plain kernels of them.

    Attributes:
      where: regex of the dense layers, by their whole path.
      rank: r.
      alpha: None is r.
    """

    where: str = r".*/attn/(query|value)"
    rank: int = 4
    alpha: float | None = None

    @property
    def factor(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x):
        h = call(x)
        # U(-1 / sqrt(in), 1 / sqrt(in)), as in the authors' code
        a = _new(module, "a", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (x.shape[-1], self.rank))
        b = _new(module, "b", nn.initializers.zeros, (self.rank, h.shape[-1]))
        return h + (self.factor * _dot(_dot(x, a), b)).astype(h.dtype)


class Prefix(NamedTuple):
    """Keys and values that every token sees before the others (Li and Liang 2021, arXiv:2101.00190, section 4.2).

    2 P D parameters at each place.

    Attributes:
      where: regex of the attention modules, by their whole path.
      length: P.
      std: of the values at init.
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
            x, *args, **kwargs, prefix=KeyValues(*(_new(module, name, init, shape) for name in ("key", "value")))
        )


class Prompt(NamedTuple):
    """Learned tokens before a tower's own (visual prompt tuning, Jia et al. 2022, arXiv:2203.12119, section 3.2).

    n D parameters, or n D in each block with `deep`; the tower's tokens come back without them.

    Attributes:
      where: regex of the tower's path: "image" or "text".
      length: n.
      deep: whether every block begins with prompts of its own.
    """

    where: str = "image"
    length: int = 8
    deep: bool = False

    def takes(self, module, method):
        if isinstance(module, Block):
            return self.deep and method == "__call__"
        return isinstance(module, Encoder) and method == "encode"

    def path(self, module):
        return module.path[:-1] if isinstance(module, Block) else module.path

    def __call__(self, call, module, x, *args, **kwargs):
        tokens = lambda: jnp.broadcast_to(self._tokens(module, x.shape[-1]).astype(x.dtype), (len(x), *shape))
        shape = (self.length, x.shape[-1])
        if isinstance(module, Block):
            return call(jnp.concatenate([tokens(), x[:, self.length :]], axis=1), *args, **kwargs)
        first = jnp.zeros((len(x), *shape), x.dtype) if self.deep else tokens()
        if (mask := kwargs.get("mask")) is not None:
            if mask.ndim == 3:
                raise UserError("prompts before packed texts are of no text; take the texts apart")
            kwargs["mask"] = jnp.pad(mask, ((0, 0), (self.length, 0)), constant_values=True)
        return call(jnp.concatenate([first, x], axis=1), *args, **kwargs)[:, self.length :]

    def _tokens(self, module, width):
        bound = (6 / (3 * getattr(module, "patch", 16) ** 2 + width)) ** 0.5  # the authors'
        init = lambda rng, shape: jax.random.uniform(rng, shape, minval=-bound, maxval=bound)
        return _new(module, "prompt", init, (self.length, width))


class Context(NamedTuple):
    """Learned vectors in the place of a prompt's words (CoOp, Zhou et al. 2022, arXiv:2109.01134, section 3.2).

    n D parameters. Texts are to have n tokens there, which ones is of no account: "X X X X {}." for 4.

    Attributes:
      where: regex of the token table's path.
      length: n.
      at: which token is the first of them: 1 after a start token.
      std: of the vectors at init.
    """

    where: str = r"text/token_embed"
    length: int = 4
    at: int = 1
    std: float = 0.02

    def takes(self, module, method):
        return isinstance(module, nn.Embed) and method == "__call__"

    def __call__(self, call, module, token_ids):
        x = call(token_ids)
        if token_ids.shape[-1] < self.at + self.length:
            seen = f"texts have {x.shape[1]} tokens"
            raise UserError(f"a context of {self.length} from token {self.at} on does not fit: {seen}")
        context = _new(module, "context", nn.initializers.normal(self.std), (self.length, x.shape[-1]))
        return x.at[:, self.at : self.at + self.length].set(context.astype(x.dtype))


def inserted(model: nn.Module, *insertions: Any) -> nn.Module:
    """The model with insertions, a model of a subclass of its class; those it has already stay."""
    return _with(model, (*getattr(model, "insertions", ()), *insertions))


def _with(model, insertions):
    base = type(model).__bases__[0] if hasattr(model, "insertions") else type(model)
    skipped = ("parent", "name", "insertions")
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init and f.name not in skipped}
    return _class(base)(**fields, insertions=insertions)


def begin(rng: jax.Array, model: nn.Module, params: Any, *inputs: Any) -> Any:
    """Parameters of a model with insertions: `params`, and what is new drawn with rng.

    Args:
      rng: a `jax.random.key`.
      model: what `inserted` returned.
      params: of the model without insertions.
      inputs: what the model is called with; only their shapes count.

    Raises:
      UserError: an insertion matches no module; the parameters are another model's.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    shapes_of = lambda *insertions: jax.eval_shape(_with(model, insertions).init, rng, *shapes)["params"]
    check_alike(shapes_of(), params)
    for insertion in model.insertions:
        if not _new_leaves(shapes_of(insertion)):
            raise UserError(f"{insertion} is put nowhere: its `where` matches no module of the model")

    @jax.jit
    def draw(rng):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return _new_leaves(model.init(rng, *zeros)["params"])  # of the model's own nothing is computed

    return unflatten_dict(named_leaves(params) | draw(rng), sep="/")


def merge(params: Any, insertions: tuple) -> Any:
    """Plain parameters of a model whose only insertions are `LowRank`: each kernel W + (alpha / r) a b."""
    if len(insertions) != 1 or not isinstance(insertions[0], LowRank):
        raise UserError(f"one LowRank can be merged; there are {insertions}")
    leaves, new = named_leaves(params), _new_leaves(params)

    def plain(name):
        module, _, last = name.rpartition("/")
        if last != "kernel" or f"{module}/inserted_a" not in new:
            return leaves[name]
        return leaves[name] + insertions[0].factor * (new[f"{module}/inserted_a"] @ new[f"{module}/inserted_b"])

    return unflatten_dict({name: plain(name) for name in leaves if name not in new}, sep="/")


def _new_leaves(params):
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


def _new(module, name, init, shape):
    """A parameter beside those of a module: of its scope, which scans slice and initialise like the module's own."""
    return module.scope.param(f"inserted_{name}", init, shape)


def _dot(x, matrix):
    return jnp.matmul(x, matrix.astype(x.dtype))
