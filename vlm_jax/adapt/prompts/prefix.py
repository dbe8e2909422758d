"""Prefix tuning: learned keys and values in every block, as they are or from a small network."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import new_leaves
from vlm_jax.models.insertions.prefix import Prefix


@method(
    family="prompts",
    system="P-Tuning-v2",
    paper="arXiv:2110.07602",
    where="section 3.2",
    differs="keys and values before those of every block, as in prefix tuning (arXiv:2101.00190)",
    claim="few_shot: prefixes above zero-shot",
    count="2 * length * (L_t * D_t + L_v * D_v)",
)
def prefix(model: nn.Module, *, where: str = r".*/attn", length: int = 4, std: float = 0.02) -> Inserted:
    """Prefix tuning; P-Tuning v2 applies it to all model sizes and tasks."""
    return Inserted((Prefix(where, length, std),))


@method(
    family="prompts",
    system="OFA-prompt",
    paper="arXiv:2208.02532",
    where="authors' code",
    differs="a network makes each stack's keys and values from learned embeddings; writers' encoder and decoder too",
    count="length * (D_t + D_v) + hidden * (D_t + D_v + 2) + 2 * (hidden + 1) * (L_t * D_t + L_v * D_v)",
)
def prefix_network(
    model: nn.Module, *, where: str = r".*/attn", length: int = 4, hidden: int = 64, std: float = 0.02
) -> "Reparametrised":
    """Prefixes of generative models (Yang et al. 2022), reparametrised; `prefix` is the same without the network.

    Args:
      model: any with attention: two towers, a captioner, an encoder with a decoder.
      where: regex of the attention modules: of one stack, for instance r"decoder/.*/attn".
      length: of the prefixes.
      hidden: width of the network.
      std: of the embeddings at init.
    """
    return Reparametrised(Prefix(where, length), hidden, std)


class Reparametrised(NamedTuple):
    """Keys and values of all blocks of a stack: relu(E K + a) V + b, with E [P, D] of the stack's width.

    P D + D h + h + (h + 1) 2 N D parameters for N attention modules of width D. The network is not needed later.

    Attributes:
      prefix: the insertion.
      hidden: h.
      std: of E at init.
    """

    prefix: Prefix
    hidden: int
    std: float

    def insertions(self, model: nn.Module, at: int) -> tuple:
        return (self.prefix,)

    def begin(self, rng: jax.Array, model: nn.Module, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        own = {}
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        for i, (stack, names) in enumerate(_stacks(leaves).items()):
            keys = jax.random.split(jax.random.fold_in(rng, i), 3)
            width = leaves[names[0]].shape[-2] * leaves[names[0]].shape[-1]
            total = sum(leaves[name].size for name in names) // self.prefix.length
            own[f"{stack}/embedding"] = self.std * jax.random.normal(keys[0], (self.prefix.length, width))
            own[f"{stack}/fc1/kernel"] = uniform(keys[1], (width, self.hidden))
            own[f"{stack}/fc2/kernel"] = uniform(keys[2], (self.hidden, total))
            own |= {f"{stack}/fc1/bias": jnp.zeros(self.hidden), f"{stack}/fc2/bias": jnp.zeros(total)}
        return own

    def combine(self, own: Mapping[str, jax.Array], leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        placed = {}
        for stack, names in _stacks(leaves).items():
            dense = lambda name, x, stack=stack: (
                jnp.matmul(x, own[f"{stack}/{name}/kernel"], precision="highest") + own[f"{stack}/{name}/bias"]
            )
            rows = dense("fc2", jax.nn.relu(dense("fc1", own[f"{stack}/embedding"])))
            for name in names:
                *layers, length, heads, head_dim = leaves[name].shape
                part, rows = jnp.split(rows, [leaves[name].size // length], axis=1)
                part = part.reshape(length, *layers, heads, head_dim)
                placed[name] = jnp.moveaxis(part, 0, len(layers))
        return placed


def _stacks(leaves: Mapping[str, jax.Array]) -> dict[str, list[str]]:
    """{"image": names of the prefixes of its blocks}, in the order of the names."""
    stacks: dict[str, list[str]] = {}
    for name in sorted(new_leaves(leaves)):
        stacks.setdefault(re.split(r"/blocks(?:_\d+)?/", name)[0], []).append(name)
    return stacks
