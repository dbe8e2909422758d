"""Captioning: a model's captions against references (COCO's metrics, arXiv:1504.00325, section 3), and perplexity."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.metrics import captions as caption_metrics
from vlm_jax.evaluators.metrics import hallucination, interval
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import evenly_spaced


@method(
    family="evaluators",
    paper="arXiv:1504.00325",
    where="section 3",
    differs="captions that a model writes, against people's",
)
def captions(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = ("caption",),
    method: str = "greedy",
    options: Mapping[str, Any] | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str = "label",
    objects: str | None = None,
    vocabulary: str | Sequence[str] | None = None,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of captioners.

    Metrics: `exact_match`, `bleu1` to `bleu4`, `rouge_l`, `cider` (CIDEr-D, up to 10), see `metrics.captions`;
    `perplexity` of the references, exp(-(sum of log p) / (number of tokens, ends included)); `examples`, `left_out`
    (pictures without text, or of a class that does not count). BLEU-4 and CIDEr are made for sentences: a name of one
    or two words has no 4-grams, and a CIDEr of at most 2.5 or 5. With `objects`, also `chair_i` (the share of named
    objects that are not there), `chair_s` (of captions with such an object) and `object_recall` (the share of objects
    there that are named), see `metrics.hallucination`: by English names and their plurals, without synonyms.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with references, each a text or a list of texts; empty texts do not count.
      method: how captions are written, see `Pretrained.caption`. The draws of "sample" depend on the batch size.
      options: other arguments of `Pretrained.caption`, such as `beams` and `prefix`.
      classes: if given, only pictures with these labels count, see `classes.read`.
      label: the record's field with the label.
      objects: the field with the English names of the objects that are there, a list, or a dict with these keys.
      vocabulary: the names that count as objects, see `classes.read`; defaults to those of all pictures. A name that no
        picture has is a hallucination only if it is among these.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time.
      gallery: number of pictures to show with caption and ROUGE-L, evenly spaced over the split.
      memory_share: share of the free memory for the texts; more texts go to a file.
    """
    fields = [captions] if isinstance(captions, str) else list(captions)
    named = None if classes is None else Classes(class_names.read(classes))
    if vocabulary is not None and objects is None:
        raise UserError("captions: vocabulary is given without objects, the field with the objects that are there")
    words = None if vocabulary is None else list(class_names.read(vocabulary).values())
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        string = picture_ops(ops or pretrained.preprocess, *fields, *([] if classes is None else [label]))
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=string, batch_size=batch_size, memory=limit
        )
        pretrained = data.pretrained
        look = None if named is None else data.look(named, label)
        there = None if objects is None else _objects(data, objects)
        data.begin("lines")

        def about(values: list) -> list[str] | None:
            if look is not None and look(values[-1]) is None:
                return None
            return texts(values[: len(fields)]) or None

        def rows(batch: Batch) -> Mapping[str, Columns]:
            written = pretrained.caption_batch(batch.inputs, method, **(options or {}))
            log_p, tokens = _log_likelihood(pretrained, batch)
            lines = "".join(
                json.dumps((int(position), written[i], references, float(log_p[i]), int(tokens[i]))) + "\n"
                for i, position, references in zip(batch.kept, batch.position, batch.about, strict=True)
            )
            return {"lines": {"byte": np.frombuffer(lines.encode(), np.uint8)}}

        def finish(tables: Mapping[str, Table]) -> Result:
            lines = [json.loads(line) for line in tables["lines"].read("byte").tobytes().splitlines()]
            result = _result(lines, gallery, data.thumbnails)
            if there is None:
                return result
            known = hallucination.forms(words or sorted({name for names in there for name in names}))
            said = [caption_metrics.tokenize(line[1]) for line in lines]
            numbers, intervals = hallucination.chair(said, [there[line[0]] for line in lines], known)
            return result._replace(metrics=result.metrics | numbers, intervals=result.intervals | intervals)

        if not data.run(rows, about):
            counted = f", or none whose `{label}` is among the classes" if look else ""
            raise UserError(f"{uri} {split or ''}: no picture has a text under {', '.join(fields)}{counted}")
        return data.result(finish, "left_out")

    return evaluate


def _objects(data: Pass, objects: str) -> list[list[str]]:
    """The names of each picture's objects."""
    values = [record[0] if record else () for record in data.fields(objects)]
    there = [texts([list(value) if isinstance(value, Mapping) else value]) for value in values]
    if not any(there):
        raise UserError(f"{data.about}: no picture has names under {objects}")
    return there


def _log_likelihood(pretrained: Any, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The sum of log p over each picture's references, float64 [B], and the number of their tokens, int [B].

    Both are 0 for rows that do not count. The first references of all pictures are scored together, then the second
    references, and so on: the images stay a whole batch.
    """
    log_p, tokens = np.zeros(batch.size), np.zeros(batch.size, np.int64)
    references, filler = batch.spread(batch.about, []), batch.about[0][0]
    for nth in range(max(map(len, batch.about))):
        has = np.array([len(own) > nth for own in references])
        filled = [own[nth] if there else filler for own, there in zip(references, has, strict=True)]
        of_text, length = pretrained.score_batch(batch.inputs, filled)
        log_p, tokens = log_p + np.where(has, of_text, 0), tokens + np.where(has, length, 0)
    return log_p, tokens


def _result(rows: list[list], gallery: int, pictures: Callable) -> Result:
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
            "images": pictures([position[i] for i in shown]),
            "truth": [written[i] if exact[i] else references[i][0] for i in shown],
            "names": [[written[i]] for i in shown],
            "scores": rouge[shown, None],
        }
    return Result(numbers, artifacts, {"exact_match": interval(exact)})
