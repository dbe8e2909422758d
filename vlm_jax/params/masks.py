"""Which parameters train: masks over parameter trees.

A mask is a tree like the parameters. Its leaves are bools, or bool arrays that broadcast to the parameter: [layers, 1,
...] if a scanned stack trains in part, the parameter's own shape if single scalars train.
"""

import re
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.params import layers
from vlm_jax.params.regularizers import rng_of
from vlm_jax.params.table import check_alike, check_names, map_with_name, match_rules, named_leaves

CHOICES = {
    "bias": r".*/bias",  # BitFit: Ben Zaken et al. 2022, arXiv:2106.10199; without its task head
    "norm": r"(.*/)?\w*norm[12]?/(scale|bias)",  # Zhao et al. 2024, arXiv:2312.11420
    "cross_attention": r"(.*/)?cross_attn/.*",  # Gheini et al. 2021, arXiv:2104.08771
    "head": r"(.*/)?(image_|text_)?head/.*",  # a linear probe
}


def trainable(params: Any, spec: str | Sequence[tuple[str, Any]], where: str = "trainable") -> Any:
    """Returns the mask of the parameters that train.

    Args:
      params: parameter tree, arrays or shapes.
      spec: a first-match table `((regex, mask), ...)` that covers every name; a mask is True, False, or an array or
        nested list of bools that broadcasts to the parameter; or one of
        "bias": biases alone (BitFit).
        "norm": scales and biases of the norms.
        "cross_attention": the projections of cross-attention.
        "head": projection heads.
        "last_<k>": the last k blocks of every tower and all later modules (norms, pools, heads, logit scale and bias).
        "<path>.npz": masks by name, as `np.savez(path, **named_leaves(mask))` writes them; other parameters are frozen.
      where: name of the spec in messages.

    Raises:
      UserError: the name is unknown, the table or a mask does not fit, a tower has fewer than k blocks, or the file
        cannot be read.
    """
    if isinstance(spec, str):
        if match := re.fullmatch(r"last_(\d+)", spec):
            return _last(params, int(match[1]), where)
        if spec.endswith(".npz"):
            spec = (*_read(spec, where), (".*", False))
        elif spec in CHOICES:
            spec = ((CHOICES[spec], True), (".*", False))
        else:
            raise UserError(
                f"{where} is `{spec}`; expected a table or one of: {', '.join(CHOICES)}, last_<k>, <path>.npz"
            )
    matched = match_rules(spec, named_leaves(params), where=where)
    mask = {name: _bools(m, f"{where}: the mask of `{name}`") for name, m in matched.items()}
    _check_mask(mask, named_leaves(params), f"{where}: ")
    return map_with_name(lambda name, _: mask[name] if mask[name].ndim else bool(mask[name]), params)


def rules(mask: Any) -> tuple[tuple[str, Any], ...]:
    """Returns the table of a mask, for `trainable`; parameters that it lacks are frozen."""
    return (*((re.escape(name), m) for name, m in named_leaves(mask).items() if np.any(m)), (".*", False))


def _last(params, k, where):
    places = layers.places(params)
    depths = {place.tower: place.depth for place in places.values() if place.depth}
    if not depths:
        raise UserError(f"{where} is `last_{k}`, but no parameter is in `blocks`; give a table of names")
    for tower, depth in depths.items():
        if k > depth:
            raise UserError(f"{where} is `last_{k}`, but `{tower}blocks` has {depth} blocks; expected k <= {depth}")

    def mask(name, _):
        chosen = places[name].layer > max(places[name].depth - k, 0)
        return bool(np.any(chosen)) if np.all(chosen) == np.any(chosen) else chosen

    return map_with_name(mask, params)


def _read(path, where):
    """Returns the rules of a file of masks by name."""
    try:
        return [(re.escape(name), mask) for name, mask in dict(np.load(path, allow_pickle=False)).items()]
    except Exception:  # numpy, zipfile and zlib raise many kinds
        raise UserError(f"{where} is `{path}`, which cannot be read; expected an .npz file of bools by name") from None


def _bools(mask, what):
    try:
        mask = np.asarray(mask)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{what}: {error}") from None
    if mask.dtype != np.bool_:
        raise UserError(f"{what} is {mask.dtype}; expected bools")
    return mask


def count(mask: Any, params: Any) -> int:
    """Returns the number of scalars that train; params are arrays or shapes."""
    _check_mask(mask, params)
    return sum(jax.tree.leaves(jax.tree.map(lambda m, p: size(m, p.size), mask, params)))


