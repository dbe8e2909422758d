"""Counting: which of "two foxes", ..., "six foxes" fits a picture best?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.scenes.texts import NUMBERS
from vlm_jax.data.scenes.words import plural
from vlm_jax.errors import UserError
from vlm_jax.evaluators import choices, metrics
from vlm_jax.evaluators.choices import Question
from vlm_jax.evaluators.one_pass import Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.zeroshot import ties


@method(
    family="evaluators",
    paper="arXiv:2302.12066",
    where="section 4",
    differs="the number of things whose text fits a picture best",
)
def counting(
    *,
    uri: str,
    split: str | None = None,
    counts: str = "counts",
    numbers: Sequence[int] = (2, 3, 4, 5, 6),
    template: str = "{number} {things}",
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers and captioners.

    Each thing of a picture that is there in one of the `numbers` is a question; its texts are these numbers of it, in
    English words, "two foxes". Two towers take the highest cosine with the picture, captioners the highest
    log-likelihood, summed over tokens. Metrics: `accuracy`, the share of right numbers (of k equal best ones the right
    one counts 1 / k), `mean_absolute_error` (of equal best ones, the smallest number counts), `chance`, `questions`,
    `examples`, `left_out` (pictures without such a thing), `ties`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      counts: the record's field with name -> number, names in English and singular.
      numbers: the numbers to choose among.
      template: prompt; `{number}` and `{things}` stand for the words.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the answers; more answers go to a file.
    """
    numbers = sorted(set(numbers))
    if len(numbers) < 2 or numbers[0] < 1:
        raise UserError(f"counting: numbers are {numbers}; expected two or more, each at least 1")
    if "{number}" not in template or "{things}" not in template:
        raise UserError(f"template `{template}` has no `{{number}}` or no `{{things}}`")
    limit = memory_limit(memory_share)

    def question(name: str, count: int) -> Question:
        named = [(NUMBERS[n] if n < len(NUMBERS) else str(n), name if n == 1 else plural(name)) for n in numbers]
        said = [template.replace("{number}", number).replace("{things}", things) for number, things in named]
        return Question(name, said, numbers.index(count))

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(ops or pretrained.preprocess),
            batch_size=batch_size, memory=limit,
        )  # fmt: skip
        records = [record[0] if record and isinstance(record[0], Mapping) else {} for record in data.fields(counts)]
        asked = [[question(name, n) for name, n in own.items() if n in numbers] for own in records]
        if not any(asked):
            raise UserError(f"{data.about}: no picture has a thing under `{counts}` in one of the numbers {numbers}")
        choices.ask(data, asked)

        def finish(tables: Mapping[str, Table]) -> Result:
            result = _result(choices.answers(tables["answers"], asked), np.array(numbers))
            return result._replace(metrics=result.metrics | {"examples": float(data.counts["examples"])})

        return data.result(finish, "left_out")

    return evaluate


def _result(answers: choices.Answers, numbers: np.ndarray) -> Result:
    right, units = answers.right, answers.example
    true = numbers[[question.right for question in answers.questions]]
    error = float(np.abs(numbers[answers.best] - true).mean())
    found = {"accuracy": float(right.mean()), "mean_absolute_error": error, "chance": 1 / len(numbers)}
    found |= {"questions": float(len(right)), "ties": float(answers.ranks.ties)}
    intervals = {"accuracy": metrics.interval(right, units=units)}
    return Result(found, {"answers": answers.listed}, intervals, ties(answers.ranks, "questions"))
