"""Insertions after the towers, which change embeddings, and logits that depend on a whole pair.

Their parameters stand at the root of the model's (`inserted_image_down`): the towers are as they were, and embeddings
that were computed once are inputs.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.kernels import attention
from vlm_jax.models.insertion import new_parameter
from vlm_jax.models.two_tower import Embeddings, unit
from vlm_jax.params.table import named_leaves

UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1 / sqrt(in), 1 / sqrt(in)), as in torch
ZEROS = nn.initializers.zeros


def by_pairs(model: nn.Module) -> Any:
    """Returns the insertion that makes the logits of pairs (`by_pairs`, `pair_logits`), or None."""
    found = [i for i in getattr(model, "insertions", ()) if getattr(i, "by_pairs", False)]
    if len(found) > 1:
        raise UserError(f"two insertions make the logits of pairs: {found[0]} and {found[1]}; keep one")
    return found[0] if found else None


def class_logits(model: nn.Module, params: Any, images: Any, token_ids: jax.Array) -> jax.Array:
    """Returns scale * cosine of every picture with every class's text, fp32 [B, C].

    Where embeddings depend on the whole pair, an insertion makes the logits.

    Args:
      model: a `TwoTower`, with or without insertions.
      params: the model's parameters.
      images: inputs of the image tower, or embeddings [B, D].
      token_ids: int [C, L], or the texts' embeddings [C, D].
    """
    if insertion := by_pairs(model):
        return insertion.pair_logits(model, params, images, token_ids)
    found = model.apply({"params": params}, images, None)
    text = model.apply({"params": params}, None, token_ids).text
    return found.scale * jnp.matmul(found.image, text.T, precision="highest")


def blend(x: jax.Array, new: jax.Array, share: float) -> jax.Array:
    """Returns (1 - share) x + share new, unit norm; x itself for a share of 0."""
    return unit((1 - share) * x + share * new) if share else x


@method(family="insertions", differs="a bottleneck after a tower, mixed with the tower's embedding")
class OutputAdapter(NamedTuple):
    """x <- unit((1 - a) x + a act(act(x down) up)) (CLIP-Adapter, Gao et al. 2021, arXiv:2110.04544, authors' code).

    2 E (E // reduction) parameters, without biases: act is relu, so that the norm of x does not matter.

    Attributes:
      where: "image" or "text", the embedding that changes.
      reduction: E over the width of the bottleneck.
      share: a; 0 changes nothing.
    """

    where: str = "image"
    reduction: int = 4
    share: float = 0.2

    def takes(self, module, method):
        return not module.path and method == "__call__"

    def path(self, module):
        return (self.where,)

    def __call__(self, call, module, *args, **kwargs):
        found = call(*args, **kwargs)
        if self.where not in ("image", "text") or not isinstance(found, Embeddings):
            raise UserError(f"{self}: `where` is image or text, of a model with an embedding of both")
        if (x := getattr(found, self.where)) is None:
            return found
        width, hidden = x.shape[-1], max(x.shape[-1] // self.reduction, 1)
        down = new_parameter(module, f"{self.where}_down", UNIFORM, (width, hidden))
        up = new_parameter(module, f"{self.where}_up", UNIFORM, (hidden, width))
        return found.replace(**{self.where: blend(x, jax.nn.relu(jax.nn.relu(x @ down) @ up), self.share)})


@method(family="insertions", differs="attention over a picture's embedding and those of all classes changes both")
class JointAttention(NamedTuple):
    """e <- unit((1 - a) e + a up(attention(down(e)))) for e of a picture and all C classes (arXiv:2409.02958).

    Each picture has its own classes: 1 + C tokens that see each other. With r = E // reduction,
    2 E r + r + E + 4 (r^2 + r) parameters.

    Attributes:
      reduction: E over the width of the attention.
      heads: of the attention; they divide r.
      share: a; 0 changes nothing.
    """

    reduction: int = 4
    heads: int = 4
    share: float = 0.2
    where, by_pairs = "", True

    def takes(self, module, method):
        return not module.path and method == "__call__"

    def __call__(self, call, module, *args, **kwargs):
        """Creates the parameters, for `pair_logits`."""
        found = call(*args, **kwargs)
        x = found.image if found.image is not None else found.text
        width, hidden = x.shape[-1], x.shape[-1] // self.reduction
        if not hidden or hidden % self.heads:
            raise UserError(f"{self}: embeddings of {width} give {hidden} features; `heads` must divide them")
        shapes = {"down": (width, hidden), "up": (hidden, width)}
        shapes |= dict.fromkeys(("query", "key", "value", "out"), (hidden, hidden))
        for name, shape in shapes.items():
            new_parameter(module, f"joint_{name}", UNIFORM, shape)
            new_parameter(module, f"joint_{name}_bias", ZEROS, shape[1:])
        return found

    def pair_logits(self, model, params, images, token_ids):
        found = model.apply({"params": params}, images, None)
        text, leaves = model.apply({"params": params}, None, token_ids).text, named_leaves(params)
        dense = lambda name, x: x @ leaves[f"inserted_joint_{name}"] + leaves[f"inserted_joint_{name}_bias"]

        def one(x):
            tokens = jnp.concatenate([x[None], text])
            low = dense("down", tokens)
            q, k, v = (dense(name, low).reshape(len(low), self.heads, -1) for name in ("query", "key", "value"))
            seen = attention(q[None], k[None], v[None])[0].reshape(low.shape)
            both = blend(tokens, dense("up", dense("out", seen)), self.share)
            return found.scale * both[1:] @ both[0]

        return jax.lax.map(one, found.image, batch_size=8)