def size(mask: bool | np.ndarray, scalars: int) -> int:
    """Returns how many scalars of a parameter train, of so many."""
    return int(np.sum(mask)) * (scalars // np.size(mask))


def trainable_leaves(mask: Any) -> Any:
    """Returns a tree of bools for `value_and_grad` and `optax.masked`: whether any part of a parameter trains.

    If a part of a parameter trains, `apply` masks the rest.
    """
    return jax.tree.map(lambda m: bool(np.any(m)), mask)


def apply(mask: Any, gradients: Any) -> Any:
    """Returns the gradients with zeros where the mask is False, even in place of NaN.

    If the optimizer decays weights, apply the mask to the updates too: decay also moves parameters without gradient.
    """
    _check_mask(mask, gradients)

    def masked(m, g):
        if isinstance(m, bool):
            return g if m else jnp.zeros_like(g)
        return jnp.where(m, g, jnp.zeros_like(g))

    return jax.tree.map(masked, mask, gradients)


def chosen(mask: bool | np.ndarray, shape: tuple[int, ...]) -> Any:
    """Returns the index of what trains in a parameter: all, the chosen rows, or the chosen scalars as a vector."""
    if np.all(mask):
        return ...
    mask = mask.reshape((1,) * (len(shape) - mask.ndim) + mask.shape)
    while mask.shape[-1] == 1:
        mask = mask[..., 0]
    return np.nonzero(np.broadcast_to(mask, shape[: mask.ndim]))


def largest(scores: Any, k: int) -> Any:
    """Returns the mask of the k scalars with the largest scores, a tree like `scores`; ties go to the first.

    Raises:
      UserError: a score is not finite, or there are fewer than k scalars.
    """
    for name, leaf in named_leaves(scores).items():
        if not np.all(np.isfinite(leaf)):
            raise UserError(f"`{name}` has scores of NaN or infinity, which have no rank; check what they were made of")
    return _largest(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(scores)]), scores, k)


def largest_moves(base: Any, tuned: Any, k: int) -> Any:
    """Returns the mask of the k scalars with the largest |tuned - base|; ties go to the first.

    Lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560, section 3.1): tune everything, compute this
    mask, and tune again from base under the mask; `adapt --method=lt_sft`.

    Raises:
      UserError: the trees differ, a difference is not finite, or there are fewer than k scalars.
    """
    check_alike(base, tuned)

    def moved(name, old, new):
        distance = np.abs(np.asarray(new, np.float32) - np.asarray(old, np.float32))
        if not np.all(np.isfinite(distance)):
            raise UserError(f"`{name}` moved by NaN or infinity, which has no rank; check the run that tuned it")
        return distance

    return largest(map_with_name(moved, base, tuned), k)


def of_blocks(params: Any, chosen: Collection[tuple[str, int]]) -> Any:
    """Returns the mask of whole blocks, (tower, number from 1) each, such as ("image/", 2); see `layers.places`."""
    places = layers.places(params)

    def mask(name, _):
        place = places[name]
        inside = np.vectorize(lambda i: (place.tower, int(i)) in chosen and i <= place.depth, otypes=[bool])
        found = inside(place.layer)
        return bool(np.any(found)) if np.all(found) == np.any(found) else found

    return map_with_name(mask, params)


def drawn(name: str, shape: tuple[int, ...], share: float, seed: int = 0) -> jax.Array:
    """Returns a random mask of one parameter, False with probability `share`; depends on arguments alone."""
    return jax.random.uniform(rng_of(jax.random.key(seed), name), shape, jnp.float32) >= share


def random_mask(rng: jax.Array, params: Any, k: int) -> Any:
    """Returns the mask of k random scalars, a control for `largest_moves`; params are arrays or shapes."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return _largest(np.asarray(jax.random.bits(rng, (size,), jnp.uint32)), params, k)


def _largest(scores, params, k):
    """Returns the mask of the k largest scores; `scores` has one entry for each scalar of params, in tree order."""
    if not 1 <= k <= scores.size:
        raise UserError(f"the mask asks for k = {k} scalars of {scores.size:,}; expected 1 <= k <= {scores.size:,}")
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    chosen = scores > threshold
    chosen[np.flatnonzero(scores == threshold)[: k - np.sum(chosen)]] = True
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(chosen, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _check_mask(mask, params, where=""):
    check_names(mask, params)
    leaves = named_leaves(params)
    for name, m in named_leaves(mask).items():
        shape = leaves[name].shape
        try:
            fits = np.broadcast_shapes(np.shape(m), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise UserError(
                f"{where}the mask of `{name}` is {list(np.shape(m))}; expected to broadcast to {list(shape)}"
            )
