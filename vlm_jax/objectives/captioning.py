"""Captioning and denoising: a corruption of the text x a token loss.

A corruption says what the decoder sees of a caption, and which of its tokens count; the loss is the cross-entropy of
these. Captioning is denoising with an image for a prefix. Where the prefix is a text, as for T5, the data op `denoise`
has made inputs and targets of it, and what is left is causal.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.token_loss import TokenLoss, token_loss
from vlm_jax.objectives.objective import WHERE, Objective, model_inputs


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


def mixture(*, of: Mapping[str, tuple[Any, float]]) -> Callable:
    """Each caption by one of several corruptions, drawn by their weights: UL2 with a picture for a prefix.

    `of` has their names: `dict(S=("causal", 2), X=(dict(name="parallel", rate=1.0), 1))`. Without randomness: causal.
    """
    if not of or min(weight for _, weight in of.values()) <= 0:
        raise UserError(f"{WHERE}.corruption mixture: of={dict(of)}; expected name=(corruption, weight above 0)")
    parts = [config.part(CORRUPTIONS, part, f"{WHERE}.corruption.of.{name}") for name, (part, _) in of.items()]
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


CORRUPTIONS = {
    "causal": causal,
    "parallel": parallel,
    "prefix": prefix,
    "masked_spans": masked_spans,
    "mixture": mixture,
}


def captioning(
    *,
    model: Any,
    mesh: Any = None,
    corruption: str | Mapping[str, Any] = "causal",
    denoisers: Sequence[str] = (),
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mean: str = "caption",
    pad_id: int = 0,
    chunk: int = 8,
) -> Objective:
    """An objective on a `Captioner`, an `EncoderDecoder` or a `PrefixLM`.

    Args:
      model: linen module with the methods `hidden` and `logits` of `models.decoder.Conditional`.
      corruption: "causal", or a dict with the name and options, `dict(name="parallel", rate=0.75)`.
      denoisers: names of those that the op `denoise` has drawn from, for metrics of each: batch["denoiser"] are their
        numbers.
      label_smoothing, z_loss, chunk: of `token_loss`.
      mean: "caption": the mean over captions of the mean over a caption's tokens (Cap); "token": over all tokens (T5).
      pad_id: id of the targets that never count.

    Metrics: `token_accuracy`, and `perplexity`, exp of the mean cross-entropy of a token that counts, without label
    smoothing and z-loss; both also of each part of a mixture, `R/perplexity`, NaN where the batch has none.
    """
    del mesh
    corrupt = config.part(CORRUPTIONS, corruption, f"{WHERE}.corruption")
    if mean not in ("caption", "token"):
        raise UserError(f"{WHERE}.mean is `{mean}`; expected one of: caption, token")
    corrupt(jnp.zeros((1, 2), int), jnp.ones(1, int), model.decoder, jax.random.key(0))  # it may need a mask token
    kinds = tuple(denoisers) or getattr(corrupt, "kinds", ())

    def encode(params, batch, rng):
        given, targets = model_inputs(batch)
        real = targets != pad_id
        rngs = None if rng is None else {"dropout": jax.random.fold_in(rng, 1)}
        inputs, bidirectional, counts, kind = corrupt(targets, jnp.sum(real, axis=1), model.decoder, rng)
        hidden = model.apply(
            {"params": params}, given, inputs, bidirectional=bidirectional, train=rng is not None,
            rngs=rngs, method="hidden",
        )  # fmt: skip
        logits = lambda hidden: model.apply({"params": params}, hidden, method="logits")
        losses = token_loss(logits, hidden, targets, label_smoothing=label_smoothing, z_loss=z_loss, chunk=chunk)
        sums = of_captions(losses, real if counts is None else real & counts)
        return sums | ({"kind": batch["denoiser"] if denoisers else kind} if kinds else {})

    def loss(params, features, batch):
        value, metrics = caption_loss(features, mean)
        for number, name in enumerate(kinds):
            metrics |= {
                f"{name}/{key}": part for key, part in token_metrics(features, features["kind"] == number).items()
            }
        return value, metrics

    return Objective(encode, loss)


def of_captions(losses: TokenLoss, counts: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens that count, bool [B, L], of each caption: fp32 [B] each, and their number `tokens`."""
    sums = {name: jnp.sum(jnp.where(counts, values, 0), axis=1) for name, values in losses._asdict().items()}
    return sums | {"tokens": jnp.sum(counts, axis=1).astype(jnp.float32)}


def caption_loss(features: Mapping[str, jax.Array], mean: str) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of what `of_captions` returned; see `captioning`."""
    tokens = features["tokens"]
    if mean == "caption":
        value = jnp.mean(features["loss"] / jnp.maximum(tokens, 1))
    else:
        value = jnp.sum(features["loss"]) / jnp.maximum(jnp.sum(tokens), 1)
    return value, {**token_metrics(features, tokens > 0), "loss": value}


def token_metrics(features: Mapping[str, jax.Array], of: jax.Array) -> dict[str, jax.Array]:
    """Accuracy and perplexity of the tokens of some captions, bool [B]; NaN where these have none."""
    total = lambda name: jnp.sum(jnp.where(of, features[name], 0))
    tokens = total("tokens")
    perplexity = jnp.exp(-total("log_likelihood") / tokens)
    return {"token_accuracy": total("correct") / tokens, "perplexity": perplexity}
