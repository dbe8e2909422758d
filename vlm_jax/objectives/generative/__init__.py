"""Generative terms: a corruption of the text x a token loss.

Captioning is denoising with an image as the prefix. If the prefix is a text, as for T5, the data op `denoise` makes
inputs and targets, and the corruption is causal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import catalogue
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.token_loss import token_loss
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.generative.losses import caption_loss, of_captions, token_metrics
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    paper="arXiv:2306.07915",
    where="section 3",
    differs="the cross-entropy of a corrupted caption's tokens, given the picture",
    needs={"model.name": "captioner"},
)
def captioning(
    *,
    model: Any,
    corruption: str | Mapping[str, Any] = "causal",
    denoisers: Sequence[str] = (),
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mean: str = "caption",
    pad_id: int | None = None,
    chunk: int = 8,
) -> Term:
    """Returns the term of a model that writes: `Captioner`, `CoCa`, `EncoderDecoder`, `PrefixLM`.

    Args:
      model: linen module with the output `next_token` and the method `logits`; with another corruption than "causal",
        with the output `context` and the method `decode` of `models.decoder.Conditional`.
      corruption: "causal", or a dict with the name and options, `dict(name="parallel", rate=0.75)`.
      denoisers: names of the denoisers that the op `denoise` draws from, for metrics of each denoiser;
        batch["denoiser"] holds their numbers.
      label_smoothing, z_loss, chunk: arguments of `token_loss`.
      mean: "caption": the mean over captions of the mean over a caption's tokens (Cap); "token": over all tokens (T5).
      pad_id: id of padding, whose targets never count; the tokenizer's, which is the default.

    Metrics: `token_accuracy`, and `perplexity`: exp of the mean cross-entropy of the tokens that count, without label
    smoothing and z-loss. Both also for each part of a mixture, e.g. `R/perplexity`; NaN if the batch has no such text.
    """
    corrupt = None if corruption == "causal" else catalogue.build("corruptions", corruption, f"{WHERE}.corruption")
    if mean not in ("caption", "token"):
        raise UserError(f"{WHERE}.mean is `{mean}`; expected one of: caption, token")
    if corrupt is not None:
        if "context" not in model.outputs:
            raise UserError(f"{WHERE}.corruption: the decoder of a {type(model).__name__} reads causally; leave it out")
        corrupt(jnp.zeros((1, 2), int), jnp.ones(1, int), model.decoder, jax.random.split(jax.random.key(0), 1))
    kinds = tuple(denoisers) or getattr(corrupt, "kinds", ())

    def features(outputs, ctx):
        counts = kind = None
        special = ctx.special(pad_id)
        if corrupt is None:
            hidden, targets = outputs["next_token"]
        else:
            targets = outputs["token_ids"]
            keys = outputs.keys if ctx.train else None
            inputs, two_way, counts, kind = corrupt(
                targets, jnp.sum(is_text(targets, *special), 1), model.decoder, keys
            )
            context, mask = outputs["context"]
            options = dict(context_mask=mask, bidirectional=two_way)
            hidden = outputs.apply("decode", inputs, context, **options).hidden
        logits = lambda hidden: outputs.apply("logits", hidden)
        losses = token_loss(logits, hidden, targets, label_smoothing=label_smoothing, z_loss=z_loss, chunk=chunk)
        real = is_text(targets, *special)
        sums = of_captions(losses, real if counts is None else real & counts)
        return sums | ({"kind": outputs["denoiser"] if denoisers else kind} if kinds else {})

    def loss(outputs, features, rows, ctx):
        value, metrics = caption_loss(features, mean)
        for number, name in enumerate(kinds):
            metrics |= {
                f"{name}/{key}": part for key, part in token_metrics(features, features["kind"] == number).items()
            }
        return value, metrics

    return Term("captioning", features, loss)


@method(
    family="terms",
    paper="arXiv:2205.05131",
    where="section 3.1",
    differs="the cross-entropy of what the op `denoise` has hidden of a text",
    needs={"model.name": "encoder_decoder"},
)
def denoising(
    *,
    model: Any,
    denoisers: Sequence[str] = (),
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    mean: str = "caption",
    pad_id: int | None = None,
    chunk: int = 8,
) -> Term:
    """Returns the `captioning` term with texts as inputs; arguments and metrics as for `captioning`."""
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss, mean=mean, pad_id=pad_id, chunk=chunk)
    return captioning(model=model, denoisers=denoisers, **options)
