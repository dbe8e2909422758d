"""Foils: does a picture fit its caption better than a caption with a wrong word or word order?

The measure is that of ARO (arXiv:2210.01936) and SugarCrepe (arXiv:2306.14610). The wrong captions are in the data, or
the rules of `foil_texts` make them.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.evaluators import scores
from vlm_jax.evaluators.metrics import interval
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks import foil_texts


@method(
    family="evaluators",
    paper="arXiv:2210.01936",
    where="section 2",
    differs="a caption against one with a wrong object, attribute or order",
)
def foils(
    *,
    uri: str,
    split: str | None = None,
    caption: str = "name/en",
    label: str = "concept",
    group: str = "subgroup",
    true: Sequence[str] = ("keywords/en",),
    foils: str | None = None,
    kinds: Sequence[str] | None = None,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers and captioners.

    Metrics: for each kind of foil, under the kind's name, the share of pairs whose right caption scores higher; a tie
    counts half; without pairs the metric is left out. `object_pairs` and so on: the number of pairs. `chance`: 0.5.
    `ties`. `examples`. With `foils`, `object_left_out` and so on: pictures without a foil of the kind. Two towers score
    a caption by the cosine with its picture. Captioners score a caption by its log-likelihood, summed over tokens; this
    includes the language's likelihood, so a model that ignores the picture may be above chance, most of all in `order`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      caption: the record's field with the caption, a text or a list of texts; the first text is scored.
      label: a field; pictures of equal label show the same, and their texts are no foils of each other.
      group: a field; captions of equal group name things of one kind, and an object becomes another of its group.
      true: fields with more texts that are true of a picture.
      foils: the record's field with wrong captions: kind -> text, as `scenes:` has it, or one text, of the kind "foil",
        as SugarCrepe has it. If given, no rule makes foils, and `label`, `group` and `true` are not read.
      kinds: some of the kinds; defaults to all. The rules' kinds are "object", "attribute" and "order", see
        `foil_texts.foil`.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the scores; more scores go to a file.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    for kind in kinds or [] if foils is None else []:
        choose(foil_texts.KINDS, kind, "the kind of foils")
    paths = [label, group, caption, *([true] if isinstance(true, str) else true)]
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        string = picture_ops(ops or pretrained.preprocess)
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=string, batch_size=batch_size, memory=limit
        )
        pretrained = data.pretrained
        if foils is None:
            names = list(kinds or foil_texts.KINDS)
            right, wrong = _pairs(data.fields(*paths), names)
        else:
            names, right, wrong = _given(data.fields(caption, foils), kinds)
        if not any(map(any, wrong)):
            of_kinds = f"of the kinds {', '.join(names)}" if names else f"under {foils}"
            raise UserError(f"{uri} {split or ''}: no text under {caption} has a foil {of_kinds}")
        data.begin("pairs")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            filled = [[text or own[0] for text in own] for own in batch.about]
            score = np.stack(scores.of_lists(pretrained, batch, filled))
            pairs = [(k, row) for k in range(len(names)) for row, own in enumerate(batch.about) if own[k + 1]]
            kind, row = np.array(pairs, np.int64).reshape(-1, 2).T
            columns = {"right": score[row, 0], "wrong": score[row, kind + 1], "position": batch.position[row]}
            return {"pairs": {"kind": kind, **columns}}

        def finish(tables: Mapping[str, Table]) -> Result:
            result, examples = _result(tables["pairs"], names, right, wrong), data.counts["examples"]
            more = {"examples": float(examples), "chance": 0.5}
            if foils is not None:
                more |= {f"{name}_left_out": examples - result.metrics[f"{name}_pairs"] for name in names}
            return result._replace(metrics=result.metrics | more)

        data.run(rows, about=lambda i: right[i] and [right[i], *(own[i] for own in wrong)], columns=["position"])
        return data.result(finish)

    return evaluate


def _pairs(records: list[list | None], kinds: Sequence[str]) -> tuple[list, list[list]]:
    """The captions [N], and the foils [N] of each kind; None for a missing caption or foil."""
    same = lambda value: value if isinstance(value, Hashable) else repr(value)
    records = [record and [*map(same, record[:2]), *record[2:]] for record in records]
    found = [None if record is None else [texts([value]) for value in record[2:]] for record in records]
    caption = [own[0][0] if own and own[0] else None for own in found]
    named = [i for i, text in enumerate(caption) if text is not None]
    true: dict[Any, set[str]] = {}
    for i in named:
        true.setdefault(records[i][0], set()).update(text for field in found[i] for text in field)
    others = foil_texts.corpus([caption[i] for i in named], [records[i][1] for i in named])
    foil = lambda kind, i: foil_texts.foil(kind, caption[i], records[i][1], sorted(true[records[i][0]]), others)
    return caption, [[None if text is None else foil(k, i) for i, text in enumerate(caption)] for k in kinds]


def _given(records: list[list | None], kinds: Sequence[str] | None) -> tuple[list[str], list, list[list]]:
    """The kinds, the captions [N], and the foils [N] of each kind that the records hold; None where one is missing."""
    rows = [
        (texts([caption]), {kind: texts([of_kind]) for kind, of_kind in _by_kind(own).items()})
        for caption, own in (record or ("", {}) for record in records)
    ]
    found = sorted({kind for _, own in rows for kind in own})
    for kind in kinds or []:
        choose(dict.fromkeys(found), kind, "the kind of foils")
    names = list(kinds or found)
    caption = [own[0] if own else None for own, _ in rows]
    return names, caption, [[own[0] if (own := of_kind.get(kind)) else None for _, of_kind in rows] for kind in names]


def _by_kind(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"foil": value}


def _result(table: Table, kinds: Sequence[str], caption: list, foils: list[list]) -> Result:
    kind, right, wrong, position = map(table.read, ("kind", "right", "wrong", "position"))
    share = (right > wrong) + 0.5 * (right == wrong)
    numbers, intervals, pairs, ties = {}, {}, [], int(np.sum(right == wrong))
    for k, name in enumerate(kinds):
        own = np.flatnonzero(kind == k)
        if len(own):
            numbers[name] = float(share[own].mean())
            intervals[name] = interval(share[own])
        numbers[f"{name}_pairs"] = float(len(own))
        pairs += [
            (name, int(p), caption[p], foils[k][p], float(s)) for p, s in zip(position[own], share[own], strict=True)
        ]
    notes = [f"{ties:,} of {len(share):,} pairs have equal scores; each counts half"] if ties else []
    return Result(numbers | {"ties": float(ties)}, {"pairs": pairs}, intervals, notes)
