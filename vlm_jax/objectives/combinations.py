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
        g, h = gradients[keep], gradients[against]
        dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
        square = dot(h, h)
        share = strength * jnp.minimum(dot(g, h), 0) / jnp.where(square == 0, 1, square)
        return jax.tree.map(lambda x, y: x - share * y, g, h)

    return combine
