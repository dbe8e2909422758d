"""How a language model holds a picture's tokens: their distance from the text's tokens, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import evenly_spaced
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.prefix_captioner import PrefixCaptioner
from vlm_jax.models.vocabulary import is_text


@method(
    family="evaluators",
    system="MIR",
    paper="arXiv:2410.07167",
    differs="the distance of a picture's tokens from the text's, over the layers of a decoder that reads both",
)
def integration_rate(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = "caption",
    pictures: int = 100,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 16,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of captioners whose decoder reads pictures' tokens.

    Metrics: `rate`, see `metrics.integration_rate`, over the outputs of all blocks at a picture's tokens and at the
    start token and the text's; `layer_0`, ..., the distance of each; `examples`, `left_out` (pictures without text).

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's field with the text, or several; the first text counts.
      pictures: how many, evenly spaced over the split; the paper's.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the tokens; more tokens go to a file.
    """
    if pictures < 1:
        raise UserError(f"integration_rate: pictures is {pictures}; expected 1 or more")
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        if not isinstance(pretrained.model, PrefixCaptioner):
            raise UserError("integration_rate is of captioners whose decoder reads the picture's tokens (openvision2)")
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=picture_ops(ops or pretrained.preprocess, *captions),
        )  # fmt: skip
        data.only(evenly_spaced(data.num_examples, pictures))
        data.begin("tokens")
        model, params = data.pretrained.model, data.pretrained.params

        def rows(batch: Batch) -> Mapping[str, Columns]:
            ids = data.pretrained._target_ids(batch.spread(batch.about, batch.about[0]))
            image, text = (np.asarray(x)[batch.kept] for x in _tokens(model, params, batch.inputs, ids))
            real = is_text(ids, data.pretrained.tokenizer.pad_id, data.pretrained.tokenizer.eos_id)[batch.kept]
            return {"tokens": {"image": image, "text": text, "real": real}}

        if not data.run(rows, about=lambda fields: next(iter(texts(fields)), None)):
            raise UserError(f"{data.about}: no picture has a text under {', '.join(captions)}")
        return data.result(lambda tables: _result(tables["tokens"]), "left_out")

    return evaluate


@partial(jax.jit, static_argnames="model")
def _tokens(model, params, images, ids):
    """The outputs of all blocks at a picture's tokens and at a text's, float32 [B, layers, N, D], [B, layers, L, D]."""

    def run(model, images, ids):
        context, mask = model.encode(images)
        inputs, layers = shift_right(ids, model.decoder.start_id), range(model.decoder.depth)
        decoded = model.decode(inputs, context, context_mask=mask, whole=True, layers=layers)
        return jnp.stack(decoded.aux["layers"], axis=1).astype(jnp.float32), context.shape[1]

    tokens, n = model.apply({"params": params}, images, ids, method=run)
    return tokens[:, :, :n], tokens[:, :, n:]


def _result(tokens: Table) -> Result:
    image, text, real = map(tokens.read, ("image", "text", "real"))
    layers = [(image[:, i].reshape(-1, image.shape[-1]), text[:, i][real]) for i in range(image.shape[1])]
    rate, distances = metrics.integration_rate(layers)
    numbers = {"rate": rate, "examples": float(len(image))}
    return Result(numbers | {f"layer_{i}": float(one) for i, one in enumerate(distances)}, {})
