"""Corruptions: the decoder's inputs for a caption, and the tokens that count in the loss.

A corruption is `corrupt(targets [B, L], lengths [B], decoder, keys [B]) -> Corrupted`; keys are None in evaluation.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.objectives.term import WHERE


class Corrupted(NamedTuple):
    """The decoder's inputs and loss mask.

    Attributes:
      inputs: integers [B, L].
      bidirectional: bool [B, L], inputs that all positions see; None: attention is causal.
      counts: bool [B, L], tokens that count in the loss; None for all.
      kind: integers [B], for a mixture: the number of the part that corrupted the caption.
    """

    inputs: jax.Array
    bidirectional: jax.Array | None = None
    counts: jax.Array | None = None
    kind: jax.Array | None = None


@method(family="corruptions", paper="arXiv:2306.07915", where="section 3.1", differs="each token given all before it")
def causal() -> Callable:
    """Predicts each token from all tokens before (Cap)."""
    return lambda targets, lengths, decoder, keys: Corrupted(shift_right(targets, decoder.start_id))


@method(
    family="corruptions",
    paper="arXiv:2306.07915",
    where="section 3.2",
    differs="most captions are predicted all at once, from the picture alone",
)
def parallel(*, rate: float = 0.75, ratio: float = 1.0) -> Callable:
    """Predicts all tokens of a caption at once with probability `rate`, else causally.

    CapPa (arXiv:2306.07915, section 3.2). For prediction at once the inputs are mask tokens that see each other. With
    `ratio` below 1, each input is the token itself with probability 1 - ratio. Without randomness (evaluation): causal.
    """

    def corrupt(targets, lengths, decoder, keys):
        if keys is None:
            return causal()(targets, lengths, decoder, keys)
        of_caption, of_tokens = _split(keys, 2)
        at_once = jax.vmap(lambda key: jax.random.bernoulli(key, rate, (1,)))(of_caption)
        hidden = jnp.full_like(targets, decoder.mask_id)
        if ratio < 1:
            drawn = jax.vmap(lambda key: jax.random.bernoulli(key, ratio, targets.shape[1:]))(of_tokens)
            hidden = jnp.where(drawn, hidden, targets)
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
    """Gives the first tokens as a prefix, and predicts the rest causally (SimVLM, arXiv:2108.10904, section 3.1).

    All positions see the prefix; its tokens do not count. The prefix is `rate` of the tokens; None draws the length
    uniformly, from 0. At least one token counts.
    """

    def corrupt(targets, lengths, decoder, keys):
        share = rate
        if share is None:
            share = 0.0 if keys is None else jax.vmap(jax.random.uniform)(keys)
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
    """Masks spans of tokens; all inputs see each other, and only masked tokens count.

    The probability that a token begins a span makes the expected share of masked tokens `rate`. Spans have geometric
    lengths (SpanBERT, arXiv:1907.10529, section 3.1). If a draw masks nothing, the caption's last token is masked.
    Without randomness: causal.
    """
    if not 0 < rate < 1 or mean_span < 1:
        raise UserError(f"{WHERE}.corruption masked_spans: rate in (0, 1) and mean_span >= 1; got {rate}, {mean_span}")
    leave = 1.0 / mean_span
    enter = leave * rate / (1 - rate)  # a two-state chain with the stationary share `rate` of "masked"
    if enter > 1:
        raise UserError(f"{WHERE}.corruption masked_spans: rate {rate} needs spans longer than {mean_span}")

    def corrupt(targets, lengths, decoder, keys):
        if keys is None:
            return causal()(targets, lengths, decoder, keys)
        draws = jax.vmap(lambda key: jax.random.uniform(key, targets.shape[1] + 1))(keys).T

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
    """Draws one of several corruptions for each caption, by weights: UL2 with a picture as the prefix.

    `of` maps names to (corruption, weight): `dict(S=("causal", 2), X=(dict(name="parallel", rate=1.0), 1))`. Without
    randomness: causal.
    """
    if not of or min(weight for _, weight in of.values()) <= 0:
        raise UserError(f"{WHERE}.corruption mixture: of={dict(of)}; expected name=(corruption, weight above 0)")
    parts = [catalogue.build("corruptions", part, f"{WHERE}.corruption.of.{name}") for name, (part, _) in of.items()]
    log_weights = jnp.log(jnp.asarray([weight for _, weight in of.values()], jnp.float32))

    def corrupt(targets, lengths, decoder, keys):
        if keys is None:
            return causal()(targets, lengths, decoder, keys)._replace(kind=jnp.full(len(targets), -1))
        draw, *others = _split(keys, len(parts) + 1)
        kind = jax.vmap(lambda key: jax.random.categorical(key, log_weights))(draw)
        results = [part(targets, lengths, decoder, keys) for part, keys in zip(parts, others, strict=True)]
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


def _split(keys: jax.Array, count: int) -> jax.Array:
    """Returns keys [count, B] of keys [B]."""
    return jnp.swapaxes(jax.vmap(lambda key: jax.random.split(key, count))(keys), 0, 1)
