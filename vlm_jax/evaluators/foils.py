"""Foils: does a picture fit its caption better than one that is wrong in a word, or in the order of the words?

As ARO (arXiv:2210.01936) and SugarCrepe (arXiv:2306.14610) measure it; the wrong captions are
made by the rules of `foil_texts`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.config import choose
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import foil_texts
from vlm_jax.evaluators.progress import Progress, memory_limit
from vlm_jax.evaluators.records import read_fields
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import open_pass, stream
from vlm_jax.pretrained.similarity import similarity_of_pairs


def foils(
    *,
    uri: str,
    split: str | None = None,
    caption: str = "name/en",
    label: str = "concept",
    group: str = "subgroup",
    true: Sequence[str] = ("keywords/en",),
    kinds: Sequence[str] = tuple(foil_texts.KINDS),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result` of two towers and captioners.

    Metrics: for each kind of foil, named as the kind, the share of pairs whose right caption scores higher, a tie
    counting half (left out where there are no pairs); `object_pairs` and so on, how many pairs there are; `chance`,
    which is 0.5; `examples`. Two towers score a caption by the cosine with its picture, captioners by its
    log-likelihood, the sum over its tokens, which knows the captions' language, too: a model that ignores the picture
    may be above chance, most of all in `order`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      caption: the record's field with the caption, a text or a list of texts, of which the first is scored.
      label: the field that says which pictures show the same: a text of any of them is no foil of the others.
      group: the field that says which captions name things of a kind: an object is taken for another of its group.
      true: fields with more texts that are true of a picture.
      kinds: of "object", "attribute" and "order", see `foil_texts.foil`.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
      memory_share: of the free memory, for the scores; beyond it, a file.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in kinds:
        choose(foil_texts.KINDS, kind, "the kind of foils")
    paths = [label, group, caption, *([true] if isinstance(true, str) else true)]
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        progress = progress or Progress()
        string = f'decode | {ops or pretrained.preprocess} | keep("image")'
        pretrained, hosts, batches = open_pass(
            pretrained, uri=uri, split=split, where=where, ops=string, batch_size=batch_size
        )
        right, wrong = _pairs(read_fields(open_source(uri, split), batches.examples.chosen, paths), kinds)
        if not any(map(any, wrong)):
            raise UserError(f"{uri} {split or ''}: no text under {caption} has a foil of the kinds {', '.join(kinds)}")
        counts = hosts.from_first(progress.begin(examples=batches.num_examples, batch_size=hosts.batch_size))
        table, counts = progress.table("pairs", limit), {"batches": 0, "examples": 0} | counts
        some = counts["examples"]
        for batch in stream(batches, hosts, [], counts["batches"], progress.show):
            rows = [int(i) if real else None for i, real in zip(batch.position, batch.mask, strict=True)]
            texts = [[None if i is None else own[i] for i in rows] for own in (right, *wrong)]
            scores = _scores(pretrained, batch.image, texts)
            if hosts.first and scores is not None:
                for k, of_foils in enumerate(scores[1:]):
                    there = np.array([text is not None for text in texts[k + 1]])
                    columns = {"right": scores[0][there], "wrong": of_foils[there], "position": batch.position[there]}
                    table.append(kind=np.full(there.sum(), k), **columns)
            some += sum(text is not None for text in texts[0])
            progress.save(batches=batch.done, examples=some)
        result = Result({}, {})
        if hosts.first:
            result = _result(table, kinds, right, wrong)
        return result._replace(metrics=hosts.from_first(result.metrics | {"examples": float(some), "chance": 0.5}))

    return evaluate


def _pairs(records: list[list | None], kinds: Sequence[str]) -> tuple[list, list[list]]:
    """The captions [N], and for each kind their foils [N]; None for none."""
    texts = [None if record is None else [_texts(value) for value in record[2:]] for record in records]
    caption = [own[0][0] if own and own[0] else None for own in texts]
    named = [i for i, text in enumerate(caption) if text is not None]
    true: dict[Any, set[str]] = {}
    for i in named:
        true.setdefault(records[i][0], set()).update(text for field in texts[i] for text in field)
    others = foil_texts.corpus([caption[i] for i in named], [records[i][1] for i in named])
    foil = lambda kind, i: foil_texts.foil(kind, caption[i], records[i][1], sorted(true[records[i][0]]), others)
    return caption, [[None if text is None else foil(k, i) for i, text in enumerate(caption)] for k in kinds]


def _scores(pretrained: Any, images: Any, texts: list[list[str | None]]) -> list[np.ndarray] | None:
    """How well each picture fits each of its texts, float [B] for each list of texts; None if there are no texts.

    All of a batch are scored, and at their place, so that equal texts tie; what has no text is scored with another's.
    """
    filler = next((text for text in texts[0] if text is not None), None)
    if filler is None:
        return None
    filled = [[text or other or filler for text, other in zip(own, texts[0], strict=True)] for own in texts]
    if getattr(pretrained, "is_captioner", False):
        return [pretrained.score_batch(images, own)[0] for own in filled]
    embedded = pretrained.embed_image_batch(images)
    return [similarity_of_pairs(embedded, pretrained.embed_texts(own)) for own in filled]


def _result(table: Any, kinds: Sequence[str], caption: list, foils: list[list]) -> Result:
    kind, right, wrong, position = map(table.read, ("kind", "right", "wrong", "position"))
    share = (right > wrong) + 0.5 * (right == wrong)
    numbers, pairs = {}, []
    for k, name in enumerate(kinds):
        own = np.flatnonzero(kind == k)
        if len(own):
            numbers[name] = float(share[own].mean())
        numbers[f"{name}_pairs"] = float(len(own))
        pairs += [
            (name, int(p), caption[p], foils[k][p], float(s)) for p, s in zip(position[own], share[own], strict=True)
        ]
    return Result(numbers, {"pairs": pairs})


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value)
    return [text for text in texts if text.strip()]
