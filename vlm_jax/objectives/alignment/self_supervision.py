"""Self-supervision without negatives, or with a queue of them: views of a picture, or a picture and its text, agree.

    terms=dict(vicreg=dict(of=("views",))),                            # two views or more of each picture
    terms=dict(contrastive={}, barlow_twins=dict(of=("image", "text"), weight=0.025)),   # beside contrast

All terms compare *sides*: the vectors of `of`. Sides of one modality are compared with each other; if `of` has pictures
and texts, only sides of different modalities are. A projector (and a predictor) for each modality belongs to the term.
A projector with batch norm sees all rows of the global batch, so that accumulation is exact.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.alignment.self_distillation import Prototypes, sinkhorn
from vlm_jax.objectives.alignment.sides import (
    Compared,
    Section,
    each_side,
    mean_over,
    metrics,
    pairs,
    projector_of,
    standardised,
)
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.contrastive.penalty import HIDDEN
from vlm_jax.objectives.queue import Queue
from vlm_jax.objectives.term import WHERE, Term


def _cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(unit(a) * unit(b), axis=-1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


@method(
    family="terms",
    paper="arXiv:2011.10566",
    differs="a predictor of one view finds the other one, to which no gradient flows",
    needs={"objective.projector": {"hidden": 8, "out": 6}, "objective.predictor": {"hidden": 4}},
)
def simsiam(
    *,
    model: Any,
    of: Sequence[str] = ("views",),
    crops: str | None = None,
    projector: Section | None = None,
    predictor: Section | None = None,
) -> Term:
    """Mean over pairs of sides of -cos(h(z_i), z_j), z = projector, h = predictor (SimSiam, Chen and He 2021).

    No gradient flows to z_j. Pairs come in both orders: of two sides, D(p_1, z_2) / 2 + D(p_2, z_1) / 2.

    Args:
      model: linen module whose call returns `Embeddings`.
      of: the sides: keys of the batch with views [B, V, h, w, 3], a picture [B, h, w, 3] or texts [B, V, L], none
        lacking; or "image" and "text", which share their pass with other terms. A side is the tower's pooled output.
      crops: key of further views, of any size, which predict and are not predicted (multi-crop, arXiv:2006.09882); for
        another size than the tower's, `model.image.any_size`.
      projector, predictor: fields of `Projector`; parameters of the term, one for each modality.

    Metrics: `image_spread` and `image_effective_rank` of the first side, before the projector, see `collapse`; for
    texts `text_...`.
    """
    return _predicted("simsiam", of, crops, None, projector, predictor, dict(last=True), dict(hidden=512), _negative)


@method(
    family="terms",
    paper="arXiv:2006.07733",
    differs="a predictor of one view finds what an average of the model makes of the other one",
    needs={
        "objective.projector": {"hidden": 8, "out": 6},
        "objective.predictor": {"hidden": 4},
        "objective.teachers": {"average": {"decay": 0.99}},
    },
)
def byol(
    *,
    model: Any,
    of: Sequence[str] = ("views",),
    crops: str | None = None,
    teacher: str = "average",
    projector: Section | None = None,
    predictor: Section | None = None,
) -> Term:
    """|h(z_i) / |h(z_i)| - z'_j / |z'_j||^2, twice the mean over pairs of sides (BYOL, Grill et al. 2020).

    z' are the teacher's projections. Of two sides the loss is the sum over both orders.

    Args:
      teacher: name of the teacher, an average of the run's parameters.
      Others: see `simsiam`.

    Metrics: as for `simsiam`.
    """
    sizes = dict(layers=2, hidden=4096, out=256), dict(hidden=4096)
    return _predicted("byol", of, crops, teacher, projector, predictor, *sizes, lambda cosine: 4 - 4 * cosine)


def _negative(cosine):
    return -cosine


def _predicted(name, of, crops, teacher, projector, predictor, sizes, hidden, value) -> Term:
    """Returns the term of the mean over pairs of `value(cos(h(z_i), z_j))`."""
    projector = projector_of(projector, **sizes)
    predictor = projector_of(predictor, "predictor", **dict(layers=2, out=projector.out) | hidden)
    compared = Compared(of, crops, teacher, projector, predictor)

    def loss(outputs, features, rows, ctx):
        own = compared.projected(outputs, features, "own", "crops")
        count = sum(views.shape[1] for views in features["own"].values())
        targets = own[:count]
        if teacher:
            targets = compared.projected(outputs.teacher(teacher), features, "taught")
        predicted = [(side, compared.predict(outputs, side, z)) for side, z in own]
        agree = lambda a, b: jnp.mean(value(_cosines(a[1], jax.lax.stop_gradient(b[1]))))
        return mean_over(pairs(targets, predicted), agree), metrics(features)

    return Term(name, compared.features, loss)


@method(
    family="terms",
    paper="arXiv:2103.03230",
    differs="the cross-correlation of two views' features is the identity",
    needs={"objective.projector": {"hidden": 8, "out": 6}},
)
def barlow_twins(
    *, model: Any, of: Sequence[str] = ("views",), projector: Section | None = None, redundancy: float = 0.005
) -> Term:
    """sum_d (1 - C_dd)^2 + redundancy sum_{d != e} C_de^2, mean over pairs (Barlow Twins, Zbontar et al. 2021).

        C_de = sum_b z_bd z'_be / (sqrt(sum_b z_bd^2) sqrt(sum_b z'_be^2)),   z, z' with mean 0 over the batch

    Args: see `simsiam`. CLIP-rocket (arXiv:2305.08675) compares `of=("image", "text")` with the weight 0.025.

    Metrics: as for `simsiam`.
    """
    compared = Compared(of, projector=projector_of(projector, hidden=8192, out=8192))

    def loss(outputs, features, rows, ctx):
        sides = [(side, standardised(z)) for side, z in compared.projected(outputs, features, "own")]

        def correlated(a, b):
            square = jnp.square(_product(a[1].T, b[1]) / len(a[1]) - jnp.eye(a[1].shape[1]))
            diagonal = jnp.sum(jnp.diag(square))
            return diagonal + redundancy * (jnp.sum(square) - diagonal)

        return mean_over(pairs(sides, both=False), correlated), metrics(features)

    return Term("barlow_twins", compared.features, loss)


@method(
    family="terms",
    paper="arXiv:2105.04906",
    differs="two views' features are near, each dimension varies, and no two dimensions covary",
    needs={"objective.projector": {"hidden": 8, "out": 6}},
)
def vicreg(
    *,
    model: Any,
    of: Sequence[str] = ("views",),
    projector: Section | None = None,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Term:
    """Variance, invariance, covariance (VICReg, Bardes et al. 2022), in the authors' code's scale; mean over pairs of

        invariance mean_bd (z_bd - z'_bd)^2 + variance (v(z) + v(z')) / 2 + covariance (c(z) + c(z'))
        v(z) = mean_d max(0, 1 - sqrt(var_b z_bd + 1e-4)),   c(z) = 1/D sum_{d != e} cov_de^2

    Variances and covariances are those of a sample, with B - 1 in the denominator.

    Args:
      invariance, variance, covariance: weights.
      Others: see `simsiam`.

    Metrics: as for `simsiam`; `invariance`, `variance` and `covariance`, without weights.
    """
    compared = Compared(of, projector=projector_of(projector, hidden=8192, out=8192))

    def loss(outputs, features, rows, ctx):
        def alone(side, z):
            centred = z - jnp.mean(z, axis=0)
            matrix = _product(centred.T, centred) / max(len(z) - 1, 1)
            varies = jnp.diag(matrix)
            spread = jnp.mean(jax.nn.relu(1 - jnp.sqrt(varies + 1e-4)))
            return side, z, spread, (jnp.sum(jnp.square(matrix)) - jnp.sum(jnp.square(varies))) / z.shape[1]

        sides = pairs([alone(*one) for one in compared.projected(outputs, features, "own")], both=False)
        parts = {
            "invariance": mean_over(sides, lambda a, b: jnp.mean(jnp.square(a[1] - b[1]))),
            "variance": mean_over(sides, lambda a, b: (a[2] + b[2]) / 2),
            "covariance": mean_over(sides, lambda a, b: a[3] + b[3]),
        }
        weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return sum(weights[name] * part for name, part in parts.items()), parts | metrics(features)

    return Term("vicreg", compared.features, loss)


@method(
    family="terms",
    paper="arXiv:2006.09882",
    differs="one view predicts the other one's assignment to prototypes, balanced over the batch",
    needs={"objective.projector": {"hidden": 8, "out": 6}, "objective.prototypes": 12},
)
def swav(
    *,
    model: Any,
    of: Sequence[str] = ("views",),
    crops: str | None = None,
    projector: Section | None = None,
    prototypes: int = 3000,
    temperature: float = 0.1,
    epsilon: float = 0.05,
) -> Term:
    """Mean over pairs of sides of -sum_k q_jk log softmax(z_i . c / temperature)_k (SwAV, Caron et al. 2020).

    z are unit vectors, c prototypes of unit norm, which modalities share. The codes q_j = `sinkhorn`(z_j . c /
    epsilon) of the batch have no gradient. Pairs come in both orders.

    Args:
      prototypes: number of c.
      epsilon: of Sinkhorn-Knopp, of which there are three iterations; small ones make sharp codes.
      Others: see `simsiam`.

    Metrics: as for `simsiam`.
    """
    compared, table = Compared(of, crops, projector=projector_of(projector, layers=2, out=128)), Prototypes(prototypes)

    def loss(outputs, features, rows, ctx):
        found = [(side, unit(z)) for side, z in compared.projected(outputs, features, "own", "crops")]
        columns = outputs.part("prototypes", table, found[0][1])
        scores = [(side, _product(z, columns)) for side, z in found]
        count = sum(views.shape[1] for views in features["own"].values())
        codes = [(side, sinkhorn(jax.lax.stop_gradient(x) / epsilon)) for side, x in scores[:count]]
        agree = lambda a, q: -jnp.mean(jnp.sum(q[1] * jax.nn.log_softmax(a[1] / temperature), axis=-1))
        return mean_over(pairs(codes, scores), agree), metrics(features)

    return Term("swav", compared.features, loss)


@method(
    family="terms",
    system="BriVL",
    paper="arXiv:2103.06561",
    differs="a query against its key and a queue of keys by a slow average, of the other modality or of other views",
    needs={
        "objective.projector": {"hidden": 8, "out": 6},
        "objective.teachers": {"momentum": {"decay": 0.99}},
        "objective.size": 16,
    },
)
def moco(
    *,
    model: Any,
    of: Sequence[str] = ("views",),
    teacher: str = "momentum",
    projector: Section | None = None,
    size: int = 65_536,
    temperature: float = 0.07,
) -> Term:
    """-log e^(q_i . k_j / t) / (e^(q_i . k_j / t) + sum_n e^(q_i . n / t)), mean over pairs of sides in both orders.

    Momentum contrast (MoCo, He et al. 2020, arXiv:1911.05722): q are unit vectors of the model, k those of the teacher,
    n the last `size` keys of the modality of k. Keys of other rows of the batch are no negatives, unlike in
    `contrastive` with `negatives="queue"`. With `of=("image", "text")` and `projector=dict(layers=0)`, the embeddings
    themselves, it is BriVL's (Huo et al. 2021). The queue is empty at first.

    Args:
      teacher: name of the teacher, an average of the run's parameters.
      projector: fields of `Projector`, without batch norm: MoCo v2's two layers; `layers=1` is MoCo's.
      size: of the queues, in rows of a batch.
      temperature: t.
      Others: see `simsiam`.

    Metrics: as for `simsiam`; `accuracy`, the share of queries whose key is above all negatives.
    """
    compared = Compared(of, None, teacher, projector_of(projector, layers=2, out=128, norm="none"))
    if compared.projector.norm == "batch":
        raise UserError(f"{WHERE}.projector.norm is `batch`, which tells queries from keys; expected none or layer")

    def features(outputs, ctx):
        found = compared.features(outputs, ctx)
        made = lambda by, kind: {side: unit(compared.project(by, side, views)) for side, views in found[kind].items()}
        return {"own": found["own"], "queries": made(outputs, "own"), "keys": made(outputs.teacher(teacher), "taught")}

    def loss(outputs, features, rows, ctx):
        absent = jnp.where(ctx.state["filled"], 0, HIDDEN)

        def against(query, key):
            (_, q), (side, k) = query, key
            negatives = jnp.einsum("bd,nvd->bnv", q, ctx.state[side], precision=jax.lax.Precision.HIGHEST)
            negatives = (negatives / temperature + absent[:, None]).reshape(len(q), -1)
            positive = jnp.sum(q * k, axis=-1, keepdims=True) / temperature
            losses = jax.nn.logsumexp(jnp.concatenate([positive, negatives], axis=1), axis=1) - positive[:, 0]
            return jnp.stack([jnp.mean(losses), jnp.mean(positive[:, 0] > jnp.max(negatives, axis=1))])

        value, accuracy = mean_over(pairs(each_side(features["keys"]), each_side(features["queries"])), against)
        return value, {"accuracy": accuracy} | metrics(features)

    queue = lambda features: Queue(tuple(features["keys"]), size)
    init = lambda features: queue(features).init(features["keys"])
    update = lambda state, features, ctx: queue(features).update(state, features["keys"], ctx)
    return Term("moco", features, loss, init=init, update=update)


class Scale(nn.Module):
    """A learned factor on cosines, stored as its log."""

    initial: float

    @nn.compact
    def __call__(self):
        return jnp.exp(self.param("log", nn.initializers.constant(math.log(self.initial)), ()))


@method(
    family="terms",
    system="CLIP-rocket",
    paper="arXiv:2305.08675",
    differs="views of pictures and texts are contrasted through projectors of their own, beside the plain pair",
    needs={"objective.projector": {"hidden": 8, "out": 6, "norm": "layer"}},
)
def projected_contrast(
    *,
    model: Any,
    of: Sequence[str] = ("views", "texts"),
    projector: Section | None = None,
    penalty: str | Mapping[str, Any] = "softmax",
    targets: str | Mapping[str, Any] = "identity",
    scale_init: float = 10.0,
) -> Term:
    """The contrastive loss of projections, mean over pairs of sides: each view of a picture with each of a text.

    The recipe of CLIP-rocket (Fini et al. 2023) has it beside `contrastive` on the plain pair, with twice the weight,
    label smoothing and strong augmentation. Within one modality it is a contrast of views.

    Args:
      projector: fields of `Projector`, three layers.
      penalty: as for `contrastive`, such as dict(name="softmax", label_smoothing=0.1).
      targets: "identity", or a batch key such as "concept", as for `contrastive`.
      scale_init: initial factor on cosines, a learned parameter of the term.
      Others: see `simsiam`.

    Metrics: as for `simsiam`; `scale`.
    """
    compared = Compared(of, projector=projector_of(projector, hidden=4096, out=512))
    penalty = catalogue.build("penalties", penalty, f"{WHERE}.penalty")
    targets = targets_of.build(targets, f"{WHERE}.targets")
    if targets.labels is None:
        raise UserError(f"{WHERE}.targets should be `identity` or a key of the batch, not soft ones")

    def loss(outputs, features, rows, ctx):
        scale = outputs.part("scale", Scale(scale_init))
        sides = [(side, unit(z)) for side, z in compared.projected(outputs, features, "own")]

        def contrasted(a, b):
            logits = scale * _product(a[1], b[1].T)
            return penalty.plain(logits, logits, *targets.of({}, rows, len(logits)))

        return mean_over(pairs(sides, both=False), contrasted), {"scale": scale} | metrics(features)

    return Term("projected_contrast", compared.features, loss)
