"""Captions that a model writes, against those that people gave (COCO's metrics, arXiv:1504.00325, section 3), and how
surprised the model is by theirs."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators import caption_metrics
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators.ops import boxed, thumbnail  # noqa: F401 (registered as ops)
from vlm_jax.evaluators.progress import Progress, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import look_up, open_pass, stream
from vlm_jax.evaluators.zeroshot import evenly_spaced


def captions(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = ("caption",),
    method: str = "greedy",
    options: Mapping[str, Any] | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str = "label",
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result` of captioners.

    Metrics: `exact_match`, `bleu1` to `bleu4`, `rouge_l`, `cider` (CIDEr-D, up to 10), see `caption_metrics`;
    `perplexity` of the references, exp(-(sum of log p) / (number of tokens, ends included)); `examples`, `left_out`
    (pictures without text, or of no class that counts). BLEU-4 and CIDEr are made for sentences: a name of one or two
    words has no 4-grams, and its CIDEr is at most 2.5 or 5.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with references, each a text or a list of texts; empty texts do not count.
      method: how captions are written, see `Pretrained.caption`. What "sample" draws depends on the batch size.
      options: its other arguments, such as `beams` and `prefix`.
      classes: where given, only pictures whose label is among these count, see `classes.read`.
      label: the record's field with the label.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time.
      gallery: how many pictures to show with their captions and these captions' ROUGE-L, evenly spaced over the split.
      memory_share: of the free memory, for the texts; beyond it, a file.
    """
    fields = [captions] if isinstance(captions, str) else list(captions)
    quoted = ", ".join(f'"{path}"' for path in [*fields, *([] if classes is None else [label])])
    index_of = None if classes is None else class_names.index_of(class_names.read(classes))
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        progress = progress or Progress()
        string = f'decode | boxed({quoted}, to="texts") | {ops or pretrained.preprocess} | keep("image", "texts")'
        pretrained, hosts, batches = open_pass(
            pretrained, uri=uri, split=split, where=where, ops=string, batch_size=batch_size
        )
        counts = hosts.from_first(progress.begin(examples=batches.num_examples, batch_size=hosts.batch_size))
        counts = {"batches": 0, "examples": 0, "left_out": 0} | counts
        lines, some, left_out = progress.table("lines", limit), counts["examples"], counts["left_out"]
        for batch in stream(batches, hosts, ["texts"], counts["batches"], progress.show):
            references = [_texts(values[: len(fields)]) for values in batch.columns["texts"]]
            among = batch.mask & np.array([bool(own) for own in references])
            if index_of:
                among &= index_of([values[-1:] for values in batch.columns["texts"]]) >= 0
            some, left_out = some + int(among.sum()), left_out + int(batch.mask.sum() - among.sum())
            if among.any():
                written = pretrained.caption_batch(batch.image, method, **(options or {}))
                log_p, tokens = _log_likelihood(pretrained, batch.image, references, among)
                rows = [
                    (int(batch.position[i]), written[i], references[i], float(log_p[i]), int(tokens[i]))
                    for i in np.flatnonzero(among)
                ]
                if hosts.first:
                    text = "".join(json.dumps(row) + "\n" for row in rows)
                    lines.append(byte=np.frombuffer(text.encode(), np.uint8))
            progress.save(batches=batch.done, examples=some, left_out=left_out)
        if not some:
            counted = f", or none whose `{label}` is among the classes" if index_of else ""
            raise UserError(f"{uri} {split or ''}: no picture has a text under {', '.join(fields)}{counted}")
        result = Result({}, {})
        if hosts.first:
            rows = [json.loads(line) for line in lines.read("byte").tobytes().splitlines()]
            look = lambda rows: look_up(batches, 'decode | thumbnail | keep("thumbnail")', rows)
            result = _result(rows, gallery, look)
        return result._replace(metrics=hosts.from_first(result.metrics | {"left_out": float(left_out)}))

    return evaluate


def _log_likelihood(pretrained: Any, images: Any, references: list[list[str]], among: np.ndarray) -> Any:
    """The sum of log p of each picture's references, float64 [B], and of their tokens, int [B].

    The first references of all pictures together, then the second ones and so on: the images stay a whole batch.
    """
    log_p, tokens = np.zeros(len(among)), np.zeros(len(among), np.int64)
    filler = references[int(np.argmax(among))][0]
    for nth in range(max(len(own) for own, counts in zip(references, among, strict=True) if counts)):
        has = among & np.array([len(own) > nth for own in references])
        texts = [own[nth] if there else filler for own, there in zip(references, has, strict=True)]
        of_text, length = pretrained.score_batch(images, texts)
        log_p, tokens = log_p + np.where(has, of_text, 0), tokens + np.where(has, length, 0)
    return log_p, tokens


def _result(rows: list[list], gallery: int, look: Callable) -> Result:
    position, written, references, log_p, tokens = zip(*rows, strict=True)
    words = [caption_metrics.tokenize(text) for text in written]
    of_references = [[caption_metrics.tokenize(text) for text in own] for own in references]
    exact = caption_metrics.exact_match(words, of_references)
    rouge = caption_metrics.rouge_l(words, of_references)
    bleu = caption_metrics.bleu(words, of_references)
    numbers = {
        "exact_match": float(exact.mean()),
        **{f"bleu{k}": value for k, value in enumerate(bleu, 1)},
        "rouge_l": float(rouge.mean()),
        "cider": float(caption_metrics.cider_d(words, of_references).mean()),
        "perplexity": float(np.exp(-np.sum(log_p) / np.sum(tokens))),
        "examples": float(len(rows)),
    }
    artifacts = {"captions": [(int(p), text, own) for p, text, own in zip(position, written, references, strict=True)]}
    if gallery:
        shown = evenly_spaced(len(rows), gallery)
        artifacts["gallery"] = {
            "images": np.stack([record["thumbnail"] for record in look([position[i] for i in shown])]),
            "truth": [written[i] if exact[i] else references[i][0] for i in shown],
            "names": [[written[i]] for i in shown],
            "scores": rouge[shown, None],
        }
    return Result(numbers, artifacts)


def _texts(values: list) -> list[str]:
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return [text for text in texts if text.strip()]
