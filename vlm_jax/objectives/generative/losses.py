"""Losses and metrics of captions, from sums over their tokens."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vlm_jax.models.token_loss import TokenLoss


def of_captions(losses: TokenLoss, counts: jax.Array) -> dict[str, jax.Array]:
    """Returns each caption's sums over tokens where `counts` [B, L] is True, and `tokens`, their number; fp32 [B]."""
    sums = {name: jnp.sum(jnp.where(counts, values, 0), axis=1) for name, values in losses._asdict().items()}
    return sums | {"tokens": jnp.sum(counts, axis=1).astype(jnp.float32)}


def caption_loss(features: Mapping[str, jax.Array], mean: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (loss, metrics) from the result of `of_captions`; see `captioning` for `mean`."""
    tokens = features["tokens"]
    if mean == "caption":
        value = jnp.mean(features["loss"] / jnp.maximum(tokens, 1))
    else:
        value = jnp.sum(features["loss"]) / jnp.maximum(jnp.sum(tokens), 1)
    return value, token_metrics(features, tokens > 0)


def mean_loss(features: Mapping[str, jax.Array], mean: str) -> jax.Array:
    """Returns the loss of the captions with tokens that count, from the result of `of_captions`; 0 without one."""
    tokens = features["tokens"]
    if mean == "token":
        return jnp.sum(features["loss"]) / jnp.maximum(jnp.sum(tokens), 1)
    return jnp.sum(features["loss"] / jnp.maximum(tokens, 1)) / jnp.maximum(jnp.sum(tokens > 0), 1)


def token_metrics(features: Mapping[str, jax.Array], of: jax.Array) -> dict[str, jax.Array]:
    """Returns accuracy and perplexity over the tokens of chosen captions, `of`: bool [B]; NaN without tokens."""
    total = lambda name: jnp.sum(jnp.where(of, features[name], 0))
    tokens = total("tokens")
    perplexity = jnp.exp(-total("log_likelihood") / tokens)
    return {"token_accuracy": total("correct") / tokens, "perplexity": perplexity}
