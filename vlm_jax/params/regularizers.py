"""Regularizers that pull parameters towards pretrained values during training: mixout, L2-SP, EWC."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.params.table import check_alike, map_with_name


@method(
    family="regularizers",
    paper="arXiv:1909.11299",
    where="section 4",
    differs="scalars become pretrained ones at random",
)
def mixout(rng: jax.Array, params: Any, base: Any, p: float) -> Any:
    """Returns params with random scalars reset to base, with probability p (Lee et al. 2020, arXiv:1909.11299).

    (mix - p base) / (1 - p), where mix is base with probability p and params otherwise. The expectation is params.
    p = 0 gives params, and replaced scalars equal base, bit for bit (for finite numbers). Scalars are drawn one by one
    (the paper's mixconnect); the authors' code draws all weights of one input of a kernel together.

    Args:
      rng: key of this step; each parameter draws from its own key, by name.
      params: the trained parameters; gradients flow to the scalars that are not replaced.
      base: pretrained parameters.
      p: in [0, 1).
    """
    if not 0 <= p < 1:
        raise UserError(f"p of mixout is {p}; expected at least 0 and less than 1")
    check_alike(params, base)

    def mix(name, w, pretrained):
        replaced = jax.random.bernoulli(rng_of(rng, name), p, w.shape)
        # For replaced scalars (base - p base) / (1 - p) equals base; base itself loses no bit.
        return jnp.where(replaced, pretrained, (w - p * pretrained) / (1 - p))

    return map_with_name(mix, params, base)


@method(
    family="regularizers",
    paper="arXiv:1802.01483",
    where="section 3",
    differs="a squared distance from pretrained parameters",
)
def l2_sp(params: Any, base: Any, weight: float) -> jax.Array:
    """Returns weight / 2 * |params - base|^2, the penalty L2-SP (Li et al. 2018, arXiv:1802.01483, section 3).

    Pass only pretrained parameters; a new head has no base (the paper applies weight decay there).
    """
    check_alike(params, base)
    return weight / 2 * optax.tree.norm(optax.tree.sub(params, base), squared=True)


def l2_sp_gradient(params: Any, base: Any, weight: float) -> Any:
    """Returns weight * (params - base), the gradient of `l2_sp`, to add to other gradients."""
    check_alike(params, base)
    return optax.tree.scale(weight, optax.tree.sub(params, base))


@method(
    family="regularizers",
    paper="arXiv:1612.00796",
    where="equation 3",
    differs="a squared distance from earlier parameters, weighted by how much earlier data need each of them",
)
def ewc(params: Any, base: Any, fisher: Any, weight: float) -> jax.Array:
    """Returns weight / 2 * sum_i F_i (params_i - base_i)^2, the penalty of EWC (Kirkpatrick et al. 2017).

    F is the diagonal of the Fisher information: the mean square of the gradients on earlier data. In a run, the
    transform `ewc` of the optimizer estimates F and adds the gradient, see `params.transforms`.
    """
    check_alike(params, base, fisher)
    squares = jax.tree.map(lambda p, b, f: jnp.sum(f * jnp.square(p - b)), params, base, fisher)
    return weight / 2 * sum(jax.tree.leaves(squares))


def ewc_gradient(params: Any, base: Any, fisher: Any, weight: float) -> Any:
    """Returns weight * F * (params - base), the gradient of `ewc`, to add to other gradients."""
    return jax.tree.map(lambda p, b, f: weight * f * (p - b), params, base, fisher)


def rng_of(rng: jax.Array, name: str) -> jax.Array:
    """Returns the key of one parameter; the key depends on `rng` and `name` alone."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))
