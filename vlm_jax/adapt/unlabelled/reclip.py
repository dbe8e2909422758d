"""Norms of both towers trained on labels that pictures and texts agree on (ReCLIP)."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from vlm_jax import config
from vlm_jax.adapt.methods import best_rate
from vlm_jax.adapt.recipe import Extended, Masked
from vlm_jax.adapt.task import Shots, Task, features_of
from vlm_jax.adapt.tune import tune
from vlm_jax.adapt.unlabelled.grip import pseudo_labelled
from vlm_jax.adapt.unlabelled.pseudo_labels import by_neighbours, without_first_directions
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives import Term
from vlm_jax.pretrained import Pretrained, class_embeddings, unit
from vlm_jax.pretrained.linear import Linear


@method(
    family="parameters",
    paper="arXiv:2308.03793",
    differs="norms learn labels spread over neighbours, where picture tower and text tower agree on a label",
)
def reclip(
    model: nn.Module,
    *,
    epochs: int = 2,
    neighbours: int = 20,
    alpha: float = 0.99,
    keep_first: bool = False,
    rank: int | None = None,
) -> "ReClip":
    """ReCLIP (Hu et al. 2024): self-training of the norms on pictures without labels; no label is read.

    In each epoch both towers have pseudo-labels, `by_neighbours` in the space of the class names, see
    `without_first_directions`: V by the tuned pictures, T by the tuned texts. Where both agree, V's norms learn the
    label with the means of V's pictures by label as classifier, T's norms with the texts. The result's classifier is
    the mean of both.

    The authors average the logits of two models; here one model reads the tuned pictures, with both classifiers.

    Args:
      model: two towers.
      epochs: times that pseudo-labels are made.
      neighbours, alpha: of the label propagation, k and alpha of `propagated`.
      keep_first: whether the names' first direction, which all have in common, stays.
      rank: directions from this one on are left out, too; 250 in the paper for more than 500 classes.
    """
    config.check_least(1, "reclip", epochs=epochs, neighbours=neighbours, rank=rank)
    return ReClip(epochs, neighbours, alpha, keep_first, rank)


class ReClip(NamedTuple):
    """Fits the norms epoch by epoch; attributes: see `reclip`."""

    epochs: int
    neighbours: int
    alpha: float
    keep_first: bool
    rank: int | None

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
        """Returns the model with tuned norms and a classifier; steps are those of all epochs."""
        pool = task.unlabelled("reclip")
        training = dict(steps=-(-steps // self.epochs), batch_size=batch_size, weight_decay=weight_decay)

        centres: dict[str, np.ndarray] = {}
        recipe = agreeing(centres)

        def train(rate):
            adapted, own, text = base, {}, task.text
            for _ in range(self.epochs):
                images = features_of(base, adapted, pool)
                of_pictures = self.labels(images, task.text, task.text)
                of_texts = self.labels(pool.features, text, text)
                centres["now"] = centroids(images, of_pictures, task.text)
                beside = {"label": agreed(of_pictures, of_texts), "feature": np.asarray(pool.features, np.float32)}
                adapted = tune(
                    base, recipe, shots.images, shots.labels, task.names, templates=task.templates[:1],
                    pool=pool.images, beside=beside, learning_rate=rate, seed=task.seed, begin=dict(own) or None,
                    after=own.update, **training,
                )  # fmt: skip
                text = class_embeddings(adapted.embed_texts, task.names, task.templates)
            images = features_of(base, adapted, pool)
            of_pictures = centroids(images, self.labels(images, task.text, task.text), task.text)
            scale = float(np.exp(adapted.params["logit_scale"]))
            head = Linear(np.ascontiguousarray(scale * (of_pictures + text).T, np.float64) / 2, np.zeros(len(text)))
            return dataclasses.replace(adapted, head=head, templates=tuple(task.templates))

        return best_rate(train, learning_rate, base, validation, task)

    def labels(self, images: np.ndarray, text: np.ndarray, names: np.ndarray) -> np.ndarray:
        """Returns pseudo-labels int [N] by neighbours, in the space of the names."""
        projection = without_first_directions(names, int(not self.keep_first), self.rank)
        return by_neighbours(images, text, projection, self.neighbours, self.alpha)


def agreed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the labels that both have, -1 elsewhere; raises a UserError if there is none."""
    labels = np.where(a == b, a, -1)
    if (labels < 0).all():
        raise UserError("reclip: pictures and texts agree on no pseudo-label; a larger pool or fewer `neighbours`?")
    return labels


def centroids(images: np.ndarray, labels: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Returns the normalised mean of each class's pictures and its name, float32 [C, D].

    Args:
      images, text: unit norm, float [N, D] and [C, D].
      labels: int [N].
    """
    return unit(np.eye(len(text))[labels].T @ images + text).astype(np.float32)


def agreeing(centres: Mapping[str, np.ndarray]) -> Extended:
    """The norms of both towers: those of V learn pictures' `label` by the centres "now", those of T by the texts."""
    of_pictures = {"pool": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["centres"]}
    of_texts = {"pool": lambda o, ctx: o["feature"], "classes": lambda o, ctx: o["text_embedding"]}
    return Extended(
        Masked("norm"),
        (Term("pictures", of_pictures, pseudo_labelled), Term("texts", of_texts, pseudo_labelled)),
        tables={"centres": lambda known: centres["now"]},  # one recipe for all epochs is compiled once
        optimizer=dict(name="sgd", momentum=0.9, schedule=dict(name="constant")),
        names_classes=False,
    )
