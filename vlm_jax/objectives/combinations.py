"""Combinations: what happens to the gradients of several terms, instead of their sum."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE


@method(
    family="combinations",
    paper="arXiv:2205.14865",
    where="equation 5",
    differs="one term's gradient loses what works against another term",
    needs={"objective.combine": {"name": "project", "keep": "contrastive", "against": "captioning"}},
)
def project(*, keep: str, against: str, strength: float = 1.0) -> Callable:
    """g - strength (g . h / |h|^2) h where g . h < 0, else g (ProGrad, Zhu et al. 2023).

    g and h are the gradients of the terms `keep` and `against`, each one vector over all parameters. The gradient of
    `against` itself moves nothing.
    """

    def combine(gradients: Mapping[str, Any], params: Any) -> Any:
        for name in (keep, against):
            if name not in gradients:
                raise UserError(f"{WHERE}.combine: there is no term `{name}`; the terms: {', '.join(gradients)}")
        rest = [one for name, one in gradients.items() if name not in (keep, against)]
        return jax.tree.map(lambda *x: sum(x), _without(gradients[keep], gradients[against], strength), *rest)

    return combine


@method(
    family="combinations",
    system="CMA-GradHarm",
    paper="arXiv:2211.02077",
    differs="terms lose what works against each other; batches on which they conflict much count for nothing",
    needs={"objective.combine": {"name": "harmonise"}},
)
def harmonise(*, drop_below: float = -1.0) -> Callable:
    """The sum over terms of g_i without what works against each other term's g_j (Wu et al. 2022), in the terms' order.

    g_i <- g_i - (g_i . g_j / |g_j|^2) g_j where g_i . g_j < 0, as in PCGrad (arXiv:2001.06782). Of two terms, neither
    moves against the other. Without conflicts the result is the sum, bit for bit.

    Args:
      drop_below: batches count for nothing if the cosine of two terms' gradients is below this number; -1 drops none.
        The paper drops examples as noise, and raises the threshold during training; here it is constant, and the
        optimizer's moments and decay go on.
    """
    if not -1 <= drop_below < 0:
        raise UserError(f"{WHERE}.combine.drop_below is {drop_below}; expected a cosine from -1 (none) to below 0")

    def combine(gradients: Mapping[str, Any], params: Any) -> Any:
        total, lowest = [], jnp.inf
        for name, own in gradients.items():
            kept = own
            for other, against in gradients.items():
                if other != name:
                    kept = _without(kept, against)
                    norms = jnp.sqrt(_dot(own, own) * _dot(against, against))
                    lowest = jnp.minimum(lowest, _dot(own, against) / jnp.where(norms == 0, 1, norms))
            total.append(kept)
        total = jax.tree.map(lambda *x: sum(x), *total)
        if drop_below == -1:
            return total
        return jax.tree.map(lambda x: jnp.where(lowest < drop_below, 0, x), total)

    return combine


def _dot(a: Any, b: Any) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def _without(g: Any, h: Any, strength: float = 1.0) -> Any:
    """Returns g - strength (g . h / |h|^2) h where g . h < 0, else g."""
    square = _dot(h, h)
    share = strength * jnp.minimum(_dot(g, h), 0) / jnp.where(square == 0, 1, square)
    return jax.tree.map(lambda x, y: x - share * y, g, h)
