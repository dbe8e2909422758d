"""Initial parameters of a run: `config.model_init`, tower by tower, from anything that `vlm_jax.load` reads.

    model_init=dict(image="hf:google/vit-base-patch16-224", text="runs/ul2_tiny:encoder")
    model_init={"image/blocks": "runs/ul2_tiny:encoder"}                   # a language model's blocks, for pictures
    model_init=dict(image="runs/vit", auxiliary="runs/ul2_tiny:encoder")   # model.insertions has an `Auxiliary`

A tower takes the checkpoint's part of the same name, or the part after the colon: "image", "text", or the "encoder" of
an `EncoderDecoder`, for a text tower of T5's kind (with the token table). One string instead of the dict initialises
the whole model. A tower's pool, its class token and its head may differ from the checkpoint; they then start anew, and
so do insertions that the checkpoint lacks. The image tower's learned positions are resampled from one square grid to
another ("linear" of `positions.resample_posemb`, as big_vision does), those of texts are cut or stretched
(`positions.of_length`). All other parameters must fit. "image/blocks" and "text/blocks" take the blocks of any part
alone, whatever modality it reads.
"""

import collections
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.params import sharding
from vlm_jax.zoo import key_map, recognize
from vlm_jax.zoo.load import read_params
from vlm_jax.zoo.released import ANY

PARTS = ("image", "text", "encoder")
WHERE = "config.model_init"
# Tables whose number of rows may differ, and how they are fitted.
POSITIONS = {"image/pos_embed": positions.to_rows, "text/pos_embed": positions.of_length}
STARTS_ANEW = re.compile(r"\w*/?(map_pool|rep|head)/.*|image/cls|(.*/)?inserted_\w+")


