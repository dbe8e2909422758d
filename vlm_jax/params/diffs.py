"""Differences between two parameter trees of one model, bit for bit, and patches from them."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.params.table import check_alike, kind, map_with_name, named_leaves

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
