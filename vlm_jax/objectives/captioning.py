"""Captioning: a corruption of the caption x a token loss.

A corruption says what the decoder sees of a caption, and which of its tokens count; the loss is the cross-entropy of
these. Captioning is denoising with an image for a prefix.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.token_loss import TokenLoss, token_loss
from vlm_jax.objectives.objective import WHERE, Objective, check_batch


class Corrupted(NamedTuple):
    """What the decoder gets.

    Attributes:
      inputs: integers [B, L].
      bidirectional: bool [B, L], inputs that all positions see; None where every input is seen by later ones only.
      counts: bool [B, L], tokens whose prediction counts, or None for all.
    """

    inputs: jax.Array
    bidirectional: jax.Array | None = None
    counts: jax.Array | None = None


def causal() -> Callable:
    """Each token given all before it (Cap)."""
    return lambda targets, lengths, decoder, rng: Corrupted(shift_right(targets, decoder.start_id))


def parallel(*, rate: float = 0.75, ratio: float = 1.0) -> Callable:
    """With probability `rate` all of a caption's tokens at once, else causal (CapPa, arXiv:2306.07915, section 3.2).

    A caption's inputs are then mask tokens that see each other; with `ratio` below 1 each is, with probability
    1 - ratio, the token itself. Without randomness (evaluation): causal.
    """

    def corrupt(targets, lengths, decoder, rng):
        if rng is None:
            return causal()(targets, lengths, decoder, rng)
        of_caption, of_token = jax.random.split(rng)
        at_once = jax.random.bernoulli(of_caption, rate, (len(targets), 1))
        hidden = jnp.full_like(targets, decoder.mask_id)
        if ratio < 1:
            hidden = jnp.where(jax.random.bernoulli(of_token, ratio, targets.shape), hidden, targets)
        shown = jnp.where(at_once, hidden, shift_right(targets, decoder.start_id))
        return Corrupted(shown, jnp.broadcast_to(at_once, targets.shape))

    return corrupt


def prefix(*, rate: float | None = None) -> Callable:
    """The first tokens are seen by all and do not count, the rest is causal (SimVLM, arXiv:2108.10904, section 3.1).

    The prefix is `rate` of the tokens; None draws its length from 0 up, uniformly. At least one token counts.
    """

    def corrupt(targets, lengths, decoder, rng):
        share = rate
        if share is None:
            share = 0.0 if rng is None else jax.random.uniform(rng, lengths.shape)
        cut = jnp.minimum((share * lengths).astype(lengths.dtype), jnp.maximum(lengths - 1, 0))[:, None]
        at = jnp.arange(targets.shape[1])
        return Corrupted(shift_right(targets, decoder.start_id), at <= cut, at >= cut)  # input i + 1 is token i

    return corrupt


def masked_spans(*, rate: float = 0.5, mean_span: float = 3.0) -> Callable:
    """Spans of tokens are mask tokens, all inputs see each other, and what is masked counts.

    Each token begins a span with a probability that makes the expected share of masked tokens `rate`; spans have
    geometric lengths (SpanBERT, arXiv:1907.10529, section 3.1). A caption of which nothing is masked has its last token
    masked. Without randomness: causal.
    """
    if not 0 < rate < 1 or mean_span < 1:
        raise UserError(f"{WHERE}.corruption masked_spans: rate in (0, 1) and mean_span >= 1; got {rate}, {mean_span}")
    leave = 1.0 / mean_span
    enter = leave * rate / (1 - rate)  # of the two-state chain whose stationary share of "masked" is `rate`
    if enter > 1:
        raise UserError(f"{WHERE}.corruption masked_spans: rate {rate} needs spans longer than {mean_span}")

    def corrupt(targets, lengths, decoder, rng):
        if rng is None:
            return causal()(targets, lengths, decoder, rng)
        draws = jax.random.uniform(rng, (targets.shape[1] + 1, len(targets)))

        def step(inside, u):
            inside = jnp.where(inside, u >= leave, u < enter)
            return inside, inside

        _, masked = jax.lax.scan(step, draws[0] < rate, draws[1:])
        at, masked = jnp.arange(targets.shape[1]), masked.T
        real = at < lengths[:, None]
        masked = masked & real
        masked = masked | ((at == lengths[:, None] - 1) & ~jnp.any(masked, axis=1, keepdims=True))
        return Corrupted(jnp.where(masked, decoder.mask_id, targets), jnp.ones_like(masked), masked)

    return corrupt


CORRUPTIONS = {"causal": causal, "parallel": parallel, "prefix": prefix, "masked_spans": masked_spans}


def captioning(
    *,
    model: Any,
    mesh: Any = None,
    corruption: str | Mapping[str, Any] = "causal",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mean: str = "caption",
    pad_id: int = 0,
    chunk: int = 8,
) -> Objective:
    """An objective on a `Captioner`.

    Args:
      model: linen module with the methods `hidden` and `logits` of `models.Captioner`.
      corruption: "causal", or a dict with the name and options, `dict(name="parallel", rate=0.75)`.
      label_smoothing, z_loss, chunk: of `token_loss`.
      mean: "caption": the mean over captions of the mean over a caption's tokens (Cap); "token": over all tokens.
      pad_id: id of the targets that never count.

    Metrics: `token_accuracy`, and `perplexity`, exp of the mean cross-entropy of a token that counts, without label
    smoothing and z-loss.
    """
    del mesh
    corrupt = config.part(CORRUPTIONS, corruption, f"{WHERE}.corruption")
    if mean not in ("caption", "token"):
        raise UserError(f"{WHERE}.mean is `{mean}`; expected one of: caption, token")
    corrupt(jnp.zeros((1, 2), int), jnp.ones(1, int), model.decoder, jax.random.key(0))  # it may need a mask token

    def encode(params, batch, rng):
        check_batch(batch)
        targets = batch["token_ids"]
        real = targets != pad_id
        rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, 1)}
        inputs, bidirectional, counts = corrupt(targets, jnp.sum(real, axis=1), model.decoder, rng)
        hidden = model.apply(
            {"params": params}, batch["image"], inputs, bidirectional=bidirectional, train=rng is not None,
            rngs=rngs, method="hidden",
        )  # fmt: skip
        logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
        losses = token_loss(logits, hidden, targets, label_smoothing=label_smoothing, z_loss=z_loss, chunk=chunk)
        return of_captions(losses, real if counts is None else real & counts)

    return Objective(encode, lambda params, features, batch: caption_loss(features, mean))


def of_captions(losses: TokenLoss, counts: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens that count, bool [B, L], of each caption: fp32 [B] each, and their number `tokens`."""
    sums = {name: jnp.sum(jnp.where(counts, values, 0), axis=1) for name, values in losses._asdict().items()}
    return sums | {"tokens": jnp.sum(counts, axis=1).astype(jnp.float32)}


def caption_loss(features: Mapping[str, jax.Array], mean: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of what `of_captions` returned; see `captioning`."""
    tokens = jnp.maximum(jnp.sum(features["tokens"]), 1)
    if mean == "caption":
        value = jnp.mean(features["loss"] / jnp.maximum(features["tokens"], 1))
    else:
        value = jnp.sum(features["loss"]) / tokens
    perplexity = jnp.exp(-jnp.sum(features["log_likelihood"]) / tokens)
    return value, {"token_accuracy": jnp.sum(features["correct"]) / tokens, "perplexity": perplexity, "loss": value}
