"""Ranks of low-rank updates by importance, under a budget that falls over the run (AdaLoRA)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.params.table import map_with_name, named_leaves

PARTS = ("inserted_singular", "inserted_a", "inserted_b")


class Allocated(NamedTuple):
    """The state of `allocated`: of the inner optimizer, the steps, averages of sensitivity and of uncertainty."""

    inner: Any
    count: jax.Array
    sensitivity: Any
    uncertainty: Any


def allocated(
    inner: optax.GradientTransformation,
    section: Mapping[str, Any],
    steps: Callable[[int | str], int],
    where: str,
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, after whose steps singular values are 0 but for the most important ones.

    AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): with averages m of I = |p g| and u of |I - m|, a scalar has the score
    s = m u; the term i of a place has s(w_i) + mean s(a_i) + mean s(b_i), a_i [in] and b_i [out]. Of all terms of all
    places, the best n(t) stay:

        n(t) = n_T + (n_0 - n_T) (1 - (t - begin) / (end - begin))^3,   n_0 all terms, n_T = rank * places

    Section keys:
      rank: the mean rank of a place (of each block in a scan) at the end.
      begin, end: durations; all terms stay before `begin`; from `end` on, scores and terms stay as they are.
      every: number of steps between two allocations; terms may come back in between.
      b1, b2: decays of the averages of I and of |I - m|.

    Args:
      inner: of parameters named `PARTS`, three for each place.
      section: as above.
      steps: duration -> number of steps of the run.
      where: name of the section in messages.
    """
    rank, every, b1, b2, *window = config.call(_options, section, where)
    if rank <= 0 or every < 1 or not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise UserError(f"{where}: rank={rank}, every={every}, b1={b1}, b2={b2}; expected above 0, 1 or more, 0 to 1")
    begin, end = map(steps, window)

    def terms(tree):
        """[(w [..., r], a [..., in, r], b [..., r, out])] of each place."""
        leaves = named_leaves(tree)
        places = [name.removesuffix(PARTS[0]) for name in leaves if name.endswith(PARTS[0])]
        if not places or any(place + part not in leaves for place in places for part in PARTS):
            raise UserError(f"{where} is for the singular values and both factors of LowRank(weights='singular')")
        return {place: [leaves[place + part] for part in PARTS] for place in places}

    def init(params):
        terms(params)
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return Allocated(inner.init(params), jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(gradients, state, params=None, **others):
        moved, after = optax.with_extra_args_support(inner).update(gradients, state.inner, params, **others)
        count, learns = state.count, state.count < end
        now = jax.tree.map(lambda p, g: jnp.abs(p * g), params, gradients)
        average = lambda decay: lambda old, new: jnp.where(learns, decay * old + (1 - decay) * new, old)
        sensitivity = jax.tree.map(average(b1), state.sensitivity, now)
        apart = jax.tree.map(lambda new, mean: jnp.abs(new - mean), now, sensitivity)
        uncertainty = jax.tree.map(average(b2), state.uncertainty, apart)
        scores = {
            place: w + jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1)
            for place, (w, a, b) in terms(jax.tree.map(jnp.multiply, sensitivity, uncertainty)).items()
        }
        stay = _best(scores, lambda total, places: budget(count, total, rank * places))
        active = (count >= begin) & ((count >= end) | ((count - begin) % every == 0))
        cut = lambda name, u, p: (
            jnp.where(~active | stay[name.removesuffix(PARTS[0])], u, -p) if name.endswith(PARTS[0]) else u
        )
        moved = map_with_name(cut, moved, params)
        return moved, Allocated(after, count + 1, sensitivity, uncertainty)

    def budget(count, total, least):
        left = jnp.clip(1 - (count - begin) / max(end - begin, 1), 0, 1)
        return jnp.floor(least + (total - least) * left**3)

    return optax.GradientTransformationExtraArgs(init, update)


def _options(
    *,
    rank: float,
    begin: int | str = "10%",
    end: int | str = "70%",
    every: int = 10,
    b1: float = 0.85,
    b2: float = 0.85,
) -> tuple:
    return rank, every, b1, b2, begin, end


def _best(scores: Mapping[str, jax.Array], count: Callable) -> dict[str, jax.Array]:
    """Returns the masks of the `count(terms, places)` largest scores of all; of equal ones, the first."""
    joined = jnp.concatenate([jnp.ravel(x) for x in scores.values()])
    places = sum(x.size // x.shape[-1] for x in scores.values())
    order = jnp.argsort(-joined, stable=True)
    stays = jnp.zeros(joined.size, bool).at[order].set(jnp.arange(joined.size) < count(joined.size, places))
    found, start = {}, 0
    for place, x in scores.items():
        found[place] = stays[start : start + x.size].reshape(x.shape)
        start += x.size
    return found
