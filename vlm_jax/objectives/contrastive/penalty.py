"""Penalties: how logits and targets become a loss.

A penalty takes all logits. `softmax` and `sigmoid` also have a form with equal results that uses
`kernels.contrastive.statistics` and holds one block of the logits at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.kernels import contrastive as kernel

HIDDEN = -1e30
"""The logit of a candidate that does not count."""


class Penalty(NamedTuple):
    """How logits and targets become a loss.

    Attributes:
      plain: (logits of images [B, M], logits of texts [M', B], targets of images [B, M], of texts [M', B]) -> scalar.
        Images stand in rows, texts in columns; the first B candidates of each are the batch's own. Targets are bool, or
        weights of at least 0. Logits of candidates that do not count are `HIDDEN`.
      of_pairs: (`Pairs`) -> (scalar, results of images, results of texts); results have `best_positive` and
        `best_negative`. None: the penalty needs all logits.
      one_matrix: whether `of_pairs` needs one matrix of logits for both directions.
      hard: whether a pair must match or not: a weight between 0 and 1 has no meaning.
    """

    plain: Callable
    of_pairs: Callable | None = None
    one_matrix: bool = False
    hard: bool = False


class Pairs(NamedTuple):
    """The parts of a batch's logits.

    Attributes:
      image, text: [B, D].
      texts, images: candidates [M, D], [M', D]; the first B are the batch's own. images None: `image`.
      scale, bias: scalars; the bias may be None.
      labels: int [B].
      identity: whether all labels differ: text i is the only positive of image i.
      mask: bool [B], the examples that count; None for all.
      text_mask, image_mask: bool [M], [M'], the candidates that count; None for all.
      text_rows, image_rows: int [M - B], [M' - B], see `Candidates`.
      implementation: the implementation of `kernels.contrastive`.
    """

    image: jax.Array
    text: jax.Array
    texts: jax.Array
    images: jax.Array | None
    scale: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    identity: bool
    mask: jax.Array | None
    text_mask: jax.Array | None
    image_mask: jax.Array | None
    text_rows: jax.Array | None
    image_rows: jax.Array | None
    implementation: str | None

    def statistics(self, **options):
        """Returns the results of images and of texts of `kernels.contrastive.statistics`."""
        of_images, of_texts = self._statistics(self.image, self.texts, self.text_mask, self.text_rows, options)
        if self.images is not None:
            return of_images, self._statistics(self.text, self.images, self.image_mask, self.image_rows, options)[0]
        return of_images, of_texts if len(self.texts) == len(self.text) else of_texts._replace(
            **{name: None if one is None else one[: len(self.text)] for name, one in of_texts._asdict().items()}
        )

    def _statistics(self, x, y, y_mask, y_rows, options):
        new = jnp.full(len(y) - len(x), jnp.min(self.labels) - 1, self.labels.dtype)
        new = new if y_rows is None else jnp.where(y_rows < 0, new, jnp.asarray(self.labels)[y_rows])
        labels = jnp.concatenate([self.labels, new]) if len(new) else self.labels
        return kernel.statistics(
            x, y, self.scale, self.bias, x_labels=self.labels, y_labels=labels, x_mask=self.mask, y_mask=y_mask,
            implementation=self.implementation, best=True, **options,
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
def softmax(*, label_smoothing: float = 0.0) -> Penalty:
    """Mean of the cross-entropies image -> texts and text -> images (CLIP, Radford et al. 2021, Figure 3).

    The target of a row or column is its weights divided by their sum: uniform over its positives (Khosla et al. 2020,
    arXiv:2004.11362, eq. 2, L_out). `label_smoothing` moves that share of the target to the uniform distribution over
    all candidates.

    Over pairs: lse_i - (1 - e) (sum of positives' logits)_i / (number of positives)_i - e (mean of all logits)_i, where
    e is `label_smoothing`. The mean of all logits is the logit of x_i and the mean of y.
    """

    def cross_entropy(logits, targets, axis):
        target = targets / jnp.sum(targets, axis, keepdims=True, dtype=logits.dtype)
        if label_smoothing:
            counts = logits > HIDDEN / 2
            target = (1 - label_smoothing) * target + label_smoothing * counts / jnp.sum(counts, axis, keepdims=True)
        return jnp.mean(jax.nn.logsumexp(logits, axis) - jnp.sum(target * logits, axis))

    def of_pairs(pairs):
        results = pairs.statistics(positives=not pairs.identity)
        texts, images = pairs.texts, pairs.image if pairs.images is None else pairs.images
        sides = ((pairs.image, texts, pairs.text_mask), (pairs.text, images, pairs.image_mask))
        total = 0
        for result, (x, y, mask) in zip(results, sides, strict=True):
            own = pairs.logits_of(x, y[: len(x)]) if pairs.identity else None
            positive = own if pairs.identity else result.positive_sum / jnp.maximum(result.positive_count, 1)
            value = result.lse - (1 - label_smoothing) * positive
            if label_smoothing:
                mask = pairs.mask if mask is None else mask
                count = len(y) if mask is None else jnp.maximum(jnp.sum(mask), 1)
                counted = y if mask is None else jnp.where(mask[:, None], y, 0)
                value -= label_smoothing * pairs.logits_of(x, jnp.sum(counted, 0, pairs.scale.dtype) / count)
            total += pairs.mean(value)
        return 0.5 * total, *results

    def plain(of_images, of_texts, targets_of_images, targets_of_texts):
        return 0.5 * (cross_entropy(of_images, targets_of_images, 1) + cross_entropy(of_texts, targets_of_texts, 0))

    return Penalty(plain, of_pairs)


@method(
    family="penalties", paper="arXiv:2303.15343", where="section 3.2", differs="every pair is right or wrong by itself"
)
def sigmoid() -> Penalty:
    """-1/B sum_ij log sigmoid(s_ij x_ij), s = +1 for positives, else -1 (SigLIP, arXiv:2303.15343, Section 3.2).

    A weight w between 0 and 1 is the probability that the pair matches: w log sigmoid(x) + (1 - w) log sigmoid(-x).
    """

    def of_each(logits, targets):
        if targets.dtype == bool:
            return jax.nn.log_sigmoid(jnp.where(targets, logits, -logits))
        return targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)

    def of_pairs(pairs):
        images, texts = pairs.statistics(penalty="sigmoid")
        return pairs.mean(images.loss), images, texts

    return Penalty(_over_pairs(of_each), of_pairs, one_matrix=True)


@method(
    family="penalties",
    paper="arXiv:1912.06430",
    where="equation 1",
    differs="one positive of several suffices: their probabilities are summed",
)
def any_positive() -> Penalty:
    """Mean of -log of the positives' probability, image -> texts and text -> images (MIL-NCE, Miech et al. 2020).

        -log (sum of exp(l_ij) over positives j / sum of exp(l_ij) over all candidates j)

    With one positive each: `softmax`, whose target is uniform over several.
    """

    def directed(logits, targets, axis):
        own = jax.nn.logsumexp(jnp.where((targets > 0) & (logits > HIDDEN / 2), logits, 2 * HIDDEN), axis)
        return jnp.mean(jax.nn.logsumexp(logits, axis) - own)

    return Penalty(lambda *given: 0.5 * (directed(*given[0::2], axis=1) + directed(*given[1::2], axis=0)), hard=True)


@method(
    family="penalties",
    paper="arXiv:1708.02002",
    where="section 3.2",
    differs="pairs that are told apart already count less",
)
def focal(*, gamma: float = 2.0) -> Penalty:
    """The cross-entropies of `softmax`, each times (1 - p)^gamma, where p is the probability of the positives.

    The focal loss (Lin et al. 2017, equation 4) on the softmax over all candidates. Of weights w between 0 and 1,
    1 - p is sum_j (1 - w_j) p_j. With gamma 0: `softmax`.
    """

    def directed(logits, targets, axis):
        target = targets / jnp.sum(targets, axis, keepdims=True, dtype=logits.dtype)
        log_p = jax.nn.log_softmax(logits, axis)
        own = jnp.sum(jnp.where(target == 0, 0, target * log_p), axis)
        rest = jnp.sum((1 - targets.astype(logits.dtype)) * jnp.exp(log_p), axis)
        return -jnp.mean(rest**gamma * own if gamma else own)

    return Penalty(lambda *given: 0.5 * (directed(*given[0::2], axis=1) + directed(*given[1::2], axis=0)))


@method(
    family="penalties",
    paper="arXiv:1707.05612",
    differs="a positive has to be above the hardest negative by a margin",
)
def margin(*, margin: float = 0.2, hardest: bool = True) -> Penalty:
    """max(0, margin + s_negative - s_positive), of the logits without softmax (VSE++, Faghri et al. 2018).

    `hardest` takes each row's and column's largest negative; otherwise the hinges of all negatives are summed. With
    several positives, the smallest counts. Logits are scale x cosine: a margin of 0.2 of cosines needs the scale 1.
    """

    def directed(logits, targets, axis):
        positive = jnp.min(logits, axis, keepdims=True, initial=jnp.inf, where=targets > 0)
        hinge = jnp.where(targets > 0, 0, jnp.maximum(0, margin + logits - positive))
        return jnp.mean(jnp.max(hinge, axis) if hardest else jnp.sum(hinge, axis))

    return Penalty(lambda *given: directed(*given[0::2], axis=1) + directed(*given[1::2], axis=0), hard=True)


def _over_pairs(of_each: Callable) -> Callable:
    """Returns the `plain` of a penalty of single pairs: minus the sum over each image's and text's pairs, by B.

    The batch's own pairs have two logits, which are averaged; pairs with other candidates have one.
    """

    def plain(of_images, of_texts, targets_of_images, targets_of_texts):
        size = len(of_images)
        images, texts = of_each(of_images, targets_of_images), of_each(of_texts, targets_of_texts)
        value = -0.5 * jnp.mean(jnp.sum(images[:, :size] + texts[:size], axis=1))
        for others in (images[:, size:], texts[size:].T):
            value = value - jnp.sum(others) / size if others.size else value
        return value

    return plain
