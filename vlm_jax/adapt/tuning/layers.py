"""Full tuning layer by layer: rates that fall with depth, top layers that begin anew."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended, Masked, Recipe
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.params import layers
from vlm_jax.params.regularizers import rng_of


@method(
    family="parameters",
    system="LLRD-BioNLP",
    paper="arXiv:2112.07869",
    differs="lower layers train with smaller rates, or not at all",
    identity=True,
)
def layer_decay(model: nn.Module, *, decay: float = 0.8, last: int | None = None) -> Extended:
    """Layer-wise learning rates (Tinn et al. 2021): lr * decay^(n + 1 - i) in block i of n, lr after the blocks.

    Args:
      model: of any towers with blocks.
      decay: 1.0 is full tuning.
      last: the last k blocks of each tower train, and what follows; None: all.
    """
    if not 0 < decay <= 1:
        raise UserError(f"decay of layer_decay is {decay}; expected above 0, to 1 (equal rates)")
    recipe = full(model) if last is None else Masked(f"last_{last}")
    return Extended(recipe, optimizer={} if decay == 1 else {"params": ((".*", {"layer_decay": decay, "wd": 1.0}),)})


@method(
    family="parameters",
    system="FewSample-BERT",
    paper="arXiv:2006.05987",
    differs="the top blocks begin anew; Adam's moments are corrected, unless told otherwise",
)
def new_top(
    model: nn.Module,
    *,
    blocks: int = 1,
    after: bool = False,
    tower: str = "image",
    std: float = 0.02,
    bias_correction: bool = True,
) -> Extended:
    """Full tuning with re-initialised top blocks (Zhang et al. 2021); `steps` is the paper's third remedy.

    Args:
      model: two towers.
      blocks: number of top blocks that begin anew; 0 is full tuning.
      after: whether what follows the blocks (norm, pool, head) begins anew, as the paper's pooler.
      tower: "image" or "text".
      std: of new kernels, that of BERT; biases begin at 0, scales at 1.
      bias_correction: False is the optimizer that the paper finds unstable, `transforms.bert_adam`.
    """
    if blocks < 0:
        raise UserError(f"blocks of new_top is {blocks}; expected 0 or more")
    optimizer = {} if bias_correction else {"name": "bert_adam"}
    return Extended(Renewed(full(model), blocks, after, f"{tower}/", std), optimizer=optimizer)


class Renewed(NamedTuple):
    """A recipe whose own parameters begin anew in the last blocks of a tower."""

    recipe: Recipe
    blocks: int
    after: bool
    tower: str
    std: float

    def insertions(self, model, at):
        return self.recipe.insertions(model, at)

    def combine(self, own, leaves):
        return self.recipe.combine(own, leaves)

    def begin(self, rng, model, leaves):
        own, places = self.recipe.begin(rng, model, leaves), layers.places(leaves)
        depth = {place.depth for place in places.values() if place.tower == self.tower}
        if depth and self.blocks > max(depth):
            raise UserError(f"blocks is {self.blocks}; `{self.tower}` has {max(depth)} blocks")
        if not depth:
            raise UserError(f"the model has no blocks in `{self.tower}`; expected a tower, image or text, of blocks")
        for name, leaf in own.items():
            tower, n, layer = places[name]
            renewed = (layer > n - self.blocks) & ((layer <= n) | self.after)
            if tower == self.tower and np.any(renewed):
                own[name] = jnp.where(renewed, self._new(rng_of(rng, name), name, leaf), leaf)
        return own

    def _new(self, rng, name, leaf):
        match name.split("/")[-1]:
            case "kernel":
                return self.std * jax.random.normal(rng, leaf.shape, leaf.dtype)
            case "bias":
                return jnp.zeros_like(leaf)
            case "scale":
                return jnp.ones_like(leaf)
        raise UserError(f"nobody says how `{name}` begins anew; expected a kernel, a bias or a scale")
