"""Which parameters train, and what came of it: masks over parameter trees, and sparse diffs of two trees.

A mask is a tree like the parameters whose leaves are bools, or bool arrays that broadcast to the parameter: [layers,
1, ...] where a scanned stack trains in part, the parameter's own shape where single scalars do.
"""

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.parameter_table import map_with_name, match_rules, named_leaves
from vlm_jax.zoo.tensors import open_tensors, write_safetensors

CHOICES = {
    "bias": r".*/bias",  # BitFit: Ben Zaken et al. 2022, arXiv:2106.10199; without its task head
    "norm": r"(.*/)?\w*norm[12]?/(scale|bias)",  # Zhao et al. 2024, arXiv:2312.11420
    "cross_attention": r"(.*/)?cross_attn/.*",  # Gheini et al. 2021, arXiv:2104.08771
    "head": r"(.*/)?(image_|text_)?head/.*",  # a linear probe
}
_BEFORE_BLOCKS = (
    r"(.*/)?(patch_embed|pos_embed|cls|registers|pre_norm|token_embed|token_type_embed|relative|stem)(/.*)?"
)
_LAYER = re.compile(r"(.*)\[(\d+)\]")  # an entry of a diff: one layer of a stack


def trainable(params: Any, spec: str | Sequence[tuple[str, bool]]) -> Any:
    """Returns the mask of what trains.

    Args:
      params: parameter tree, arrays or shapes.
      spec: a first-match table `((regex, True | False), ...)` that covers every name, or one of
        "bias": biases alone (BitFit).
        "norm": scales and biases of the norms.
        "cross_attention": the projections of cross-attention.
        "head": projection heads.
        "last_<k>": the last k blocks of every tower and what follows them (norms, pools, heads, logit scale and bias).

    Raises:
      UserError: a name or table that fits nothing; a tower with fewer than k blocks.
    """
    if isinstance(spec, str):
        if match := re.fullmatch(r"last_(\d+)", spec):
            return _last(params, int(match[1]))
        if spec not in CHOICES:
            raise UserError(f"trainable is `{spec}`; expected a table or one of: {', '.join(CHOICES)}, last_<k>")
        spec = ((CHOICES[spec], True), (".*", False))
    matched = match_rules(spec, named_leaves(params), where="trainable")
    return map_with_name(lambda name, _: matched[name], params)


def _last(params, k):
    blocks = {name: re.fullmatch(r"((?:.*/)?)blocks(?:_(\d+))?/.*", name) for name in named_leaves(params)}
    depths: dict[str, int] = {}
    for name, leaf in named_leaves(params).items():
        if match := blocks[name]:
            depth = leaf.shape[0] if match[2] is None else int(match[2]) + 1
            depths[match[1]] = max(depth, depths.get(match[1], 0))
    if not depths:
        raise UserError(f"trainable is `last_{k}`, but no parameter is in `blocks`; give a table of names")
    for tower, depth in depths.items():
        if k > depth:
            raise UserError(f"trainable is `last_{k}`, but `{tower}blocks` has {depth} blocks; expected at most that")

    def mask(name, leaf):
        match = blocks[name]
        if match is None:
            return re.fullmatch(_BEFORE_BLOCKS, name) is None
        depth = depths[match[1]]
        if match[2] is not None:
            return int(match[2]) >= depth - k
        if k in (0, depth):
            return k > 0
        return (np.arange(depth) >= depth - k).reshape(depth, *(1,) * (leaf.ndim - 1))

    return map_with_name(mask, params)


