"""Adaptation to tasks that come one after the other.

tasks = [(images, labels, names), (more, their_labels, other_names)]
experts = lae(clip, lora(clip.model), tasks, learning_rate=1e-3)
experts.probabilities(pictures, [*names, *other_names])
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import softmax

from vlm_jax.adapt.recipe import Recipe, tree
from vlm_jax.adapt.tune import tune
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained


class Experts(NamedTuple):
    """A model that has just learned a task, and one that follows it slowly."""

    online: Pretrained
    offline: Pretrained

    def probabilities(self, images: Any, names: Sequence[str] | None = None) -> np.ndarray:
        """Returns of each name the larger of both experts' probabilities, float [B, names]; rows do not sum to 1.

        Args:
          images: preprocessed, [B, H, W, 3].
          names: of the classes; defaults to those of all tasks.
        """
        return np.maximum(*(softmax(model.class_logits(images, names), axis=-1) for model in self))


@method(
    family="continual",
    system="LAE",
    paper="arXiv:2303.10070",
    differs="inserted modules learn each task, a slow average of them accumulates tasks, and both vote",
)
def lae(
    base: Pretrained,
    recipe: Recipe,
    tasks: Iterable[tuple[Any, np.ndarray, Sequence[str]]],
    *,
    decay: float = 0.9999,
    **training: Any,
) -> Experts:
    """Learning, accumulation, ensemble (LAE, Gao et al. 2023), with any recipe: lora, adapter, prefix.

    The recipe's parameters, the online module, go on from task to task, each on the names of its task alone. After the
    first task the offline module is a copy of the online one; from then on, offline <- decay offline + (1 - decay)
    online after each step. `Experts.probabilities` is the ensemble. Without a classifier of new classes, the phases in
    which the authors train that alone fall away.

    Args:
      base: a two-tower model.
      recipe: what trains, the same for all tasks.
      tasks: (images, labels, names) of each, see `tune`.
      decay: of the offline module.
      training: of `tune`: steps, batch_size, learning_rate, ...

    Raises:
      UserError: there is no task, or a decay that is no share.
    """
    if not 0 <= decay <= 1:
        raise UserError(f"lae: decay is {decay}; expected 0 to 1")
    follow = jax.jit(lambda slow, own: jax.tree.map(lambda s, o: s + (1 - decay) * (o - s), slow, own))
    own: dict[str, jax.Array] | None = None
    slow: Mapping[str, jax.Array] = {}
    adapted, seen = None, {}
    for number, (images, labels, names) in enumerate(tasks):

        def after(now, number=number):
            nonlocal own, slow
            own, slow = now, follow(slow, now) if number else now

        adapted = tune(base, recipe, images, labels, names, begin=own, after=after, **training)
        if adapted.head is not None:
            raise UserError("lae: the recipe's classifier knows one task's classes alone; take one without `head`")
        seen |= dict.fromkeys(names)
    if adapted is None:
        raise UserError("lae: there are no tasks; give (images, labels, names) of each")
    online = dataclasses.replace(adapted, classes=tuple(seen))
    leaves = named_leaves(adapted.params)
    offline = dataclasses.replace(online, params=tree(leaves | recipe.combine(slow, leaves)))
    finish = getattr(recipe, "finish", None)
    return Experts(online, finish(base, offline) if finish else offline)
