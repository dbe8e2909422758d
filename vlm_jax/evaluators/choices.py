"""Questions with texts to choose from, several on one picture: which text fits the picture best?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlm_jax.evaluators import metrics, scores
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass
from vlm_jax.evaluators.progress import Table


class Question(NamedTuple):
    """Texts, one of which is right.

    Attributes:
      kind: what is asked.
      texts: all different, to be scored with the picture, see `scores`.
      right: index of the right text.
    """

    kind: str
    texts: Sequence[str]
    right: int


def ask(data: Pass, asked: Sequence[Sequence[Question]]) -> None:
    """Fills the table `answers` of a pass: a row for each question, in order, by the questions of each example."""

    def rows(batch: Batch) -> Mapping[str, Columns]:
        own = [asked[i] for i in batch.about]
        score = scores.of_lists(data.pretrained, batch, [[t for q in several for t in q.texts] for several in own])
        found = []
        for i, several, of_picture in zip(batch.about, own, score, strict=True):
            ends = np.cumsum([len(question.texts) for question in several])
            for nth, (question, part) in enumerate(zip(several, np.split(of_picture, ends[:-1]), strict=True)):
                (above,), (tied,), (right,) = metrics.truth_ranks(part[None], np.array([question.right]))
                found.append((i, nth, int(np.argmax(part)), above, tied, right))
        names = ("example", "nth", "best", *metrics.Ranks._fields)
        return {"answers": dict(zip(names, np.array(found, np.int64).T, strict=True))}

    data.begin("answers")
    data.run(rows, about=lambda i: int(i) if asked[i] else None, columns=["position"])


class Answers(NamedTuple):
    """The questions of a table `answers`, and how they were answered.

    Attributes:
      questions: as asked.
      example: int [N], place of the picture in the data set.
      best: int [N], the text with the highest score; of equal ones the first.
      ranks: of the right texts.
    """

    questions: Sequence[Question]
    example: np.ndarray
    best: np.ndarray
    ranks: metrics.Ranks

    @property
    def right(self) -> np.ndarray:
        """Whether the right text has the highest score, float [N]; of k equal ones 1 / k."""
        return self.ranks.within(1)

    @property
    def listed(self) -> list[tuple]:
        """(example, kind, right text, best text) of each question."""
        rows = zip(self.questions, self.example.tolist(), self.best, strict=True)
        return [(i, q.kind, q.texts[q.right], q.texts[best]) for q, i, best in rows]


def answers(table: Table, asked: Sequence[Sequence[Question]]) -> Answers:
    """Returns the answers of a table that `ask` has filled with these questions."""
    example, nth, best = map(table.read, ("example", "nth", "best"))
    ranks = metrics.Ranks(*map(table.read, metrics.Ranks._fields))
    return Answers([asked[i][n] for i, n in zip(example, nth, strict=True)], example, best, ranks)
