"""Continual learning: similarities of the batch stay as the model before the stage has them.

teachers=dict(before=dict(decay=1.0, refresh=True))     # the model at the end of the stage before
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE, Term

RELATIONS = {
    "image_to_text": ("image", "text"),
    "text_to_image": ("text", "image"),
    "image_to_image": ("image", "image"),
    "text_to_text": ("text", "text"),
}
HIDDEN = -1e9  # a logit: no row is compared with itself


@method(
    family="terms",
    system="LwF",
    paper="arXiv:1606.09282",
    differs="the texts that a picture gets from the earlier model stay likely, on new pictures alone",
    needs={"objective.teachers": {"before": {"decay": 1.0, "refresh": True}}},
)
def lwf(*, model: Any, teacher: str = "before", temperature: float = 2.0, texts: str = "batch") -> Term:
    """Learning without forgetting (Li and Hoiem 2016): the KL divergence from the earlier model's texts of a picture,

        T^2 mean_i KL(softmax_j(old_ij / T) | softmax_j(new_ij / T)),    old, new: scale x cosine of each model

    The old task's outputs are similarities to texts: those of the batch, or of a row set, such as the class names of
    earlier data. With a teacher of the initial model instead, other texts and pictures, it is the distillation of ZSCL.

    Args:
      model: linen module with two embeddings.
      teacher: name of the earlier model.
      temperature: T.
      texts: row set of the texts.

    Metrics: `image_to_text`, the divergence.
    """
    if not temperature > 0:
        raise UserError(f"{WHERE}: the temperature is {temperature}; expected a number above 0")
    of = ("image_to_text",)
    return _kept("lwf", teacher, of, 1 / temperature, factor=temperature**2, texts=texts, own_scale=True)


@method(
    family="terms",
    system="CTP",
    paper="arXiv:2308.07146",
    differs="who is near whom, across modalities and within them, stays as the earlier model has it",
    needs={"objective.teachers": {"before": {"decay": 1.0, "refresh": True}}},
)
def topology(
    *, model: Any, teacher: str = "before", of: Sequence[str] = tuple(RELATIONS), scale: float = 1 / 0.07
) -> Term:
    """Topology preservation (CTP, Zhu et al. 2023): half the sum over relations of

        mean_i KL(softmax_j(scale <a_i, b_j>_old) | softmax_j(scale <a_i, b_j>_new))

    Within a modality, no row is compared with itself. CTP adds `contrastive` with the queue of a compatible momentum
    model, `teachers=dict(momentum=dict(decay=0.9, anchor="before", refresh=True))`.

    Args:
      model: linen module with two embeddings.
      teacher: name of the earlier model.
      of: relations, keys of `RELATIONS`.
      scale: 1 / temperature, of both models.

    Metrics: the divergence of each relation.
    """
    return _kept("topology", teacher, of, scale, factor=0.5)


@method(
    family="terms",
    system="Mod-X",
    paper="arXiv:2305.07437",
    differs="all entries of the contrastive matrix follow the earlier model, in rows that it understands",
    needs={"objective.teachers": {"before": {"decay": 1.0, "refresh": True}}},
)
def off_diagonal(*, model: Any, teacher: str = "before", scale: float = 1.0) -> Term:
    """Mod-X (Ni et al. 2023): `topology` across modalities, in rows whose own partner the earlier model ranks first.

    A row that the earlier model misranks is replaced by the model's own, so that its divergence is 0. The weight of the
    term is alpha times the batch size of the authors' code, which sums over rows and compares cosines, scale 1.

    Args:
      model: linen module with two embeddings.
      teacher: name of the earlier model.
      scale: 1 / temperature, of both models.

    Metrics: the divergence of both directions; `understood`, the share of rows that count.
    """
    return _kept("off_diagonal", teacher, ("image_to_text", "text_to_image"), scale, factor=0.5, understood=True)


def _kept(name, teacher, relations, scale, *, factor=1.0, texts="batch", own_scale=False, understood=False) -> Term:
    """Returns factor * sum over relations of the mean KL(old | new) of the rows' softmax over similarities.

    Args:
      name: of the term.
      teacher: the earlier model.
      relations: keys of `RELATIONS`.
      scale: of the cosines of both models.
      factor: on the sum.
      texts: row set of the texts.
      own_scale: whether the cosines are also multiplied by each model's learned scale.
      understood: whether only rows count whose largest old similarity is on the diagonal.
    """
    unknown = set(relations) - RELATIONS.keys()
    if unknown or not relations:
        raise UserError(f"{WHERE}: `of` is {list(relations)}; expected some of: {', '.join(RELATIONS)}")

    def of(*modalities):
        def features(outputs, ctx):
            pair = {"new": outputs, "old": outputs.teacher(teacher)}
            found = {f"{age}_{key}": one[f"{key}_embedding"] for age, one in pair.items() for key in modalities}
            if any(z.ndim != 2 for z in found.values()):
                raise UserError(f'{WHERE}: `{name}` compares one vector each; give towers another pool than "all"')
            return found

        return features

    def loss(outputs, features, rows, ctx):
        features = features if texts == "batch" else features["batch"] | features[texts]
        scales = {"new": scale, "old": scale}
        if own_scale:
            scales = {"new": scale * outputs["scale"], "old": scale * outputs.teacher(teacher)["scale"]}
        metrics, counted = {}, []
        for relation in relations:
            new, old = (_logits(features, age, RELATIONS[relation], scales[age]) for age in ("new", "old"))
            wanted = jax.nn.log_softmax(old)
            divergence = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(new)), axis=1)
            if understood:
                counts = jnp.argmax(old, axis=1) == jnp.arange(len(old))
                divergence = jnp.where(counts, divergence, 0)
                counted.append(jnp.mean(counts.astype(divergence.dtype)))
            metrics[relation] = jnp.mean(divergence)
        total = factor * sum(metrics.values())
        return total, metrics | ({"understood": sum(counted) / len(counted)} if understood else {})

    sets = {"batch": of("image"), texts: of("text")}
    return Term(name, of("image", "text") if texts == "batch" else sets, loss)


def _logits(features, age, modalities, scale):
    """scale x products of rows of two modalities, [B, B'], or of one, its diagonal hidden; `age`: "new" or "old"."""
    a, b = (features[f"{age}_{modality}"] for modality in modalities)
    logits = scale * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(jnp.eye(len(a), dtype=bool), HIDDEN, logits) if modalities[0] == modalities[1] else logits
