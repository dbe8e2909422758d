"""Learned tokens: before a tower's own, or in the place of a prompt's words."""

import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.block import Block
from vlm_jax.models.insertion import new_parameter
from vlm_jax.models.transformer import Encoder
from vlm_jax.params.table import named_leaves


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
