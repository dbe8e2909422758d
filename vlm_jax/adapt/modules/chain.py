"""Low-rank updates one after the other (Chain of LoRA)."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.adapt.methods import search_rate
from vlm_jax.adapt.recipe import Inserted, tree
from vlm_jax.adapt.task import Shots, Task
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.adapters import merged


@method(
    family="modules",
    system="Chain-of-LoRA",
    paper="arXiv:2401.04151",
    differs="low-rank updates one after the other, each folded into the kernels before the next begins anew",
)
def chain_of_lora(
    model: nn.Module,
    *,
    where: str = r".*/attn/(query|value)",
    rank: int = 4,
    alpha: float | None = None,
    links: int = 3,
) -> "Chain":
    """Chain of LoRA (COLA, Xia et al. 2024): W <- W + a b, then new a and b, moments and learning rates.

    Args:
      model: of any dense layers.
      where, rank, alpha: of each link, as for `lora`.
      links: number of updates, which share the steps, one each at least; 1 is LoRA.
    """
    if links < 1:
        raise UserError(f"links of chain_of_lora is {links}; expected 1 (LoRA) or more")
    return Chain(LowRank(where, rank, alpha), links)


class Chain(NamedTuple):
    """Trains one `LowRank` after the other; the result has their sum, one `LowRank` of all their ranks."""

    link: LowRank
    links: int

    def fit(
        self,
        base: Pretrained,
        shots: Shots,
        validation: Shots,
        task: Task,
        *,
        steps: int = 200,
        batch_size: int = 32,
        learning_rate: float | None = None,
        weight_decay: float = 0.0,
    ) -> Pretrained:
        """Returns the adapted model; `learning_rate` defaults to the best for each link, see `search_rate`."""
        model, own, links = base, [], max(1, min(self.links, steps))
        for number in range(links):
            adapted = search_rate(
                Inserted((self.link,)), model, shots, validation, task._replace(seed=task.seed + number),
                steps=steps // links + (number < steps % links), batch_size=batch_size,
                learning_rate=learning_rate, weight_decay=weight_decay,
            )  # fmt: skip
            model = merged(adapted)
            own.append(insertion.new_leaves(adapted.params))
        joined = lambda name: jnp.concatenate([link[name] for link in own], axis=-1 if name.endswith("_a") else -2)
        alpha = None if self.link.alpha is None else links * self.link.alpha
        whole = self.link._replace(rank=links * self.link.rank, alpha=alpha)
        params = tree({**named_leaves(base.params), **{name: joined(name) for name in own[0]}})
        return dataclasses.replace(adapted, model=insertion.inserted(base.model, whole), params=params)