def read(model_init: str | Mapping[str, str], shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads parameters into the run's shardings, and prints the source of each tower.

    Args:
      model_init: see the module's docstring.
      shapes: the run's parameters by name, with shardings.

    Returns:
      parameter name -> array, without the parameters that start anew.

    Raises:
      UserError: the model has no such tower, the checkpoint no such part, or the two do not fit.
    """
    towers = {"": model_init} if isinstance(model_init, str) else dict(model_init)
    found = {}
    for tower, spec in towers.items():
        if tower == "auxiliary":
            found |= read_auxiliary(spec, shapes)
            print(f"{WHERE}.{tower}: kernels of {spec} beside those of the model")
            continue
        within = tower if tower.endswith("/blocks") else f"{tower}/"  # blocks/ of a scan, blocks_0/ of a loop
        own = {name: leaf for name, leaf in shapes.items() if not tower or name.startswith(within)}
        if not own:
            known = ", ".join(sorted({name.split("/")[0] for name in shapes if "/" in name}))
            raise UserError(f"{WHERE}: the model has no tower `{tower}`; it has: {known}")
        arrays = _read_tower(tower, spec, own)
        new = ", ".join(name for name in own if name not in arrays) or "nothing"
        print(f"{WHERE}{tower and '.'}{tower}: {len(arrays)} arrays of {spec}; new: {new}")
        found |= arrays
    return found


def read_auxiliary(spec: str, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Reads the kernels beside those of a tower, see `models.insertions.auxiliary`.

    Args:
      spec: as for `vlm_jax.load`, and a part after a colon, "image", "text" (the default) or "encoder".
      shapes: the model's parameters by name, arrays or shapes with shardings.

    Returns:
      parameter name -> array, of every "inserted_auxiliary": the kernel of the same layer and block. Zeros stand in
      blocks that the checkpoint lacks at the end: there the model stays as it is, as in the authors' code.

    Raises:
      UserError: the model has no such insertion, or the checkpoint lacks a kernel, or has another shape.
    """
    new = "/inserted_auxiliary"
    own = {name: leaf for name, leaf in shapes.items() if name.endswith(new)}
    if not own:
        raise UserError(f"{WHERE}.auxiliary: the model has no place for it; add dict(type='Auxiliary') to insertions")
    path, _, part = spec.rpartition(":")
    if part not in PARTS:
        path, part = spec, "text"
    released, towers = recognize.of_spec(path, pool=ANY), {name.split("/")[0] for name in own}
    of_place = lambda entry, tower: tower + entry.ours.removeprefix(part).removesuffix("/kernel") + new
    entries = [
        entry._replace(ours=of_place(entry, tower))
        for entry in released.entries
        for tower in sorted(towers)
        if entry.ours.startswith(f"{part}/") and entry.ours.endswith("/kernel")
    ]
    entries = [entry for entry in entries if key_map.array_shape(entry.ours, own) is not None]
    rows = collections.Counter(key_map.blocks_of(entry.ours, own)[0] for entry in entries)
    found, depth = {}, max(map(_block, (entry.ours for entry in entries)), default=0) + 1
    for name, leaf in own.items():  # those of blocks that both have; a layer that is missing there has no rows
        if key_map.is_scanned(name) and rows[name]:
            found[name] = jax.ShapeDtypeStruct((rows[name], *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        elif key_map.is_scanned(name) or _block(name) < depth:
            found[name] = leaf
    tensors = {entry.theirs: released.tensors[entry.theirs] for entry in entries if entry.theirs in released.tensors}
    plan = key_map.match(entries, found, tensors, (), f"{WHERE}.auxiliary: part `{part}` of {path}")
    arrays = read_params(plan, found, tensors, {name: leaf.sharding for name, leaf in found.items()})
    padded = lambda x, leaf: jnp.pad(x, [(0, long - short) for long, short in zip(leaf.shape, x.shape, strict=True)])
    return {
        name: padded(arrays[name], leaf) if name in arrays else jnp.zeros(leaf.shape, leaf.dtype)
        for name, leaf in own.items()
    }


def _block(name: str) -> int:
    """Returns the number of the block that a parameter is of; 0 without one."""
    found = re.search(r"(?:^|/)blocks_(\d+)/", name)
    return int(found[1]) if found else 0


def _read_tower(tower: str, spec: str, own: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    path, _, part = spec.rpartition(":")
    blocks = tower.endswith("/blocks")
    if part not in PARTS:
        path, part = spec, tower.removesuffix("/blocks")
    released = recognize.of_spec(path, pool=ANY)
    prefixes = {f"{part}/": f"{tower}/"} if part else {"": ""}
    if blocks:
        prefixes = {f"{part}/blocks": tower}
    elif part == "encoder":
        prefixes["decoder/token_embed/"] = f"{tower}/token_embed/"
    entries = [
        entry._replace(ours=entry.ours.replace(old, new, 1))
        for entry in released.entries
        for old, new in prefixes.items()
        if entry.ours.startswith(old)
    ]
    if not entries:
        known = ", ".join(sorted({entry.ours.split("/")[0] for entry in released.entries}))
        raise UserError(f"{WHERE}: {path} ({released.format}) has no part `{part}`; it has: {known}")
    fits = lambda entry: _fits(entry, own, released.tensors)
    entries = [entry for entry in entries if not STARTS_ANEW.fullmatch(entry.ours) or fits(entry)]
    kept = {entry.ours for entry in entries}
    own = {name: leaf for name, leaf in own.items() if not STARTS_ANEW.fullmatch(name) or name in kept}
    tensors = {entry.theirs: released.tensors[entry.theirs] for entry in entries if entry.theirs in released.tensors}
    wanted = {name: own[name] for name in POSITIONS if name in own and _differs(own[name], released.shapes.get(name))}
    for name, ours in wanted.items():
        everywhere = sharding.replicated(ours.sharding.mesh)
        own[name] = jax.ShapeDtypeStruct(released.shapes[name].shape, ours.dtype, sharding=everywhere)
    plan = key_map.match(entries, own, tensors, (), f"{WHERE}: {spec}")
    arrays = read_params(plan, own, tensors, {name: leaf.sharding for name, leaf in own.items()})
    for name, ours in wanted.items():
        table = POSITIONS[name](arrays[name], ours.shape[1])
        arrays[name] = jax.make_array_from_callback(table.shape, ours.sharding, lambda index, table=table: table[index])
        print(f"{WHERE}: {name} resampled, from {own[name].shape[1]} to {ours.shape[1]} rows")
    return arrays


def _differs(ours: Any, theirs: Any) -> bool:
    """Whether two tables of positions have another number of rows, and else the same shape."""
    return theirs is not None and ours.shape != theirs.shape and ours.shape[2:] == theirs.shape[2:]


def _fits(entry: key_map.Entry, shapes: Mapping[str, Any], tensors: Mapping[str, Any]) -> bool:
    shape, tensor = key_map.array_shape(entry.ours, shapes), tensors.get(entry.theirs)
    return shape is not None and tensor is not None and tuple(tensor.shape) == entry.their_shape(shape)