def count(mask: Any, params: Any) -> int:
    """The number of scalars that train; params are arrays or shapes."""
    _check_mask(mask, params)
    parts = jax.tree.map(lambda m, p: int(np.sum(m)) * (p.size // np.size(m)), mask, params)
    return sum(jax.tree.leaves(parts))


def trainable_leaves(mask: Any) -> Any:
    """Tree of bool: whether anything of a parameter trains, as `value_and_grad` and `optax.masked` take it.

    Where some of a parameter trains, `apply` masks the rest.
    """
    return jax.tree.map(lambda m: bool(np.any(m)), mask)


def apply(mask: Any, gradients: Any) -> Any:
    """Returns the gradients with zeros where nothing trains, even in place of NaN.

    Apply it to an optimizer's updates too where it decays weights: decay moves what has no gradient.
    """
    _check_mask(mask, gradients)

    def masked(m, g):
        if isinstance(m, bool):
            return g if m else jnp.zeros_like(g)
        return jnp.where(m, g, jnp.zeros_like(g))

    return jax.tree.map(masked, mask, gradients)


def largest_moves(base: Any, tuned: Any, k: int) -> Any:
    """Returns the mask of the k scalars that moved most, in absolute value, from base to tuned; the first of equals.

    Lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560, section 3.1): tune everything, take this
    mask, begin again from base with it.

    Raises:
      UserError: the trees differ, a difference is not finite, or there are fewer than k scalars.
    """
    check_alike(base, tuned)

    def moved(name, old, new):
        distance = np.abs(np.asarray(new, np.float32) - np.asarray(old, np.float32))
        if not np.all(np.isfinite(distance)):
            raise UserError(f"`{name}` moved by NaN or infinity, which ranks nowhere; look at the run that tuned it")
        return distance.ravel()

    distances = jax.tree.leaves(map_with_name(moved, base, tuned))
    return _largest(np.concatenate(distances), base, k)


def random_mask(rng: jax.Array, params: Any, k: int) -> Any:
    """Returns the mask of k scalars drawn at random, the control of `largest_moves`; params are arrays or shapes."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return _largest(np.asarray(jax.random.bits(rng, (size,), jnp.uint32)), params, k)


def _largest(scores, params, k):
    """The mask of the k largest of scores, one for each scalar of params in tree order."""
    if not 1 <= k <= scores.size:
        raise UserError(f"a mask of k = {k} scalars of {scores.size:,}; expected 1 to as many as there are")
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    chosen = scores > threshold
    chosen[np.flatnonzero(scores == threshold)[: k - np.sum(chosen)]] = True
    leaves, structure = jax.tree.flatten(params)
    parts = np.split(chosen, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def diff(base: Any, tuned: Any) -> dict[str, np.ndarray]:
    """Returns `{name: array of tuned}` of the parameters whose bits differ, on the host.

    Of a scanned stack, `blocks/...`, it holds the layers that differ, each by itself: `{"blocks/norm1/scale[3]": [D]}`.

    Raises:
      UserError: the trees differ in names, shapes or dtypes.
    """
    check_alike(base, tuned)
    changed = {}
    old = named_leaves(base)
    for name, new in named_leaves(tuned).items():
        before, after = np.asarray(old[name]), np.asarray(new)
        if _is_stack(name):
            entries = [(f"{name}[{i}]", before[i], after[i]) for i in range(len(after))]
        else:
            entries = [(name, before, after)]
        # Bytes, as NaN equals nothing and -0.0 equals 0.0.
        changed |= {entry: new for entry, old, new in entries if old.tobytes() != new.tobytes()}
    return changed


def patch(base: Any, diff: Mapping[str, Any]) -> Any:
    """Returns base with the entries of a diff in place of its own.

    `patch(base, diff(base, tuned))` is tuned, bit for bit.

    Raises:
      UserError: an entry that base has not, or has with another shape or dtype.
    """
    _check_entries(base, diff, "the diff")
    whole = {}
    leaves = named_leaves(base)
    for entry, value in diff.items():
        if entry in leaves:
            whole[entry] = np.asarray(value)
        else:
            name, layer = _LAYER.fullmatch(entry).groups()
            stack = whole.setdefault(name, np.array(leaves[name]))
            stack[int(layer)] = np.asarray(value)
    return map_with_name(lambda name, leaf: jnp.asarray(whole[name]) if name in whole else leaf, base)


def save_diff(path: str | os.PathLike, diff: Mapping[str, Any]) -> None:
    """Writes a diff as one safetensors file."""
    write_safetensors(path, {name: np.asarray(value) for name, value in diff.items()})


def load_diff(path: str | os.PathLike, base: Any) -> dict[str, np.ndarray]:
    """Reads what `save_diff` wrote; base is the parameter tree that it belongs to, arrays or shapes.

    Raises:
      UserError: the file is damaged, or has an entry that base has not, or has with another shape or dtype.
    """
    tensors = open_tensors(path).tensors
    _check_entries(base, tensors, os.fspath(path))
    return {name: tensor.read() for name, tensor in tensors.items()}


def check_alike(first: Any, *others: Any) -> None:
    """Raises a UserError that names the first parameter in which trees differ by name, shape or dtype."""
    for other in others:
        _check_names(first, other)
        leaves = named_leaves(other)
        for name, leaf in named_leaves(first).items():
            if _kind(leaf) != _kind(leaves[name]):
                raise UserError(
                    f"the trees differ: `{name}` is {_kind(leaf)} in one and {_kind(leaves[name])} in another; "
                    "expected parameters of one model"
                )


def rng_of(rng: jax.Array, name: str) -> jax.Array:
    """The key of one parameter: the same whatever others there are."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def _check_names(first, other):
    one, two = named_leaves(first), named_leaves(other)
    for name in (*one, *two):
        if name not in one or name not in two:
            raise UserError(
                f"the trees differ: `{name}` is in one and not in another; expected parameters of one model"
            )


def _check_mask(mask, params):
    _check_names(mask, params)
    leaves = named_leaves(params)
    for name, m in named_leaves(mask).items():
        shape = leaves[name].shape
        try:
            fits = np.broadcast_shapes(np.shape(m), shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise UserError(f"the mask of `{name}` is {list(np.shape(m))}; expected to broadcast to {list(shape)}")


def _check_entries(base, entries, where):
    leaves = named_leaves(base)
    for entry, value in entries.items():
        name, layer = entry, None
        if entry not in leaves and (match := _LAYER.fullmatch(entry)):
            name, layer = match[1], int(match[2])
        if name not in leaves or (layer is not None and not _is_stack(name)):
            raise UserError(f"{where}: the parameters have no `{entry}`; expected the diff of a model like this one")
        shape, dtype = leaves[name].shape, leaves[name].dtype
        if layer is not None:
            if layer >= shape[0]:
                raise UserError(f"{where}: `{entry}` is beyond the {shape[0]} layers of the model; use the same depth")
            shape = shape[1:]
        expected = _kind(jax.ShapeDtypeStruct(shape, dtype))
        if _kind(value) != expected:
            raise UserError(f"{where}: `{entry}` is {_kind(value)}, in the model {expected}; use the sizes it is from")


def _is_stack(name):
    return "blocks" in name.split("/")


def _kind(leaf):
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
