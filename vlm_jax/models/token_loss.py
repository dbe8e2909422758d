"""Cross-entropy over a vocabulary, computed in chunks to save memory."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenLoss(NamedTuple):
    """Per token [B, L], in the dtype of the logits.

    Attributes:
      loss: with label smoothing and z-loss.
      log_likelihood: log p(target).
      correct: 1.0 where the target has the largest logit.
    """

    loss: jax.Array
    log_likelihood: jax.Array
    correct: jax.Array


def token_loss(
    logits: Callable,
    hidden: jax.Array,
    targets: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 8,
) -> TokenLoss:
    """-(1 - e) log p(target) - e mean_v log p(v) + z (log sum_v exp logit_v)^2.

    Label smoothing: Szegedy et al. 2015 (arXiv:1512.00567, section 7); z-loss: Chowdhery et al. 2022 (arXiv:2204.02311,
    section 5). Logits of long texts are computed `chunk` positions at a time, and again for the gradient. Memory never
    holds [B, L, V].

    Args:
      logits: hidden [B, l, D] -> logits fp32 [B, l, V].
      hidden: [B, L, D].
      targets: integers [B, L].
      label_smoothing: e.
      z_loss: z.
      chunk: maximum number of positions at a time.
    """

    def some(hidden, targets):
        scores = logits(hidden)
        lse = jax.nn.logsumexp(scores, axis=-1)
        own = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
        loss = lse - own
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * (lse - jnp.mean(scores, axis=-1))
        if z_loss:
            loss = loss + z_loss * jnp.square(lse)
        correct = jnp.argmax(scores, axis=-1) == targets
        return TokenLoss(loss, own - lse, correct.astype(scores.dtype))

    return in_chunks(some, (hidden, targets), chunk)


def in_chunks(function: Callable, arrays: Sequence[jax.Array], chunk: int) -> Any:
    """Returns `function(*arrays)`, some positions at a time; its values are computed again for the gradient.

    Args:
      function: arrays [B, l, ...] -> tree of arrays [B, l], each position by itself.
      arrays: [B, L, ...].
      chunk: maximum number of positions at a time.
    """
    length = arrays[0].shape[1]
    count = -(-length // chunk)
    if count <= 1:
        return function(*arrays)
    chunk = -(-length // count)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, count * chunk - length), *((0, 0),) * (x.ndim - 2)))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(x.shape[0], count, chunk, *x.shape[2:]), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]
    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda piece: function(*piece)), tuple(map(cut, arrays))))
