"""Self-training on weak labels: soft pseudo-labels that are refreshed, weighted by confidence, and pairs (COSINE)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives import Teacher, Term


@method(
    family="parameters",
    system="COSINE",
    paper="arXiv:2010.07835",
    differs="soft pseudo-labels, weighted by confidence; pairs of one label come near, pairs of two are pushed apart",
    identity=True,
)
def contrastive_self_training(
    model: nn.Module,
    *,
    warmup: int = 20,
    period: int = 20,
    power: float = 2.0,
    confidence: float = 0.2,
    contrast: float = 1.0,
    margin: float = 1.0,
    uniform: float = 0.1,
) -> Extended:
    """COSINE (Yu et al. 2021): full tuning on weak labels, then self-training on pictures without labels.

    The weak labels are the base model's zero-shot names, by cross-entropy for `warmup` steps. Then, with pseudo-labels
    y of the model as it was at the last refresh, `confident_divergence` + contrast * `pair_margin` + uniform * the mean
    of KL(uniform || p) over confident pictures. The paper's rules, which label texts, are the class names here; no
    label is read.

    Args:
      model: two towers.
      warmup: steps on weak labels; 0, in Python, begins with self-training.
      period: steps between two refreshes of the pseudo-labels.
      power: how sharp pseudo-labels are, see `sharpened`.
      confidence: the least weight of a picture that counts, in [0, 1].
      contrast: of the pairs; 0 leaves them out.
      margin: cosine distance that pairs of different pseudo-labels keep.
      uniform: of the regulariser against overconfidence.
    """
    config.check_least(1, "contrastive_self_training", period=period, power=power)
    config.check_least(0, "contrastive_self_training", warmup=warmup, contrast=contrast, uniform=uniform, margin=margin)
    if not 0 <= confidence <= 1:
        raise UserError(f"confidence of contrastive_self_training is {confidence}; expected 0 to 1")
    later = lambda step: jnp.where(step < warmup, 0.0, 1.0)
    keeps = lambda step: jnp.where((step + 1 > warmup) & ((step + 1 - warmup) % period != 0), 1.0, 0.0)
    both = lambda key: lambda o, ctx: {"own": o[key], "pseudo": o.teacher("pseudo")[key]}

    def self_training(outputs, features, rows, ctx):
        images, texts = features["pool"], features["classes"]
        log_p = lambda who: jax.nn.log_softmax(
            outputs["scale"] * jnp.matmul(images[who], texts[who].T, precision="highest")
        )
        own, pseudo = log_p("own"), sharpened(jnp.exp(log_p("pseudo")), power)
        weights = certainty(pseudo)
        counts = weights >= confidence
        divergence = confident_divergence(own, pseudo, weights, counts)
        over = -jnp.mean(own, axis=1) - jnp.log(own.shape[1])  # KL(uniform || p)
        value = divergence + uniform * jnp.sum(jnp.where(counts, over, 0)) / jnp.maximum(jnp.sum(counts), 1)
        if contrast:
            value += contrast * pair_margin(images["own"], jnp.argmax(pseudo, axis=1), counts, margin)
        return value, {"confident": jnp.mean(counts)}

    terms = [Term("self_training", {"pool": both("image_embedding"), "classes": both("text_embedding")}, self_training,
                  weight=later if warmup else 1.0)]  # fmt: skip
    if warmup:
        terms.append(Term("weak", WEAK, weak_labels, weight=lambda step: 1 - later(step)))
    return Extended(full(model), tuple(terms), names_classes=False, teachers={"pseudo": Teacher(keeps)})


WEAK = {
    "pool": lambda o, ctx: {"own": o["image_embedding"], "base": o.teacher("base")["image_embedding"]},
    "classes": lambda o, ctx: {"own": o["text_embedding"], "base": o["zero_shot"]},
}


def weak_labels(outputs, features, rows, ctx):
    """The cross-entropy of the pictures of the pool with the base model's zero-shot names."""
    images, texts = features["pool"], features["classes"]
    cosines = {who: jnp.matmul(images[who], texts[who].T, precision="highest") for who in images}
    labels = jnp.argmax(cosines["base"], axis=1)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs["scale"] * cosines["own"], labels)
    return jnp.mean(losses), {}


def sharpened(p: jax.Array, power: float = 2.0) -> jax.Array:
    """Returns p_ic^power / sum_j p_jc over its sum over classes, [B, C]: sharper, and rare classes count more."""
    raised = p**power / jnp.maximum(jnp.sum(p, axis=0), jnp.finfo(p.dtype).tiny)
    return raised / jnp.maximum(jnp.sum(raised, axis=1, keepdims=True), jnp.finfo(p.dtype).tiny)


def certainty(p: jax.Array) -> jax.Array:
    """Returns 1 - H(p) / log C of distributions [B, C]: 0 of the even one, 1 of a certain one."""
    return 1 + jnp.sum(jax.scipy.special.xlogy(p, p), axis=1) / jnp.log(p.shape[1])


def confident_divergence(log_p: jax.Array, y: jax.Array, weights: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the mean of weights * KL(y || p) over the rows that count; log_p and y float [B, C], others [B]."""
    divergence = jnp.sum(jax.scipy.special.xlogy(y, y) - y * log_p, axis=1)
    return jnp.sum(jnp.where(counts, weights * divergence, 0)) / jnp.maximum(jnp.sum(counts), 1)


def pair_margin(x: jax.Array, labels: jax.Array, counts: jax.Array, margin: float = 1.0) -> jax.Array:
    """Returns the mean over pairs of d^2 if both have one label, else of max(0, margin - d)^2; d = 1 - cos.

    Args:
      x: embeddings, unit norm, float [B, D].
      labels: int [B].
      counts: bool [B]; pairs of two rows that count.
      margin: of d.
    """
    distance = 1 - jnp.matmul(x, x.T, precision="highest")
    losses = jnp.where(labels[:, None] == labels, distance**2, jnp.maximum(margin - distance, 0) ** 2)
    pairs = counts[:, None] & counts & ~jnp.eye(len(x), dtype=bool)
    return jnp.sum(jnp.where(pairs, losses, 0)) / jnp.maximum(jnp.sum(pairs), 1)
