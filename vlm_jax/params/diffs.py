"""Differences between two parameter trees of one model, bit for bit, and patches from them."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.params.table import check_alike, kind, map_with_name, named_leaves

INDEX, BITS, VALUE = "@index", "@bits", "@value"  # the tensors of a sparse entry of a file
_LAYER = re.compile(r"(.*)\[(\d+)\]")  # an entry of a diff: one layer of a stack


def diff(base: Any, tuned: Any) -> dict[str, np.ndarray]:
    """Returns `{name: array of tuned}` of all parameters with different bits, on the host.

    A scanned stack, `blocks/...`, has one entry for each layer that differs: `{"blocks/norm1/scale[3]": [D]}`.

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
        # Compares bytes: NaN equals nothing and -0.0 equals 0.0.
        changed |= {entry: new for entry, old, new in entries if old.tobytes() != new.tobytes()}
    return changed


def patch(base: Any, diff: Mapping[str, Any]) -> Any:
    """Returns base with the entries of a diff in place of base's own.

    `patch(base, diff(base, tuned))` is tuned, bit for bit.

    Raises:
      UserError: base lacks an entry, or has another shape or dtype there.
    """
    check_entries(base, diff, "the diff")
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


class Sparse(NamedTuple):
    """Some scalars of an array.

    Attributes:
      index: places in the flattened array, int [k], rising.
      value: [k].
    """

    index: np.ndarray
    value: np.ndarray


def deltas(base: Any, tuned: Any) -> dict[str, Sparse]:
    """Returns tuned - base by name, of the scalars whose bits differ.

    Raises:
      UserError: the trees differ in names, shapes or dtypes.
    """
    check_alike(base, tuned)
    old, found = named_leaves(base), {}
    for name, new in named_leaves(tuned).items():
        before, after = np.ravel(old[name]), np.ravel(new)
        index = _differ(before, after)
        if len(index):
            found[name] = Sparse(index, after[index] - before[index])
    return found


def plus(base: Any, *several: Mapping[str, Sparse], weights: Sequence[float] | None = None) -> Any:
    """Returns base + sum_i w_i d_i of `deltas`, such as of a task and of a language (LT-SFT, arXiv:2110.07560).

    Args:
      base: parameter tree.
      several: deltas; they may share scalars.
      weights: w_i; defaults to 1 each, -1 subtracts.

    Raises:
      UserError: a delta does not fit base, or the weights are not one for each.
    """
    weights = [1.0] * len(several) if weights is None else list(weights)
    if len(weights) != len(several):
        raise UserError(f"{len(weights)} weights for {len(several)} differences; give one for each")
    leaves, changed = named_leaves(base), {}
    for one, weight in zip(several, weights, strict=True):
        for name, (index, value) in one.items():
            if name not in leaves or (len(index) and np.max(index) >= leaves[name].size):
                raise UserError(f"the difference of `{name}` is of another model; use one that was made from this base")
            flat = changed.setdefault(name, np.array(leaves[name]).ravel())
            flat[index] += np.asarray(weight * value, flat.dtype)
    return map_with_name(lambda n, leaf: jnp.asarray(changed[n].reshape(leaf.shape)) if n in changed else leaf, base)


def packed(entries: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, from new values by entry and the values before, whichever form is the smallest.

    "ENTRY": all values. "ENTRY@value": the values of the scalars whose bits differ, or one if they are all the same,
    beside "ENTRY@index", int32, their places in the flattened array, or "ENTRY@bits", uint8, a bit for each scalar.
    """
    tensors = {}
    for entry, new in entries.items():
        after, before = np.asarray(new), np.asarray(base[entry])
        index = _differ(before.ravel(), after.ravel())
        value = after.ravel()[index]
        if not len(_differ(value, np.broadcast_to(value[:1], value.shape))):
            value = value[:1]
        bits, places = -(-after.size // 8), 4 * len(index)
        if not len(index) or value.nbytes + min(bits, places) >= after.nbytes or after.size >= 2**31:
            tensors[entry] = after
            continue
        tensors[entry + VALUE] = value
        if places <= bits:
            tensors[entry + INDEX] = index.astype(np.int32)
        else:
            tensors[entry + BITS] = np.packbits(np.isin(np.arange(after.size), index))
    return tensors


def unpacked(tensors: Mapping[str, np.ndarray], base: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the entries that `packed` wrote; of other tensors, entry by entry, the tensor itself.

    Raises:
      UserError: a sparse entry is damaged, or `base` lacks it.
    """
    entries = {}
    for name, tensor in tensors.items():
        entry, at, form = name.rpartition("@")
        if not at:
            entries[name] = tensor
        if at + form != VALUE:
            continue
        if entry not in base:
            raise UserError(f"the parameters have no `{entry}`; expected the diff of a model like this one")
        flat, shape = np.array(base[entry]).ravel(), np.shape(base[entry])
        if entry + INDEX in tensors:
            index = tensors[entry + INDEX]
        else:
            index = np.flatnonzero(np.unpackbits(tensors[entry + BITS], count=flat.size))
        if (
            flat.dtype != tensor.dtype
            or len(tensor) not in (1, len(index))
            or np.any((index < 0) | (index >= flat.size))
        ):
            raise UserError(f"the sparse values of `{entry}` do not fit {kind(flat)}; make the file again")
        flat[index] = tensor
        entries[entry] = flat.reshape(shape)
    return entries


def entries_of(base: Any, entries: Collection[str]) -> dict[str, Any]:
    """Returns base's values by entry of a diff: whole parameters, or layers of stacks; unknown entries are left out."""
    leaves, found = named_leaves(base), {}
    for entry in entries:
        match = _LAYER.fullmatch(entry)
        if entry in leaves:
            found[entry] = leaves[entry]
        elif match and match[1] in leaves and _is_stack(match[1]) and int(match[2]) < leaves[match[1]].shape[0]:
            found[entry] = leaves[match[1]][int(match[2])]
    return found


def _differ(before, after):
    """Returns where the bits of two flat arrays of one dtype differ."""
    as_bytes = lambda x: np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)
    return np.flatnonzero(np.any(as_bytes(before) != as_bytes(after), axis=1)) if len(after) else np.zeros(0, int)


def check_entries(base, entries, where):
    """Raises a UserError if an entry of a diff does not fit the parameters `base`; `where` names the diff."""
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
        expected = kind(jax.ShapeDtypeStruct(shape, dtype))
        if kind(value) != expected:
            raise UserError(f"{where}: `{entry}` is {kind(value)}, in the model {expected}; use an equal model")


def _is_stack(name):
    return "blocks" in name.split("/")
