"""Questions on pictures with answers to choose from: the answer whose text fits the picture best."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import choices as choosing
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.choices import Question
from vlm_jax.evaluators.one_pass import Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.zeroshot import ties


@method(
    family="evaluators",
    paper="arXiv:1505.00468",
    where="section 4",
    differs="questions with answers to choose from, by the fit of question and answer",
)
def questions(
    *,
    uri: str,
    split: str | None = None,
    question: str = "questions/question",
    answer: str = "questions/answer",
    choices: str = "questions/choices",
    kind: str | None = "questions/kind",
    template: str = "{question} {answer}",
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers and captioners.

    The text of a choice is question and choice in the template. Two towers answer with the choice whose text has the
    highest cosine with the picture, captioners with the choice whose text has the highest log-likelihood, summed over
    tokens: short answers have an advantage. Metrics: `exact_match`, the share of questions answered right, and
    `exact_match/KIND`; `chance` and `chance/KIND`, the mean of 1 / (number of choices); `questions`; `examples`
    (pictures); `left_out_questions` (the answer is not among the choices); `ties`. Of k equal best choices the right
    one counts 1 / k. Questions on one picture are drawn together for the intervals.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      question: the record's field with a question, or with a list of questions.
      answer: the field with the answer, or with a list of answers.
      choices: the field with a list of texts, or with a list of lists.
      kind: the field with the kind, or with a list of kinds; None: no kinds.
      template: prompt; `{question}` and `{answer}` stand for their texts.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the answers; more answers go to a file.
    """
    if "{answer}" not in template:
        raise UserError(f"template `{template}` has no `{{answer}}` for the choice")
    fields, limit = [question, answer, choices, *([] if kind is None else [kind])], memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(ops or pretrained.preprocess),
            batch_size=batch_size, memory=limit,
        )  # fmt: skip
        read = [_asked(*record, template=template) if record else [] for record in data.fields(*fields)]
        asked = [[one for one in own if one is not None] for own in read]
        if not any(asked):
            raise UserError(
                f"{data.about}: no picture has a question under `{question}` whose `{answer}` is among its `{choices}`"
            )
        choosing.ask(data, asked)
        lost = sum(map(len, read)) - sum(map(len, asked))

        def finish(tables: Mapping[str, Table]) -> Result:
            result = _result(choosing.answers(tables["answers"], asked), kind is not None)
            counted = {"examples": float(data.counts["examples"]), "left_out_questions": float(lost)}
            return result._replace(metrics=result.metrics | counted)

        return data.result(finish)

    return evaluate


def _asked(question: Any, answer: Any, choices: Any, kind: Any = "", *, template: str) -> list[Question | None]:
    """The questions of a record; None for one whose answer is not among its choices."""
    if isinstance(question, str):
        question, answer, choices, kind = [question], [answer], [choices], [kind]
    kinds = [kind] * len(question) if isinstance(kind, str) else kind
    if not len(question) == len(answer) == len(choices) == len(kinds):
        return [None]
    found = []
    for q, a, several, of_kind in zip(question, answer, choices, kinds, strict=True):
        own = list(dict.fromkeys(texts([several])))
        said = [template.replace("{question}", str(q)).replace("{answer}", text) for text in own]
        found.append(Question(str(of_kind), said, own.index(a)) if a in own else None)
    return found


def _result(answers: choosing.Answers, by_kind: bool) -> Result:
    right, kinds = answers.right, np.array([question.kind for question in answers.questions])
    chance = np.array([1 / len(question.texts) for question in answers.questions])
    parts = {"": np.ones(len(right), bool)} | {f"/{k}": kinds == k for k in np.unique(kinds) if by_kind}
    numbers = {f"exact_match{name}": float(right[own].mean()) for name, own in parts.items()}
    numbers |= {f"chance{name}": float(chance[own].mean()) for name, own in parts.items()}
    numbers |= {"questions": float(len(right)), "ties": float(answers.ranks.ties)}
    intervals = {
        f"exact_match{name}": metrics.interval(right[own], units=answers.example[own]) for name, own in parts.items()
    }
    return Result(numbers, {"answers": answers.listed}, intervals, ties(answers.ranks, "questions"))
