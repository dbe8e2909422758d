"""Terms that compare rows of one modality: apart by meaning, alike by class, and classes by prototypes."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.similarity import vectors
from vlm_jax.objectives.contrastive.targets import column, cosines_of
from vlm_jax.objectives.queue import Queue
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="AlignCLIP",
    paper="arXiv:2406.17639",
    differs="embeddings of one modality are apart by as much as their texts differ in meaning",
)
def separation(
    *,
    model: Any,
    of: Sequence[str] = ("image", "text"),
    anchor: str = "text_embedding",
    teacher: str | None = None,
) -> Term:
    """Intra-modality separation (AlignCLIP, Eslami and de Melo 2024), half the sum over modalities z of

        mean_i -log softmax_j(scale s_ij)_i,   s_ij = (1 - cos(a_i, a_j)) <z_i, z_j> for j != i,   s_ii = <x_i, y_i>

    a are the outputs `anchor`, of the model or of a teacher, or a key of the batch, such as embeddings by a frozen text
    model; no gradient flows to them. Rows with equal anchors are not pushed apart. The term stands beside `contrastive`
    with a weight below 1 (the authors' code: 0.5).

    Args:
      model: linen module with two embeddings.
      of: modalities that are separated: "image", "text".
      anchor: what says how much two rows differ, [B, D].
      teacher: name of the teacher that has the anchor.

    Metrics: `gap`, the distance between the mean image and the mean text.
    """
    if not of or not set(of) <= {"image", "text"}:
        raise UserError(f"{WHERE}: `of` is {list(of)}; expected some of: image, text")

    def features(outputs, ctx):
        given = outputs.teacher(teacher) if teacher else outputs
        return {**vectors(outputs), "anchor": jax.lax.stop_gradient(given[anchor])}

    def loss(outputs, features, rows, ctx):
        same = jnp.eye(len(features["anchor"]), dtype=bool)
        distance = jnp.where(same, 0, 1 - cosines_of(features["anchor"]))
        own = jnp.sum(features["image"] * features["text"], axis=-1)
        total = 0
        for name in of:
            z = features[name]
            apart = distance * jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
            logits = outputs["scale"] * jnp.where(same, own[:, None], apart)
            total -= jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))
        gap = jnp.mean(features["image"], axis=0) - jnp.mean(features["text"], axis=0)
        return total / 2, {"gap": jnp.linalg.norm(gap)}

    return Term("separation", features, loss)


@method(
    family="terms",
    system="SetFit",
    paper="arXiv:2209.11055",
    differs="cosines of pairs from few labelled rows go to 1 for equal classes, to 0 for others",
)
def class_pairs(*, model: Any, key: str = "concept", of: str = "image_embedding", draws: int | None = None) -> Term:
    """Mean of (cos(z_i, z_j) - y_ij)^2 over pairs of rows, y_ij = 1 for equal classes, else 0 (SetFit, Tunstall 2022).

    A head on the embeddings, such as a linear probe, then classifies. Rows with a label below 0 are left out.

    Args:
      model: linen module.
      key: the classes, a key of the batch, integers [B].
      of: the output that is compared, [B, D].
      draws: pairs of each kind that are drawn for a row: as many equal as different ones. None: all pairs i < j, and
        each kind has half of the weight.

    Metrics: `positive` and `negative`, the mean cosines of both kinds; NaN without such a pair.
    """
    if draws is not None and draws < 1:
        raise UserError(f"{WHERE}: draws is {draws}; expected at least 1, or None for all pairs")

    def loss(outputs, features, rows, ctx):
        labels = column(rows, key, len(features), f"{WHERE}: the key")
        cosines, known = cosines_of(features), labels >= 0
        equal = (labels[:, None] == labels) & ~jnp.eye(len(labels), dtype=bool)
        kinds = [kind & known & known[:, None] for kind in (equal, labels[:, None] != labels)]
        values, means = [], []
        for i, (wanted, kind) in enumerate(zip((1, 0), kinds, strict=True)):
            weight = kind.astype(cosines.dtype)
            if draws is not None:
                rng = jax.random.fold_in(ctx.rng, i)
                drawn = jax.random.categorical(rng, jnp.where(kind, 0, -jnp.inf), shape=(draws, len(labels)))
                weight = jnp.sum(jax.nn.one_hot(drawn, len(labels), dtype=cosines.dtype), axis=0) * kind
            count = jnp.sum(weight)
            values.append(jnp.sum(weight * jnp.square(cosines - wanted)) / jnp.maximum(count, 1))
            means.append(jnp.where(count > 0, jnp.sum(weight * cosines) / jnp.maximum(count, 1), jnp.nan))
        return sum(values) / 2, dict(zip(("positive", "negative"), means, strict=True))

    return Term("class_pairs", lambda outputs, ctx: outputs[of], loss)


@method(
    family="terms",
    system="LOOK",
    paper="arXiv:2110.06014",
    differs="most of a row's nearest neighbours have its class, which may then form several clusters",
    needs={"objective.size": 16},
)
def neighbours(
    *,
    model: Any,
    key: str = "concept",
    of: str = "image_embedding",
    k: int = 20,
    size: int = 0,
    teacher: str | None = None,
    temperature: float = 0.1,
) -> Term:
    """Mean of -log (sum_{j in N_i, y_j = y_i} e^(s_ij / t) / sum_{j in N_i} e^(s_ij / t)) (LOOK, Feng et al. 2022).

    N_i are the k nearest neighbours of row i by cosine s, without i itself, and the nearest one of its own class, so
    that the loss is finite. If k covers all candidates: neighbourhood components. Rows with a label below 0, or without
    another row of their class, are left out.

    Args:
      model: linen module.
      key: the classes, a key of the batch, integers [B].
      of: the output that is compared, [B, D].
      k: number of neighbours.
      size: rows of earlier batches that are candidates, too, see `queue.Queue`; 0: the batch alone.
      teacher: name of a teacher that makes the rows of earlier batches; None: the model, as it was then.
      temperature: t.

    Metrics: `accuracy`, the share of rows whose nearest neighbour has their class.
    """
    if k < 1 or size < 0:
        raise UserError(f"{WHERE}: k is {k}, size is {size}; expected at least 1 and at least 0")

    def features(outputs, ctx):
        found = {"feature": outputs[of]}
        if size:
            found["label"] = outputs[key]
            found["kept"] = jax.lax.stop_gradient(outputs.teacher(teacher)[of] if teacher else outputs[of])
        return found

    def loss(outputs, features, rows, ctx):
        z, labels = _directions(features["feature"]), column(rows, key, len(features["feature"]), f"{WHERE}: the key")
        others, of_others, there = z, labels, ~jnp.eye(len(z), dtype=bool)
        if size:
            others = jnp.concatenate([z, _directions(ctx.state["kept"])])
            of_others = jnp.concatenate([labels, ctx.state["label"]])
            there = jnp.concatenate([there, jnp.broadcast_to(ctx.state["filled"], (len(z), len(others) - len(z)))], 1)
        there &= of_others >= 0
        cosines = jnp.matmul(z, others.T, precision=jax.lax.Precision.HIGHEST)
        same = there & (labels[:, None] == of_others)
        masked = jax.lax.stop_gradient(jnp.where(there, cosines, -jnp.inf))
        nearest = jax.lax.top_k(masked, min(k, masked.shape[1]))[0][:, -1:]
        own = jnp.max(masked, axis=1, keepdims=True, where=same, initial=-jnp.inf)
        near = there & ((masked >= nearest) | (same & (masked >= own)))
        counts = jnp.any(same, axis=1) & (labels >= 0)
        share = lambda which: jax.nn.logsumexp(cosines / temperature, axis=1, where=which | ~counts[:, None])
        losses = jnp.where(counts, share(near) - share(near & same), 0)
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / jnp.maximum(jnp.sum(counts), 1)
        return mean(losses), {"accuracy": mean(own[:, 0] >= jnp.max(masked, axis=1))}

    if not size:
        return Term("neighbours", features, loss)
    queue = Queue(("kept", "label"), size)
    return Term("neighbours", features, loss, init=queue.init, update=queue.update)


def _directions(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Prototypes(nn.Module):
    """A unit vector for each class, [C, D]."""

    classes: int

    @nn.compact
    def __call__(self, x):
        """[B, D] -> [C, D] in the dtype of x."""
        table = self.param("table", nn.initializers.normal(1.0), (self.classes, x.shape[-1]), x.dtype)
        return table / jnp.linalg.norm(table, axis=-1, keepdims=True)


@method(
    family="terms",
    system="2SFT-MCIP",
    paper="arXiv:2409.01936",
    differs="images of a class lie within a smaller angle of its prototype than of others, by a margin",
    needs={"objective.classes": 8},
)
def arc_margin(
    *,
    model: Any,
    classes: int,
    key: str = "concept",
    of: str = "image_embedding",
    margin: float = 0.5,
    scale: float = 30.0,
) -> Term:
    """Cross-entropy of scale cos(angle of z_i and w_c + margin [c = y_i]) over classes (ArcFace, arXiv:1801.07698).

    The first of two stages of fine-tuning for image retrieval (Schall et al. 2024): images of one object come together,
    and away from the texts. The second stage trains the text tower on locked images, see configs/lit.py. The
    prototypes w are the term's own. With the margin 0: the cross-entropy of scaled cosines.

    Args:
      model: linen module.
      classes: C.
      key: the class, a key of the batch, integers [B] below C; rows below 0 have none and are left out.
      of: the output that is compared, [B, D].
      margin: in radians, 0 to below pi.
      scale: the factor on cosines.

    Metrics: `accuracy`, without the margin.
    """
    if not 0 <= margin < jnp.pi:
        raise UserError(f"{WHERE}: margin is {margin}; expected an angle in radians, from 0 to below pi")

    def loss(outputs, features, rows, ctx):
        labels = column(rows, key, len(features), f"{WHERE}: the key")
        z = _directions(features)
        prototypes = outputs.part("prototypes", Prototypes(classes), z)
        cosines = jnp.matmul(z, prototypes.T, precision=jax.lax.Precision.HIGHEST)
        own = jax.nn.one_hot(labels, classes, dtype=bool)
        logits = scale * jnp.where(own, turned(cosines, margin), cosines)
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * own, axis=1)
        losses = jnp.where(labels < classes, losses, jnp.nan)  # the run stops
        known = labels >= 0
        mean = lambda x: jnp.sum(jnp.where(known, x, 0)) / jnp.maximum(jnp.sum(known), 1)
        return mean(losses), {"accuracy": mean(jnp.argmax(cosines, axis=1) == labels)}

    return Term("arc_margin", lambda outputs, ctx: outputs[of], loss)


def turned(cosines: jax.Array, angle: float) -> jax.Array:
    """Returns cos(a + angle), where a is the angle of `cosines`; -2 - cos(a + angle) beyond pi, so that it still falls.

    The gradient is finite at cosines of -1 and 1.
    """
    if angle == 0:
        return cosines
    x = jnp.clip(cosines, -1, 1)
    square = 1 - jnp.square(x)
    sine = jnp.where(square > 1e-12, jnp.sqrt(jnp.maximum(square, 1e-12)), 0)
    falls = x * jnp.cos(angle) - sine * jnp.sin(angle)
    return jnp.where(x > -jnp.cos(angle), falls, -2 - falls)
