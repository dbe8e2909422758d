"""Averages and arithmetic of parameter trees: WiSE-FT, soups, task vectors.

All functions take parameter trees. Trees must agree in names, shapes and dtypes; else a UserError names the first
parameter that differs.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.params.table import check_alike


@method(
    family="averages",
    paper="arXiv:2109.01903",
    where="section 3",
    differs="between the pretrained and the tuned parameters",
)
def wise_ft(base: Any, tuned: Any, alpha: float | jax.Array) -> Any:
    """Returns (1 - alpha) base + alpha tuned (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903, section 3).

    alpha = 0 gives base and alpha = 1 gives tuned, bit for bit. alpha may be traced.
    """
    check_alike(base, tuned)

    def mix(b, t):
        between = ((1 - alpha) * b + alpha * t).astype(b.dtype)
        return jnp.where(alpha == 0, b, jnp.where(alpha == 1, t, between))

    return jax.tree.map(mix, base, tuned)


@method(
    family="averages",
    system="Model-soups",
    paper="arXiv:2203.05482",
    where="section 2",
    differs="the mean of models tuned from one beginning",
)
def uniform_soup(candidates: Sequence[Any]) -> Any:
    """Returns the mean of parameter trees (Wortsman et al. 2022, arXiv:2203.05482, section 2)."""
    if not candidates:
        raise UserError("the soup has no models; give at least one parameter tree")
    check_alike(*candidates)
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / len(leaves), *candidates)


@method(
    family="averages",
    system="Model-soups",
    paper="arXiv:2203.05482",
    where="recipe 1",
    differs="the mean of models that each help on held-out data",
)
def greedy_soup(candidates: Sequence[Any], score: Callable[[Any], float]) -> tuple[Any, list[int]]:
    """Returns (soup, indices of the candidates in the soup) (arXiv:2203.05482, Recipe 1).

    Tries the candidates in order. A candidate joins the soup if the mean's score does not fall on held-out data.

    Args:
      candidates: parameter trees, best score first.
      score: params -> number, higher is better.
    """
    if candidates:
        check_alike(*candidates)  # before scoring starts
    soup, taken = uniform_soup(candidates[:1]), [0]
    best = score(soup)
    for i in range(1, len(candidates)):
        trial = uniform_soup([candidates[j] for j in (*taken, i)])
        if (value := score(trial)) >= best:
            soup, best = trial, value
            taken.append(i)
    return soup, taken


@method(family="averages", paper="arXiv:2212.04089", where="section 2", differs="the difference that tuning makes")
def task_vector(base: Any, tuned: Any) -> Any:
    """Returns tuned - base (Ilharco et al. 2023, arXiv:2212.04089, section 2)."""
    check_alike(base, tuned)
    return optax.tree.sub(tuned, base)


@method(
    family="averages",
    paper="arXiv:2212.04089",
    where="sections 3 and 4",
    differs="several tasks at once, or one forgotten",
)
def add_task_vectors(base: Any, vectors: Sequence[Any], scale: float) -> Any:
    """Returns base + scale * (sum of vectors) (arXiv:2212.04089, sections 3 and 4).

    A positive scale adds several tasks at once; a negative scale forgets a task.
    """
    check_alike(base, *vectors)
    return optax.tree.add_scale(base, scale, functools.reduce(optax.tree.add, vectors)) if vectors else base


@method(family="averages", paper="arXiv:2212.04089", where="section 5", differs="a task from three others")
def analogy(a: Any, b: Any, c: Any) -> Any:
    """Returns the task vector d = c + (b - a), where a is to b as c is to d (arXiv:2212.04089, section 5)."""
    check_alike(a, b, c)
    return optax.tree.add(c, optax.tree.sub(b, a))


class Running:
    """The weighted mean of parameters along a training run; the last ones without weights.

    PromptSRC (Khattak et al. 2023, arXiv:2307.06948, section 3.2.2) weighs epochs by a Gaussian.

    Attributes:
      params: the mean so far.
    """

    def __init__(self, weight: Callable[[float], float] | None = None):
        """`weight`: share of the training in (0, 1] -> a weight of 0 or more, of any sum."""
        self.params, self._weight, self._total = None, weight, 0.0

    def add(self, params: Any, share: float) -> None:
        """Adds the parameters after a share of the training."""
        weight = 0.0 if self._weight is None else float(self._weight(share))
        if not self._total:
            self.params = params
        elif weight:
            step = weight / (self._total + weight)
            self.params = jax.tree.map(lambda mean, new: mean + step * (new - mean), self.params, params)
        self._total += weight


def gaussian(mean: float, std: float) -> Callable[[float], float]:
    """Returns exp(-(t - mean)^2 / (2 std^2)) of a share t of the training."""
    if not std > 0:
        raise UserError(f"the spread of the weights of epochs is {std}; expected above 0")
    return lambda share: math.exp(-0.5 * ((share - mean) / std) ** 2)
