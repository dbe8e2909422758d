"""A budget of parameters, spent where scalars are sensitive: single scalars, whole vectors, low-rank updates (SPT)."""

import math
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.params import layers
from vlm_jax.params.table import named_leaves


class Allocation(NamedTuple):
    """What trains.

    Attributes:
      scalars: parameter -> bools, of the scalars that train.
      low_rank: kernel -> True, or bools [layers] of a stack: the matrices that get a low-rank update.
      count: the number of trained scalars, those of low-rank updates included.
    """

    scalars: dict[str, np.ndarray]
    low_rank: dict[str, np.ndarray]
    count: int


def allocate(scores: Any, budget: int, rank: int, share: float = 0.2) -> Allocation:
    """Returns the largest allocation within a budget (SPT, arXiv:2303.08566, in the authors' code).

    The tau most sensitive scalars train, tau as large as the budget allows, but for the matrices and vectors that hold
    many of them: a matrix [in, out] of a dense layer in blocks with share * r (in + out) of them or more gets an update
    of rank r instead, a vector with share * its size or more trains whole. The cost never falls with tau, so the
    largest tau is exact; the authors try 80 values.

    Args:
      scores: tree of sensitivities, >= 0; layers of a stack are matrices and vectors of their own.
      budget: number of scalars.
      rank: r; a matrix of r (in + out) scalars or fewer stays with single scalars.
      share: as above; 0 is low rank for every matrix with a sensitive scalar.

    Raises:
      UserError: an option is out of range, or the budget buys nothing.
    """
    if rank < 1 or not 0 <= share <= 1:
        raise UserError(f"a budget has rank {rank} and share {share}; expected 1 or more, and 0 to 1")
    places, leaves = layers.places(scores), {k: np.asarray(v) for k, v in named_leaves(scores).items()}
    units = [unit for name, leaf in leaves.items() for unit in _units(name, leaf, places[name], rank, share)]
    sizes, limits, costs = (np.array([unit[i] for unit in units]) for i in range(3))
    flat = np.concatenate([leaf.ravel() for leaf in leaves.values()])
    order = np.argsort(-flat, kind="stable")
    unit = np.repeat(np.arange(len(units)), sizes)[order]
    nth = _occurrence(unit, len(units))  # 1 for the most sensitive scalar of its unit
    grows = np.where(nth < limits[unit], 1, np.where(nth == limits[unit], costs[unit] - limits[unit] + 1, 0))
    spent = np.cumsum(grows)
    tau = int(np.searchsorted(spent, budget, side="right"))
    if not tau:
        raise UserError(f"a budget of {budget} scalars trains nothing; the first choice takes {int(spent[0])}")
    counts = np.bincount(unit[:tau], minlength=len(units))
    whole = counts >= limits
    chosen = np.zeros(flat.size, bool)
    chosen[order[:tau]] = True
    scalars, low_rank, at, scalar = {}, {}, 0, 0
    for name, leaf in leaves.items():
        n = len(_units(name, leaf, places[name], rank, share))
        mask = chosen[scalar : scalar + leaf.size].reshape(n, -1)
        full = whole[at : at + n]
        if _matrix(name, leaf, places[name]):
            low_rank |= {name: full if np.ndim(places[name].layer) else full[0]} if np.any(full) else {}
            mask = mask & ~full[:, None]
        else:
            mask = mask | full[:, None]
        scalars |= {name: mask.reshape(leaf.shape)} if np.any(mask) else {}
        at, scalar = at + n, scalar + leaf.size
    return Allocation(scalars, low_rank, int(spent[tau - 1]))


def _matrix(name, leaf, place):
    """Whether a parameter is the kernel of a dense layer in blocks."""
    stacked = np.ndim(place.layer) > 0
    inside = np.all((np.asarray(place.layer) >= 1) & (np.asarray(place.layer) <= place.depth)) and place.depth
    return bool(inside) and name.split("/")[-1] == "kernel" and leaf.ndim - stacked == 2


def _units(name, leaf, place, rank, share):
    """[(size, scalars from which it is taken whole, what it then costs)] of each layer of a parameter."""
    stacked = np.ndim(place.layer) > 0
    n, shape = (leaf.shape[0], leaf.shape[1:]) if stacked else (1, leaf.shape)
    size, never = math.prod(shape), (math.prod(shape) + 1, 0)
    if _matrix(name, leaf, place):
        cost = rank * sum(shape)
        end = (max(math.ceil(share * cost), 1), cost) if cost < size else never
    else:
        end = (max(math.ceil(share * size), 1), size) if len(shape) == 1 else never
    return [(size, *end)] * n


def _occurrence(unit, n):
    """How often the unit of each entry has come, the entry itself included."""
    by = np.argsort(unit, kind="stable")
    counts = np.bincount(unit, minlength=n)
    nth = np.empty(len(unit), int)
    nth[by] = np.arange(len(unit)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
    return nth
