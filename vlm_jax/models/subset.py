"""A random share of each example's tokens: patches of a tower in training, tokens that a decoder sees."""

import jax
import jax.numpy as jnp


def subset(chance, keep, mask=None):
    """Returns the numbers of a random share of the tokens, in their order, and their mask.

    Args:
      chance: uniform draws [B, N]; tokens with the smallest ones stay.
      keep: the share; at least one token stays.
      mask: bool [B, N], False for padding, which follows the tokens; or None.

    Returns:
      integers [B, n], n = round(keep * N), and bool [B, n], False for tokens beyond an example's own share; None
      without a mask.
    """
    length = chance.shape[1]
    count = length if mask is None else mask.sum(1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(jnp.where(jnp.arange(length) < count, chance, 2.0)))  # padding comes last
    kept = jnp.sort(jnp.argsort(rank)[:, : max(round(keep * length), 1)])
    if mask is None:
        return kept, None
    return kept, jnp.take_along_axis(rank, kept, axis=1) < jnp.maximum(jnp.round(keep * count), 1)


def take(x, numbers):
    """Returns tokens by their numbers: [B, N, D], integers [B, n] -> [B, n, D]."""
    return jnp.take_along_axis(x, numbers[..., None], axis=1)


def of_keys(keys, length):
    """Returns uniform draws [B, N] by a key for each example, apart from what else the keys are used for."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (length,)))(keys)
