"""Labels on request: in each round a strategy chooses pictures of the pool, gets their labels, and a method learns.

for learned in plan(budget=64, rounds=4, acquisition="pcb", pool=len(pool.labels)).learn(
    fit("coop"), clip, pool, lambda rows: labels[rows], validation, task
):
    learned.adapted.classify(pictures)
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax import catalogue
from vlm_jax.adapt.task import Shots, Task, check_unlabelled, features_of, logits_of
from vlm_jax.errors import UserError
from vlm_jax.pretrained import Pretrained

ROUNDS = 8  # as in PCB
STRATEGY = "pcb"


class Seen(NamedTuple):
    """What a strategy sees: no label that it did not ask for.

    Attributes:
      features: the adapted model's embeddings of pictures without labels, unit norm, float [U, D].
      logits: its logits of them, float [U, C].
      labelled: its embeddings of the pictures labelled so far, float [L, D].
      labels: of these, int [L].
      text: of the classes, by the base model, unit norm, float [C, D].
      scale: of the base model's logits.
    """

    features: np.ndarray
    logits: np.ndarray
    labelled: np.ndarray
    labels: np.ndarray
    text: np.ndarray
    scale: float


Acquire = Callable[[Seen, int, np.random.Generator], np.ndarray]
"""`acquire(seen, count, rng) -> rows`: different rows of `seen.features` to label, int [count]."""


class Learned(NamedTuple):
    """What a round ends with.

    Attributes:
      adapted: the model, adapted to all labels so far.
      rows: of the pool, in the order in which they were asked for, int [L].
      labels: of these, int [L].
    """

    adapted: Pretrained
    rows: np.ndarray
    labels: np.ndarray


class Plan(NamedTuple):
    """Rounds of labels; attributes: labels of each round, and who chooses from the second round on."""

    sizes: tuple[int, ...]
    acquire: Acquire

    def learn(
        self,
        adapt: Callable[[Pretrained, Shots, Shots, Task], Pretrained],
        base: Pretrained,
        pool: Shots,
        ask: Callable[[np.ndarray], np.ndarray],
        validation: Shots,
        task: Task,
    ) -> Iterator[Learned]:
        """Yields what each round ends with.

        The first round's pictures are random, the same for all strategies, as in PCB (arXiv:2311.11178). Each round
        adapts the base model anew; pictures that are not yet labelled are the method's pool.

        Args:
          adapt: a method, `fit(name)` of `adapt.methods`.
          base: the model.
          pool: pictures, with labels of -1.
          ask: rows of the pool, int [n] -> their labels, int [n].
          validation: pictures to choose hyper-parameters on.
          task: its pool is not read.
        """
        check_unlabelled(pool, "the pool to ask for labels of")
        part = lambda rows: Shots(*(None if x is None else x[rows] for x in pool))
        rows, labels, adapted = np.empty(0, int), np.empty(0, int), None
        for number, count in enumerate(self.sizes):
            rest, rng = np.setdiff1d(np.arange(len(pool.labels)), rows), np.random.default_rng((task.seed, number, 3))
            if adapted is None:
                chosen = rng.permutation(len(rest))[:count]
            else:
                of = lambda which, adapted=adapted: features_of(base, adapted, part(which))
                logits = logits_of(base, adapted, part(rest), task.names)
                seen = Seen(of(rest), logits, of(rows), labels, task.text, task.scale)
                chosen = _checked(self.acquire(seen, count, rng), count, len(rest))
            asked, rest = rest[chosen], np.delete(rest, chosen)
            rows, labels = np.concatenate([rows, asked]), np.concatenate([labels, np.asarray(ask(asked))])
            few, others = part(rows)._replace(labels=labels), part(rest) if len(rest) else None
            adapted = adapt(base, few, validation, task._replace(pool=others))
            yield Learned(adapted, rows, labels)


def plan(*, budget: int, rounds: int | None, acquisition: str | Mapping[str, Any] | None, pool: int) -> Plan | None:
    """Returns the rounds, or None for a budget of 0.

    Args:
      budget: labels of all rounds; the first rounds have one more if the rounds do not divide it.
      rounds: defaults to 8, or the budget if that is less.
      acquisition: a strategy of the family `acquisitions`, by name or as {"name": "pcb", "share": 0.2}; defaults to
        "pcb".
      pool: number of pictures to choose from.

    Raises:
      UserError: the pool is too small, there are more rounds than labels, or rounds without a budget.
    """
    if not budget:
        if rounds is not None or acquisition is not None:
            raise UserError("rounds and acquisition spend a budget of labels; give budget, too (--budget=64)")
        return None
    if not 1 <= budget <= pool:
        raise UserError(f"the budget is {budget} labels of a pool of {pool} pictures; expected 1 to {pool}: raise pool")
    rounds = min(ROUNDS, budget) if rounds is None else rounds
    if not 1 <= rounds <= budget:
        raise UserError(f"{rounds} rounds spend a budget of {budget} labels; expected 1 to {budget} rounds")
    acquire = catalogue.build("acquisitions", acquisition or STRATEGY, "the acquisition of few_shot")
    return Plan(tuple(len(part) for part in np.array_split(np.arange(budget), rounds)), acquire)


def imbalance(labels: np.ndarray, classes: int) -> float:
    """Returns the standard deviation over classes of the number of labels, over its mean."""
    counts = np.bincount(labels, minlength=classes)
    return float(counts.std() / counts.mean())


def _checked(rows: np.ndarray, count: int, size: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.shape != (count,) or len(np.unique(rows)) < count or rows.min() < 0 or rows.max() >= size:
        raise UserError(f"the strategy chose rows {rows.tolist()[:8]}; expected {count} different ones below {size}")
    return rows
