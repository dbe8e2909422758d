"""How surprised a model is by what a denoiser hid of texts: span corruption is filling in, a prefix is continuing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators.progress import Progress
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import open_pass


def denoising(
    *,
    uri: str,
    split: str | None = None,
    ops: str,
    denoisers: Sequence[str],
    where: Mapping[str, Sequence] | None = None,
    batch_size: int = 256,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result` of models from texts to texts.

    Metrics: `perplexity` of the targets' tokens, exp(-(sum of log p) / (number of tokens, sentinels and ends
    included)), and of each denoiser that any text met, `S/perplexity`; `examples`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      ops: op string from record to `input_ids`, `token_ids` and `denoiser`, see the op `denoise`. What it hides depends
        on an example's place in the data set alone.
      denoisers: names of those that the op draws from, in its order.
      where: field -> values that a record must have to take part.
      batch_size: texts at a time; the numbers do not depend on it.
    """

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh, progress  # the model knows where it runs; texts alone are read fast
        if not pretrained.reads_texts:
            raise UserError("evaluator `denoising`: this model reads no texts; an EncoderDecoder or a PrefixLM does")
        pretrained, hosts, batches = open_pass(
            pretrained, uri=uri, split=split, where=where, ops=ops, batch_size=batch_size
        )
        log_p, tokens, examples = (np.zeros(len(denoisers)) for _ in range(3))
        for batch in batches:
            length = np.sum(batch["token_ids"] != pretrained.tokenizer.pad_id, axis=1)
            rows = zip(batch["mask"].tolist(), batch["denoiser"].tolist(), length.tolist(), strict=True)
            mask, kind, length = map(np.array, zip(*hosts.gather(list(rows)), strict=True))
            of_text = pretrained.target_log_likelihood(*hosts.whole((batch["input_ids"], batch["token_ids"])))
            for sums, values in ((log_p, of_text), (tokens, length), (examples, np.ones(len(mask)))):
                np.add.at(sums, kind[mask], values[mask])
        perplexity = lambda of: float(np.exp(-log_p[of].sum() / tokens[of].sum()))
        numbers = {"perplexity": perplexity(slice(None)), "examples": float(examples.sum())}
        numbers |= {f"{name}/perplexity": perplexity([i]) for i, name in enumerate(denoisers) if examples[i]}
        return Result(hosts.from_first(numbers), {})

    return evaluate
