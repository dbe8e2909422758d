"""Open questions on pictures: what a captioner writes after the question, against the answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics, written
from vlm_jax.evaluators.metrics.caption_tokens import tokenize
from vlm_jax.evaluators.one_pass import Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result


@method(
    family="evaluators",
    paper="arXiv:1505.00468",
    differs="open questions, answered by writing",
)
def answers(
    *,
    uri: str,
    split: str | None = None,
    question: str = "questions/question",
    answer: str = "questions/answer",
    kind: str | None = "questions/kind",
    template: str = "{question}",
    method: str = "greedy",
    options: Mapping[str, Any] | None = None,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of captioners.

    A model writes on after the question. An answer is right if its words are those of the data set's answer, in lower
    case and without punctuation. Metrics: `exact_match`, the share of questions answered right, and `exact_match/KIND`;
    `questions`; `examples` (pictures); `left_out` (pictures without a question). Questions on one picture are drawn
    together for the intervals.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      question: the record's field with a question, or with a list of questions.
      answer: the field with the answer, or with an answer to each question. To one question, a list holds answers that
        are all right.
      kind: the field with the kind, or with a list of kinds; None: no kinds.
      template: what the model continues; `{question}` stands for the question.
      method: how answers are written, see `Pretrained.caption`.
      options: other arguments of `Pretrained.caption`, such as `length`.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time.
      memory_share: share of the free memory for the answers; more answers go to a file.
    """
    if "{question}" not in template:
        raise UserError(f"template `{template}` has no `{{question}}`")
    fields, limit = [question, answer, *([] if kind is None else [kind])], memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        written.check(pretrained)
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(ops or pretrained.preprocess),
            batch_size=batch_size, memory=limit,
        )  # fmt: skip
        asked = [_asked(*record, template=template) if record else [] for record in data.fields(*fields)]
        if not any(asked):
            raise UserError(
                f"{data.about}: no picture has a question under `{question}` with an answer under `{answer}`"
            )
        data.begin("written")
        data.run(
            lambda batch: written.rows(data, batch, [asked[i] for i in batch.about], method, options),
            about=lambda i: int(i) if asked[i] else None,
            columns=["position"],
        )
        return data.result(lambda tables: _result(tables["written"], data.counts["examples"]), "left_out")

    return evaluate


def _asked(question: Any, answer: Any, kind: Any = "", *, template: str) -> list[tuple[str, tuple[str, list[str]]]]:
    """(prefix, (kind, answers)) of the questions of a record that have an answer."""
    if isinstance(question, str):
        question, answer, kind = [question], [answer], [kind]
    kinds = [kind] * len(question) if isinstance(kind, str) else kind
    if not len(question) == len(answer) == len(kinds):
        return []
    read = zip(kinds, question, (texts([own]) for own in answer), strict=True)
    return [(template.replace("{question}", str(q)), (str(k), own)) for k, q, own in read if own]


def _result(table: Table, examples: int) -> Result:
    lines = written.read(table)
    if not lines:
        return Result({"questions": 0.0, "examples": 0.0}, {}, notes=["no picture with a question could be read"])
    right = np.array([tokenize(text) in map(tokenize, own) for _, (_, own), text in lines], float)
    example, kinds = np.array([i for i, _, _ in lines]), np.array([kind for _, (kind, _), _ in lines])
    parts = {"": np.ones(len(right), bool)} | {f"/{kind}": kinds == kind for kind in np.unique(kinds) if kind}
    numbers = {f"exact_match{name}": float(right[own].mean()) for name, own in parts.items()}
    intervals = {f"exact_match{name}": metrics.interval(right[own], units=example[own]) for name, own in parts.items()}
    artifacts = {"answers": [(i, kind, own[0], text) for i, (kind, own), text in lines]}
    return Result(numbers | {"questions": float(len(right)), "examples": float(examples)}, artifacts, intervals)
