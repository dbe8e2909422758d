"""Turns scores of examples into an index: which examples a run reads, and with which weights.

    rules = "least('characters', 5) | top('similarity', 0.3) | unlike(0.95) | cap('concept', 100)"
    chosen = select(read("runs/scores"), rules)

The rules are ops whose example is the whole table: a dict of columns [n], the artifacts of `pair_scores`.
"""

import os
from pathlib import Path
from typing import Annotated

import numpy as np
from scipy.cluster.vq import kmeans2

from vlm_jax.data import index, ops
from vlm_jax.data.files import replacing
from vlm_jax.data.ops import op
from vlm_jax.errors import UserError
from vlm_jax.evaluators.tasks.pair_scores import number_of
from vlm_jax.pretrained.linear import logistic_regression

Columns = dict[str, np.ndarray]
BLOCK = 4096  # rows whose similarities are computed at once


def read(folder: str | os.PathLike) -> Columns:
    """Returns the columns of a folder of `vlm-jax score`.

    Raises:
      UserError: the folder holds no scores, or they are damaged.
    """
    path = Path(folder).expanduser() / "artifacts" / "pair_scores.npz"
    if not path.is_file():
        raise UserError(f"{folder} holds no scores; write them with `vlm-jax score`")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception:  # of damaged files, dozens of types
        raise UserError(f"the scores of {folder} are damaged; delete the folder and score again") from None


def select(columns: Columns, rules: str, seed: int = 0) -> Columns:
    """Returns the chosen rows, in the order of their records, after rules joined by `|`; the seed is of `cap`'s draws.

    Raises:
      UserError: a rule is unknown, needs a column that is not there, or leaves no row.
    """
    pipeline = ops.parse(rules)
    rng, order = np.random.default_rng(seed), np.argsort(columns["record"], kind="stable")
    columns = _rows(columns, order)
    for step in (*pipeline.before, *pipeline.after):
        if step.name not in RULES:
            raise UserError(f"`{step.name}` is no rule; expected one of {', '.join(sorted(RULES))}")
        columns = step(columns, rng)
        if not len(columns["record"]):
            raise UserError(f"the rule `{step.name}` leaves no example of those before it")
    return columns


def write(columns: Columns, path: str | os.PathLike) -> None:
    """Writes the index, `data.index` of a config: the records, and their weights if a rule has set some."""
    arrays = {"index": columns["record"].astype(np.int64)}
    arrays |= {"weight": columns["weight"]} if "weight" in columns else {}
    with replacing(path) as out:
        np.savez(out, **arrays)


def _rows(columns: Columns, chosen: np.ndarray) -> Columns:
    return {name: column[chosen] for name, column in columns.items()}


def _column(columns: Columns, name: str) -> np.ndarray:
    if name not in columns:
        how = "score with --embeddings" if name == "embedding" else f"score with --fields={name}"
        raise UserError(f"the scores have no column `{name}` ({', '.join(columns)}); {how}")
    return columns[name]


@op
def least(example: dict, field: str, value: float) -> dict:
    """Examples with at least this value."""
    return _rows(example, _column(example, field) >= value)


@op
def most(example: dict, field: str, value: float) -> dict:
    """Examples with at most this value."""
    return _rows(example, _column(example, field) <= value)


@op
def among(example: dict, field: str, value: str | float, *values: str | float) -> dict:
    """Examples with one of these values."""
    return _rows(example, np.isin(_column(example, field), [number_of(one) for one in (value, *values)]))


@op
def top(example: dict, field: str, share: float) -> dict:
    """The share of examples with the highest values: 0.3 by similarity is DataComp's filter (arXiv:2304.14108)."""
    _check_share("top", share)
    return _rows(example, _best(_column(example, field), share))


@op
def like(example: dict, good: str, share: float) -> dict:
    """The share that a classifier on embeddings takes for examples of the index `good` (as DFN, arXiv:2309.17425)."""
    _check_share("like", share)
    wanted, _ = index.read(good, int(example["record"].max()) + 1, "the scores")
    labels = np.isin(example["record"], wanted).astype(int)
    if not 0 < labels.sum() < len(labels):
        raise UserError(
            f"rule `like`: index `{good}` holds {labels.sum()} of the {len(labels)} examples; expected some"
        )
    features = _column(example, "embedding").astype(np.float32)
    scores = logistic_regression(features, labels, classes=2, l2=1.0)(features)
    return _rows(example, _best(scores[:, 1] - scores[:, 0], share))


@op
def cap(example: dict, rng: np.random.Generator, field: str, n: Annotated[int, range(1, 2**31)]) -> dict:
    """At most n examples of each value, drawn: balanced metadata (MetaCLIP, arXiv:2309.16671)."""
    values = _column(example, field)
    order = rng.permutation(len(values))
    order = order[np.argsort(values[order], kind="stable")]
    _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
    place = np.arange(len(values)) - np.repeat(starts, counts)  # of each example among those of its value
    return _rows(example, np.sort(order[place < n]))


@op
def unlike(
    example: dict,
    rng: np.random.Generator,
    similarity: float = 0.95,
    best: str = "similarity",
    clusters: Annotated[int, range(1, 2**20)] = 1,
) -> dict:
    """Without near duplicates: of pictures whose cosine is above `similarity`, that with the highest `best` stays.

    With clusters (k-means), only pictures of a cluster are compared (SemDeDup, arXiv:2303.09540).
    """
    features, value = _column(example, "embedding").astype(np.float32), _column(example, best)
    groups = np.zeros(len(features), int)
    if clusters > 1:
        _, groups = kmeans2(features, min(clusters, len(features)), minit="++", rng=rng)
    kept = np.zeros(len(features), bool)
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        own = own[np.argsort(-value[own], kind="stable")]
        kept[own[_first_of_kind(features[own], similarity)]] = True
    return _rows(example, kept)


def _first_of_kind(features: np.ndarray, similarity: float) -> np.ndarray:
    """The places of rows [n, D] that no kept row before them is nearer to than `similarity`."""
    kept = np.zeros(0, int)
    for start in range(0, len(features), BLOCK):
        own = np.arange(start, min(start + BLOCK, len(features)))
        own = own[~(features[own] @ features[kept].T > similarity).any(1)] if len(kept) else own
        near = np.triu(features[own] @ features[own].T > similarity, 1)
        alive = np.ones(len(own), bool)
        for i in range(len(own)):
            if alive[i]:
                alive &= ~near[i]
        kept = np.concatenate([kept, own[alive]])
    return kept


@op
def weigh(example: dict, field: str, power: float = 1.0) -> dict:
    """Sets weights: the value to this power, with mean 1; negative values count as 0."""
    weight = np.maximum(_column(example, field).astype(np.float64), 0) ** power
    if not weight.sum() or not np.isfinite(weight).all():
        raise UserError(f"rule `weigh`: no `{field}` to the power {power} is a weight")
    return example | {"weight": weight / weight.mean()}


RULES = {name for name, value in list(globals().items()) if ops.OPS.get(name) is value}


def _best(values: np.ndarray, share: float) -> np.ndarray:
    """The places of the highest values, in order; of equal values the first."""
    count = max(round(share * len(values)), 1)
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _check_share(rule: str, share: float) -> None:
    if not 0 < share <= 1:
        raise UserError(f"rule `{rule}`: share is {share}; expected a share above 0, at most 1")
