"""Prompts tuned on pseudo-labels that grow in number and improve (GRIP)."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import config
from vlm_jax.adapt.methods import best_rate
from vlm_jax.adapt.prompts.coop import coop
from vlm_jax.adapt.prompts.upt import upt
from vlm_jax.adapt.prompts.vpt import vpt
from vlm_jax.adapt.recipe import Extended, Recipe
from vlm_jax.adapt.task import Shots, Task, logits_of
from vlm_jax.adapt.tune import tune
from vlm_jax.adapt.unlabelled.pseudo_labels import top_of_each_class
from vlm_jax.adapt.unlabelled.transport import EMBEDDINGS
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives import Term
from vlm_jax.pretrained import Pretrained

PROMPTS = {"text": coop, "image": vpt, "both": upt}


@method(
    family="prompts",
    paper="arXiv:2306.01669",
    differs="prompts learn pseudo-labels, equally many of each class, and more at each iteration",
)
def grip(
    model: nn.Module,
    *,
    prompt: str = "text",
    labelled: bool = True,
    iterations: int = 10,
    k: int | None = None,
    weight: float | None = None,
) -> "Grip":
    """GRIP (Menghini et al. 2023): new prompts at each iteration, trained on the pseudo-labels of the last ones.

    Iteration i trains CE(labelled) + weight * CE(pseudo-labelled) on the i K most probable pictures of each class, by
    the base model at first. The settings of the paper: semi-supervised; transductive zero-shot, if some classes have no
    labelled pictures (few_shot: seen=0.6), which alone get pseudo-labels; unsupervised (labelled=False).

    Args:
      model: two towers.
      prompt: "text" (CoOp), "image" (VPT) or "both" (UPT).
      labelled: whether the labelled pictures train.
      iterations: 1 trains on the zero-shot model's pseudo-labels alone.
      k: K; defaults to N / (iterations * classes), so that in the end there are as many labels as pictures.
      weight: of the pseudo-labels; defaults to the number of labels over that of pseudo-labels, as in the paper. 0 is
        the prompt method itself.
    """
    config.check_least(1, "grip", iterations=iterations, k=k)
    config.check_least(0, "grip", weight=weight)
    if not labelled and weight == 0:
        raise UserError("grip: weight is 0 without labelled pictures, so that nothing trains; leave weight out")
    return Grip(config.choose(PROMPTS, prompt, "prompt of grip")(model), labelled, iterations, k, weight)


class Grip(NamedTuple):
    """Fits a recipe to labels and to pseudo-labels, iteration by iteration; attributes: see `grip`."""

    recipe: Recipe
    labelled: bool
    iterations: int
    k: int | None
    weight: float | None

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
        """Returns the model with the prompts of the last iteration; steps are of each iteration."""
        pool, classes = task.unlabelled("grip"), np.arange(len(task.names))
        unseen = np.setdiff1d(classes, shots.labels)
        classes = unseen if self.labelled and len(unseen) else classes
        first = self.k or max(len(pool.labels) // (self.iterations * len(classes)), 1)
        training = dict(steps=steps, batch_size=batch_size, weight_decay=weight_decay, templates=task.templates)

        term = Term("pseudo", EMBEDDINGS, pseudo_labelled)
        recipe = self.recipe if self.weight == 0 else Extended(self.recipe, (term,), names_classes=self.labelled)

        def train(rate):
            adapted = base
            for iteration in range(1, 2 if self.weight == 0 else self.iterations + 1):
                logits = logits_of(base, adapted, pool, task.names)
                rows, labels = top_of_each_class(logits, min(iteration * first, len(pool.labels)), classes)
                weight = len(shots.labels) / len(rows) if self.weight is None else self.weight
                beside = {"label": labels, "weight": np.full(len(rows), weight if self.labelled else 1.0, np.float32)}
                adapted = tune(
                    base, recipe, shots.images, shots.labels, task.names, pool=pool.images[rows], beside=beside,
                    learning_rate=rate, seed=task.seed, **training,
                )  # fmt: skip
            return adapted

        return best_rate(train, learning_rate, base, validation, task)


def pseudo_labelled(outputs, features, rows, ctx):
    """The mean of `weight` (1 if absent) * cross-entropy over the pool's pictures with a `label`, 0 or more."""
    cosines = jnp.matmul(features["pool"], features["classes"].T, precision="highest")
    labels, counts = jnp.maximum(rows["pool"]["label"], 0), rows["pool"]["label"] >= 0
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs["scale"] * cosines, labels)
    losses *= rows["pool"].get("weight", 1.0)
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1), {}
