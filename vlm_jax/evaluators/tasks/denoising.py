"""Perplexity of the tokens that a denoiser hides: span corruption tests filling in, a prefix tests continuing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass
from vlm_jax.evaluators.progress import Progress, Table
from vlm_jax.evaluators.result import Result
from vlm_jax.models.vocabulary import is_text


@method(
    family="evaluators",
    paper="arXiv:2205.05131",
    where="section 4.2",
    differs="the perplexity of what a denoiser hid of a text",
)
def denoising(
    *,
    uri: str,
    split: str | None = None,
    ops: str,
    denoisers: Sequence[str],
    where: Mapping[str, Sequence] | None = None,
    batch_size: int = 256,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of models from texts to texts.

    Metrics: `perplexity` of the targets' tokens, exp(-(sum of log p) / (number of tokens, sentinels and ends
    included)); the same of each denoiser that was drawn, `S/perplexity`; `examples`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      ops: op string from record to `input_ids`, `token_ids` and `denoiser`, see the op `denoise`. The hidden tokens
        depend only on an example's place in the data set.
      denoisers: names of the op's denoisers, in the op's order.
      where: field -> values; other records are left out.
      batch_size: texts at a time; the metrics do not depend on the batch size.
    """

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        if not pretrained.reads_texts:
            raise UserError("evaluator `denoising`: this model reads no texts; an EncoderDecoder or a PrefixLM does")
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=ops, batch_size=batch_size,
            inputs=("input_ids", "token_ids"),
        )  # fmt: skip
        pad_id, eos_id = pretrained.tokenizer.pad_id, pretrained.tokenizer.eos_id
        data.begin("texts")

        def about(denoiser: int, token_ids: np.ndarray) -> tuple[int, int]:
            return int(denoiser), int(np.sum(is_text(token_ids, pad_id, eos_id)))

        def rows(batch: Batch) -> Mapping[str, Columns]:
            denoiser, tokens = np.array(batch.about).T
            log_p = data.pretrained.target_log_likelihood(*batch.inputs)[batch.kept]
            return {"texts": {"denoiser": denoiser, "tokens": tokens, "log_p": log_p}}

        data.run(rows, about, columns=["denoiser", "token_ids"])
        return data.result(lambda tables: _result(tables["texts"], denoisers))

    return evaluate


def _result(texts: Table, denoisers: Sequence[str]) -> Result:
    kind, of_tokens, of_log_p = map(texts.read, ("denoiser", "tokens", "log_p"))
    log_p, tokens, examples = (np.zeros(len(denoisers)) for _ in range(3))
    for sums, values in ((log_p, of_log_p), (tokens, of_tokens), (examples, 1)):
        np.add.at(sums, kind, values)
    perplexity = lambda of: float(np.exp(-log_p[of].sum() / tokens[of].sum()))
    numbers = {"perplexity": perplexity(slice(None)), "examples": float(examples.sum())}
    return Result(
        numbers | {f"{name}/perplexity": perplexity([i]) for i, name in enumerate(denoisers) if examples[i]}, {}
    )
