"""Several texts of a picture by one decoder: its caption, the box of a phrase, the phrase of a box."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import catalogue, config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.token_loss import token_loss
from vlm_jax.objectives.generative.losses import mean_loss, of_captions, token_metrics
from vlm_jax.objectives.outputs import fold
from vlm_jax.objectives.term import WHERE, Term

TASKS = {"cap": {"corruption": {"name": "parallel", "rate": 0.5}}, "aref": {}, "gcap": {}}
"""SigLIP 2 (arXiv:2502.14786), section 2.2: half of the captions are predicted at once."""


@method(
    family="terms",
    system="LocCa",
    paper="arXiv:2403.19596",
    differs="captions, boxes of phrases and phrases of boxes by one decoder",
    needs={"model.name": "two_tower_captioner"},
)
def locca(
    *, model: Any, tasks: Mapping[str, Mapping[str, Any]] | None = None, mean: str = "caption", chunk: int = 8
) -> Term:
    """The sum over tasks of the cross-entropy of a text's tokens, given the picture and a prompt (Wan et al. 2024).

        sum_task weight_task mean_i -1/|C_i| sum_(t in C_i) log p(y_it | y_i<t, x_i)

    C_i are the tokens of example i that count. The data op `prompted` makes the texts: `<task>_token_ids`, int [B, L],
    and `<task>_counts`, bool [B, L]. All tasks are predicted for each picture; a picture without the text of a task,
    whose tokens do not count, is left out of the task's mean.

    Args:
      model: linen module with the output `context`, and `decode` and `logits` of `models.decoder.Conditional`.
      tasks: {name: dict(corruption="causal", weight=1.0)}, see the family "corruptions"; defaults to `TASKS`.
      mean: "caption": the mean over texts of the mean over a text's tokens; "token": over all tokens.
      chunk: see `token_loss`.

    Metrics: of each task `<task>/loss`, `<task>/token_accuracy`, `<task>/perplexity`; NaN without such a text.
    """
    if mean not in ("caption", "token"):
        raise UserError(f"{WHERE}.mean is `{mean}`; expected one of: caption, token")
    if "context" not in model.outputs:
        raise UserError(f"{WHERE}: a {type(model).__name__} has no decoder that attends to pictures: model.name")
    read = lambda name, options: config.call(_task, options, f"{WHERE}.tasks.{name}", name=name)
    parts = {name: read(name, options) for name, options in (TASKS if tasks is None else tasks).items()}
    for corrupt, _ in parts.values():  # a decoder without a mask token is named now
        corrupt(jnp.zeros((1, 2), int), jnp.ones(1, int), model.decoder, jax.random.split(jax.random.key(0), 1))
    if not parts:
        raise UserError(f"{WHERE}.tasks is empty; expected names of texts, such as {', '.join(TASKS)}")

    def features(outputs, ctx):
        context, mask = outputs["context"]
        length = max(outputs[f"{name}_token_ids"].shape[1] for name in parts)

        def text(name, corrupt):
            """Returns (targets, inputs, which inputs all see, targets that count), [B, length]."""
            targets, counts = outputs[f"{name}_token_ids"], outputs[f"{name}_counts"]
            keys = jax.vmap(lambda key: fold(key, name))(outputs.keys) if ctx.train else None
            ends = jnp.max(jnp.where(counts, jnp.arange(1, counts.shape[1] + 1), 0), axis=1)
            inputs, two_way, own, _ = corrupt(targets, ends, model.decoder, keys)
            two_way = jnp.zeros_like(counts) if two_way is None else two_way
            found = targets, inputs, two_way, counts if own is None else counts & own
            return [jnp.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in found]

        # one pass of the decoder: the texts of a picture follow each other, so that no row leaves its device
        texts = zip(*(text(name, corrupt) for name, (corrupt, _) in parts.items()), strict=True)
        targets, inputs, two_way, counts = (jnp.stack(x, axis=1).reshape(-1, length) for x in texts)
        context, mask = (x if x is None else jnp.repeat(x, len(parts), axis=0) for x in (context, mask))
        hidden = outputs.apply("decode", inputs, context, context_mask=mask, bidirectional=two_way).hidden
        losses = token_loss(lambda hidden: outputs.apply("logits", hidden), hidden, targets, chunk=chunk)
        sums = {key: x.reshape(-1, len(parts)) for key, x in of_captions(losses, counts).items()}
        return {name: {key: x[:, i] for key, x in sums.items()} for i, name in enumerate(parts)}

    def loss(outputs, features, rows, ctx):
        losses = {name: mean_loss(features[name], mean) for name in parts}
        metrics = {}
        for name, found in features.items():
            there = found["tokens"] > 0
            numbers = token_metrics(found, there) | {"loss": jnp.where(jnp.any(there), losses[name], jnp.nan)}
            metrics |= {f"{name}/{key}": value for key, value in numbers.items()}
        return sum(weight * losses[name] for name, (_, weight) in parts.items()), metrics

    return Term("locca", features, loss)


def _task(*, name: str, corruption: str | Mapping[str, Any] = "causal", weight: float = 1.0):
    return catalogue.build("corruptions", corruption, f"{WHERE}.tasks.{name}.corruption"), weight
