"""Tuning with a linear classifier of its own on the pictures' embeddings: LP-FT, DR-Tune, TeS.

The classifier is the term's part "head", beside a start that does not train; the result's `head` is their sum.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax.adapt.recipe import Extended, Masked
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives import Term
from vlm_jax.pretrained.linear import logistic_regression

IMAGE = Masked((("image/.*", True), (".*", False)))
"""All of the image tower; texts stay as they are."""


def zero_shot(outputs: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (weights [D, C], bias [C]) of the class names, the classifier that a head begins with."""
    texts = rows["classes"]["zero_shot"]
    return jax.lax.stop_gradient(outputs["scale"]) * texts.T, jnp.zeros(len(texts), texts.dtype)


class Head(nn.Module):
    """x W + b, where W and b begin as given."""

    @nn.compact
    def __call__(self, x, weights, bias):
        """[B, D], [D, C], [C] -> [B, C]."""
        kernel = self.param("kernel", lambda rng: jnp.asarray(weights, x.dtype))
        return jnp.matmul(x, kernel, precision="highest") + self.param("bias", lambda rng: jnp.asarray(bias, x.dtype))


def classified(name: str, loss: Callable, start: Callable = zero_shot, **others: Any) -> Term:
    """Returns a term over pictures: `loss(logits_of, features, rows, outputs, ctx)`, `logits_of(x [B, D]) -> [B, C]`.

    Args:
      name: of the term.
      loss: as above; `features` are {"batch": features of the pictures, "classes": ...}.
      start: `start(outputs, rows) -> (weights, bias)`, with which the classifier begins.
      **others: of `Term`; `batch`: the features of the pictures, by default their embeddings.
    """
    of_pictures = others.pop("batch", lambda outputs, ctx: outputs["image_embedding"])
    of_classes = lambda outputs, ctx: outputs["zero_shot"]

    def value(outputs, features, rows, ctx):
        weights = start(outputs, rows)
        return loss(lambda x: outputs.part("head", Head(), x, *weights), features, rows, outputs, ctx)

    return Term(name, {"batch": of_pictures, "classes": of_classes}, value, **others)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over rows with a label, int [B] of 0 or more; other rows are left out."""
    counts = labels >= 0
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1)


@method(
    family="parameters",
    system="LP-FT",
    paper="arXiv:2202.10054",
    differs="a linear probe first; then probe and image tower train together",
)
def lp_ft(model: nn.Module, *, l2: float = 1.0) -> Extended:
    """LP-FT (Kumar et al. 2022): full tuning from the head of `heads.linear_probe`, which would else distort features.

    Args:
      model: two towers.
      l2: of the probe.
    """

    def of_task(base, images, labels, names):
        features = base.embed_images(images) if isinstance(images, list) else base.embed_image_batch(images)
        probe = logistic_regression(features, labels, len(names), l2)
        start = lambda outputs, rows: (probe.weights, probe.bias)
        loss = lambda logits_of, x, rows, outputs, ctx: (
            cross_entropy(logits_of(x["batch"]), rows["batch"]["label"]),
            {},
        )
        return Extended(IMAGE, (classified("head", loss, start),), names_classes=False, head="head")

    return Extended(IMAGE, names_classes=False, of_task=of_task)


@method(
    family="parameters",
    paper="arXiv:2304.01489",
    differs="a classifier learns soft labels that the class names' texts give to each picture",
)
def tes(
    model: nn.Module,
    *,
    soft: float = 0.2,
    text: float = 0.4,
    temperature: float = 0.03,
    hidden: int | None = None,
) -> Extended:
    """TeS (Wang et al. 2023): CE(h(x), (1 - soft) onehot(y) + soft q) + text CE(P(x) T' / temperature, y).

    q is the softmax of P(x) T' / temperature, without gradient: T are the base model's embeddings of the class names, P
    is an MLP with a normalised output. Defaults are of the authors' code, whose MLP has a batch norm; here it has a
    layer norm, so that a row stands for itself.

    Args:
      model: two towers.
      soft: lambda_v; with text = 0, too, the classifier alone is tuned.
      text: lambda_t.
      temperature: tau.
      hidden: width of the MLP; defaults to that of the embeddings.
    """
    if not 0 <= soft <= 1:
        raise UserError(f"soft of tes is {soft}; expected the share of the soft label, 0 to 1")

    def loss(logits_of, features, rows, outputs, ctx):
        labels, x, texts = rows["batch"]["label"], features["batch"], features["classes"]
        logits, target = logits_of(x), jax.nn.one_hot(labels, len(texts))
        if not soft and not text:
            return cross_entropy(logits, labels), {}
        projected = outputs.part("projector", Projector(hidden or x.shape[1], texts.shape[1]), x)
        of_texts = jnp.matmul(projected, texts.T, precision="highest") / temperature
        target = (1 - soft) * target + soft * jax.lax.stop_gradient(jax.nn.softmax(of_texts))
        by_text, counts = cross_entropy(of_texts, labels), labels >= 0
        own = jnp.mean(optax.losses.softmax_cross_entropy(logits, target), where=counts)
        return own + text * by_text, {"text": by_text}

    return Extended(IMAGE, (classified("head", loss),), names_classes=False, head="head")


class Projector(nn.Module):
    """Two layers to a vector of unit norm.

    Attributes:
      hidden, width: of the hidden layer and of the result.
    """

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x):
        """[B, D] -> unit norm [B, width]."""
        x = nn.relu(nn.LayerNorm(name="norm")(nn.Dense(self.hidden, name="fc1")(x)))
        return unit(nn.Dense(self.width, name="fc2")(x))


@method(
    family="parameters",
    system="DR-Tune",
    paper="arXiv:2308.12058",
    differs="the classifier also learns the base model's embeddings, turned and moved to where the tuned ones are",
)
def dr_tune(
    model: nn.Module, *, weight: float = 1.0, queue: int = 256, rotate: bool = True, translate: bool = True
) -> Extended:
    """DR-Tune (Zhou et al. 2023): cross-entropy of a batch's pictures and of a queue of base embeddings, `calibrated`.

    The mean is over both, as in the authors' code; there the queue is full before training, here it fills.

    Args:
      model: two towers.
      weight: of a queue's embedding beside a picture; 0 tunes the classifier alone.
      queue: its length.
      rotate, translate: the parts of the calibration. The authors' code rotates at every tenth step.
    """
    if queue < 1:
        raise UserError(f"queue of dr_tune is {queue}; expected 1 or more")

    def features(outputs, ctx):
        own = {"own": outputs["image_embedding"], "label": outputs["label"]}
        return own | {"base": outputs.teacher("base")["image_embedding"]}

    def loss(logits_of, features, rows, outputs, ctx):
        labels, own = rows["batch"]["label"], logits_of(features["batch"]["own"])
        if not weight:
            return cross_entropy(own, labels), {}
        memory = ctx.state
        zeros = jnp.zeros((1, features["batch"]["own"].shape[1]))
        prototypes = unit((logits_of(jnp.eye(zeros.shape[1])) - logits_of(zeros)).T)
        base = calibrated(memory["base"], memory["own"], memory["label"], prototypes, rotate, translate)
        count = lambda labels: jnp.sum(labels >= 0)
        total = count(labels) + weight * count(memory["label"])
        of_queue = cross_entropy(logits_of(jax.lax.stop_gradient(base)), memory["label"]) * count(memory["label"])
        return (cross_entropy(own, labels) * count(labels) + weight * of_queue) / jnp.maximum(total, 1), {}

    def init(features):
        empty = lambda x: jnp.zeros((queue, *x.shape[1:]), x.dtype)
        return {key: empty(x) for key, x in features["batch"].items()} | {"label": jnp.full(queue, -1)}

    def update(memory, features, ctx):
        return {key: jnp.concatenate([features["batch"][key], old])[:queue] for key, old in memory.items()}

    memory = dict(init=init, update=update) if weight else {}
    term = classified("head", loss, batch=features, **memory)
    return Extended(IMAGE, (term,), names_classes=False, head="head")


def calibrated(
    base: jax.Array,
    own: jax.Array,
    labels: jax.Array,
    prototypes: jax.Array,
    rotate: bool = True,
    translate: bool = True,
) -> jax.Array:
    """Returns base embeddings in the space of the tuned ones, unit norm [Q, D]: DR-Tune's semantic calibration.

    Rotation: R = V U' of the centred base' own = U S V', a rotation (det R = 1), about the means. Translation: each
    class's centre goes to sum_i w_i own_i, w = softmax over the class of <own_i, prototype>.

    Args:
      base, own: embeddings of the same pictures by both models, unit norm [Q, D].
      labels: int [Q], -1 for none; such rows do not count.
      prototypes: of the classes, unit norm [C, D].
      rotate, translate: which parts.
    """
    counts = (labels >= 0)[:, None]
    mean = lambda x: jnp.sum(jnp.where(counts, x, 0), axis=0) / jnp.maximum(jnp.sum(counts), 1)
    dot = lambda a, b: jnp.matmul(a, b, precision="highest")
    if rotate:
        x, y = (jnp.where(counts, one - mean(one), 0) for one in (base, own))
        u, _, vt = jnp.linalg.svd(dot(x.T, y))
        vt = vt.at[-1].multiply(jnp.sign(jnp.linalg.det(dot(u, vt))))
        base = dot(x, dot(u, vt)) + mean(own)
    if translate:
        is_class = labels == jnp.arange(len(prototypes))[:, None]  # [C, Q]
        shares = jnp.where(is_class, dot(prototypes, own.T), -jnp.inf)
        shares = jnp.where(is_class, jax.nn.softmax(jnp.where(is_class.any(1, keepdims=True), shares, 0)), 0)
        centres = dot(is_class.astype(base.dtype), base) / jnp.maximum(jnp.sum(is_class, axis=1, keepdims=True), 1)
        base = base + dot(is_class.T.astype(base.dtype), dot(shares, own) - centres)
    return unit(base)
