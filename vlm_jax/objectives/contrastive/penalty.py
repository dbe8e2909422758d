"""Penalties: how logits and positives become a loss.

Each penalty has two forms with equal results: one takes the logits [B, B], for small batches; the other uses
`kernels.contrastive.statistics`, which holds one block of the logits at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.kernels import contrastive as kernel


class Penalty(NamedTuple):
    """How logits and positives become a loss.

    Attributes:
      plain: (logits of images [B, B], logits of texts [B, B], positives bool [B, B]) -> scalar.
      of_pairs: (`Pairs`) -> (scalar, results of images, results of texts); results have `best_positive` and
        `best_negative`.
    """

    plain: Callable
    of_pairs: Callable


class Pairs(NamedTuple):
    """The parts of a batch's logits.

    Attributes:
      image, text: [B, D].
      scale, bias: scalars; the bias may be None.
      labels: int [B].
      identity: whether all labels differ: text i is the only positive of image i.
      mask: bool [B], the examples that count; None for all.
      implementation: the implementation of `kernels.contrastive`.
    """

    image: jax.Array
    text: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    identity: bool
    mask: jax.Array | None
    implementation: str | None

    def statistics(self, **options):
        """Returns `kernels.contrastive.statistics` with images in rows, texts in columns."""
        return kernel.statistics(
            self.image, self.text, self.scale, self.bias, x_labels=self.labels, y_labels=self.labels,
            x_mask=self.mask, y_mask=self.mask, implementation=self.implementation, best=True,
            **options,
        )  # fmt: skip

    def mean(self, values):
        """Returns the mean over the examples that count."""
        if self.mask is None:
            return jnp.mean(values)
        return jnp.sum(jnp.where(self.mask, values, 0)) / jnp.maximum(jnp.sum(self.mask), 1)

    def logits_of(self, x, y):
        """Returns the logits [B] of x_i and y_i [B, D], or of each x_i and one y [D]."""
        values = self.scale * jnp.sum(x.astype(self.scale.dtype) * y.astype(self.scale.dtype), axis=1)
        return values if self.bias is None else values + self.bias


@method(
    family="penalties",
    paper="arXiv:2103.00020",
    where="figure 3",
    differs="cross-entropy over the batch, in both directions",
)
def softmax(*, label_smoothing: float = 0.0) -> Callable:
    """Mean of the cross-entropies image -> texts and text -> images (CLIP, Radford et al. 2021, Figure 3).

    The target of a row or column is uniform over its positives (Khosla et al. 2020, arXiv:2004.11362, eq. 2, L_out).
    `label_smoothing` moves that share of the target to the uniform distribution over all.

    Over pairs: lse_i - (1 - e) (sum of positives' logits)_i / (number of positives)_i - e (mean of all logits)_i, where
    e is `label_smoothing`. The mean of all logits is the logit of x_i and the mean of y.
    """

    def cross_entropy(logits, positives, axis):
        target = positives / jnp.sum(positives, axis, keepdims=True, dtype=logits.dtype)
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[axis]
        return jnp.mean(jax.nn.logsumexp(logits, axis) - jnp.sum(target * logits, axis))

    def of_pairs(pairs):
        results = pairs.statistics(positives=not pairs.identity)
        own = pairs.logits_of(pairs.image, pairs.text) if pairs.identity else None
        count = jnp.asarray(len(pairs.image)) if pairs.mask is None else jnp.maximum(jnp.sum(pairs.mask), 1)
        counts = lambda z: z if pairs.mask is None else jnp.where(pairs.mask[:, None], z, 0)
        total = 0
        for result, (x, y) in zip(results, ((pairs.image, pairs.text), (pairs.text, pairs.image)), strict=True):
            positive = own if pairs.identity else result.positive_sum / jnp.maximum(result.positive_count, 1)
            value = result.lse - (1 - label_smoothing) * positive
            if label_smoothing:
                value -= label_smoothing * pairs.logits_of(counts(x), jnp.sum(counts(y), 0, pairs.scale.dtype) / count)
            total += pairs.mean(value)
        return 0.5 * total, *results

    def plain(of_images, of_texts, positives):
        return 0.5 * (cross_entropy(of_images, positives, 1) + cross_entropy(of_texts, positives, 0))

    return Penalty(plain, of_pairs)


@method(
    family="penalties", paper="arXiv:2303.15343", where="section 3.2", differs="every pair is right or wrong by itself"
)
def sigmoid() -> Callable:
    """-1/B sum_ij log sigmoid(s_ij x_ij), s = +1 for positives, else -1 (SigLIP, arXiv:2303.15343, Section 3.2)."""

    def plain(of_images, of_texts, positives):
        of_pairs = lambda logits: jax.nn.log_sigmoid(jnp.where(positives, logits, -logits))
        return -0.5 * jnp.mean(jnp.sum(of_pairs(of_images) + of_pairs(of_texts), axis=1))

    def of_pairs(pairs):
        images, texts = pairs.statistics(penalty="sigmoid")
        return pairs.mean(images.loss), images, texts

    return Penalty(plain, of_pairs)
