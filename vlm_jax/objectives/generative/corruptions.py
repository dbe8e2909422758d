"""Corruptions: what the decoder sees of a caption, and which of its tokens count."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.objectives.objective import WHERE


class Corrupted(NamedTuple):
    """What the decoder gets.

    Attributes:
      inputs: integers [B, L].
      bidirectional: bool [B, L], inputs that all positions see; None where every input is seen by later ones only.
      counts: bool [B, L], tokens whose prediction counts, or None for all.
      kind: integers [B], of a mixture: by which of its parts.
    """

    inputs: jax.Array
    bidirectional: jax.Array | None = None
    counts: jax.Array | None = None
    kind: jax.Array | None = None


@method(family="corruptions", paper="arXiv:2306.07915", where="section 3.1", differs="each token given all before it")
def causal() -> Callable:
    """Each token given all before it (Cap)."""
    return lambda targets, lengths, decoder, rng: Corrupted(shift_right(targets, decoder.start_id))


@method(
    family="corruptions",
    paper="arXiv:2306.07915",
    where="section 3.2",
    differs="most captions are predicted all at once, from the picture alone",
)
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


@method(
    family="corruptions",
    paper="arXiv:2108.10904",
    where="section 3.1",
    differs="the first tokens are given, the others are predicted",
)
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


@method(
    family="corruptions",
    paper="arXiv:1907.10529",
    where="section 3.1",
    differs="spans of tokens are masked and predicted",
)
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


@method(
    family="corruptions",
    paper="arXiv:2205.05131",
    where="section 3.1",
    differs="each caption by one of several corruptions",
    needs={"objective.corruption.of": {"S": ("causal", 2), "X": ("parallel", 1)}},
)
def mixture(*, of: Mapping[str, tuple[Any, float]]) -> Callable:
    """Each caption by one of several corruptions, drawn by their weights: UL2 with a picture for a prefix.

    `of` has their names: `dict(S=("causal", 2), X=(dict(name="parallel", rate=1.0), 1))`. Without randomness: causal.
    """
    if not of or min(weight for _, weight in of.values()) <= 0:
        raise UserError(f"{WHERE}.corruption mixture: of={dict(of)}; expected name=(corruption, weight above 0)")
    parts = [catalogue.build("corruptions", part, f"{WHERE}.corruption.of.{name}") for name, (part, _) in of.items()]
    log_weights = jnp.log(jnp.asarray([weight for _, weight in of.values()], jnp.float32))

    def corrupt(targets, lengths, decoder, rng):
        if rng is None:
            return causal()(targets, lengths, decoder, rng)._replace(kind=jnp.full(len(targets), -1))
        draw, *rngs = jax.random.split(rng, len(parts) + 1)
        kind = jax.random.categorical(draw, log_weights, shape=(len(targets),))
        results = [part(targets, lengths, decoder, rng) for part, rng in zip(parts, rngs, strict=True)]
        drawn = lambda arrays: jax.lax.select_n(jnp.broadcast_to(kind[:, None], targets.shape), *arrays)
        whole = lambda array, value: (
            jnp.full(targets.shape, value) if array is None else jnp.broadcast_to(array, targets.shape)
        )
        return Corrupted(
            drawn([result.inputs for result in results]),
            drawn([whole(result.bidirectional, False) for result in results]),
            drawn([whole(result.counts, True) for result in results]),
            kind,
        )

    corrupt.kinds = tuple(of)
    return corrupt
