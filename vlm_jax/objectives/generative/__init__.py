"""Generative objectives: a corruption of the text x a token loss.

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
from vlm_jax.objectives.generative.losses import caption_loss, of_captions, token_metrics
from vlm_jax.objectives.objective import WHERE, Objective, model_inputs


@method(
    family="objectives",
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
    pad_id: int = 0,
    chunk: int = 8,
) -> Objective:
    """Returns the objective of a `Captioner`, an `EncoderDecoder` or a `PrefixLM`.

    Args:
      model: linen module with the methods `hidden` and `logits` of `models.decoder.Conditional`.
      corruption: "causal", or a dict with the name and options, `dict(name="parallel", rate=0.75)`.
      denoisers: names of the denoisers that the op `denoise` draws from, for metrics of each denoiser;
        batch["denoiser"] holds their numbers.
      label_smoothing, z_loss, chunk: arguments of `token_loss`.
      mean: "caption": the mean over captions of the mean over a caption's tokens (Cap); "token": over all tokens (T5).
      pad_id: id of padding; these targets never count.

    Metrics: `token_accuracy`, and `perplexity`: exp of the mean cross-entropy of the tokens that count, without label
    smoothing and z-loss. Both also for each part of a mixture, e.g. `R/perplexity`; NaN if the batch has no such text.
    """
    corrupt = catalogue.build("corruptions", corruption, f"{WHERE}.corruption")
    if mean not in ("caption", "token"):
        raise UserError(f"{WHERE}.mean is `{mean}`; expected one of: caption, token")
    corrupt(jnp.zeros((1, 2), int), jnp.ones(1, int), model.decoder, jax.random.key(0))  # raises without a mask token
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


@method(
    family="objectives",
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
    pad_id: int = 0,
    chunk: int = 8,
) -> Objective:
    """Returns the `captioning` objective with texts as inputs; arguments and metrics as for `captioning`."""
    options = dict(label_smoothing=label_smoothing, z_loss=z_loss, mean=mean, pad_id=pad_id, chunk=chunk)
    return captioning(model=model, denoisers=denoisers, **options)
