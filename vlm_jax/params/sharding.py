"""Sharding: the mesh, the partition rules, host batches as global arrays.

A partition rule is `(regex, spec)`; the first rule that matches a parameter's name wins. A spec names mesh axes for the
*last* dimensions of the parameter: `("fsdp", "tensor")` on `[layers, in, out]` shards `in` and `out`. One rule thus
serves both a loop of blocks and a scan over blocks (the scan adds a leading layer axis).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlm_jax.errors import UserError
from vlm_jax.params.table import match_rules, named_leaves

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Megatron's split of a block over `tensor` (arXiv:1909.08053, section 3), the other side over `fsdp`. Layers that write
# to the residual stream never split their output over `tensor`: the stream's width stays whole on every device.
RULES = (
    (r".*(query|key|value|fc1|gate)/kernel", ("fsdp", "tensor")),
    (r".*(attn/out|fc2)/kernel", ("tensor", "fsdp")),
    (r".*(query|key|value|fc1|gate)/bias", ("tensor",)),
    (r".*patch_embed/kernel", (None, "fsdp")),  # the inputs are pixels, 588 for a patch of 14
    (r".*(head|projection)/kernel", ("fsdp", None)),
    (r".*embedding", ("fsdp",)),
    (r".*", ()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp` and `tensor`; one size may be -1: the remaining devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if len(free) > 1 or int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(
            f"config.mesh {sizes} does not fit {len(devices)} devices; the product must be {len(devices)}, "
            "one size may be -1"
        )
    # splits physical axes: on a slice of 16 x 16, an axis of 8 is a part of one side
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the leading axis over `data` x `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(x: jax.Array) -> jax.Array:
    """Returns x with its leading axis sharded over `data` x `fsdp`.

    The mesh is that of `jax.set_mesh`. Without a mesh, or if the mesh does not divide the axis, returns x unchanged.
    Models shard activations between blocks, because XLA may otherwise gather the batch instead of the parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = set(BATCH_AXES) <= set(mesh.auto_axes)
    if not automatic or len(x) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gathered(x: jax.Array) -> jax.Array:
    """Returns x whole on every device of the mesh of `jax.set_mesh`: a loop over x then gathers it once, before.

    XLA may otherwise multiply by its shards, and sum products that are much larger than x.
    """
    if not set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().auto_axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def look_up(embed: Callable, token_ids: jax.Array) -> jax.Array:
    """Returns `embed(token_ids)`, [B, L] -> [B, L, D], for a table with columns sharded over `fsdp`.

    Every device looks up its own columns for the texts of all `fsdp` devices; then the devices exchange these tokens.
    Otherwise XLA gathers the whole table, and reduces the table's whole gradient.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.auto_axes) or len(token_ids) % mesh.shape["data"]:
        return embed(token_ids)
    x = embed(jax.lax.with_sharding_constraint(token_ids, PartitionSpec("data")))
    if x.shape[-1] % mesh.shape["fsdp"] == 0:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("data", None, "fsdp"))
    return split_batch(x)


# Below, `batch_size` is the number of a batch's rows, or {row set: rows} of a batch {row set: {field: array}}.


def check_batch_size(batch_size: int | Mapping[str, int], mesh: Mesh, where: str = "config.batch_size") -> None:
    """Raises a UserError if the devices would get different numbers of examples."""
    if isinstance(batch_size, Mapping):
        for name, size in batch_size.items():
            check_batch_size(size, mesh, f"{where} {sum(batch_size.values())}: the row set `{name}` of")
        return
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise UserError(
            f"{where} {batch_size} cannot be split over {shards} devices (mesh data x fsdp); make it a multiple"
        )


def rows_of_process(mesh: Mesh, batch_size: int | Mapping[str, int]) -> np.ndarray | dict[str, np.ndarray]:
    """Returns the batch rows that this process's devices hold, int [n], in order.

    The rows need not be adjacent, because a host's chips need not be adjacent on a slice. Processes hold the same rows
    if their devices differ only along `tensor`.
    """
    if isinstance(batch_size, Mapping):
        return {name: rows_of_process(mesh, size) for name, size in batch_size.items()}
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in held]))


def to_global(batch: Mapping[str, Any], mesh: Mesh, batch_size: int | Mapping[str, int]) -> dict[str, Any]:
    """Returns global arrays `[batch_size, ...]` from this process's rows of a batch (see `rows_of_process`)."""
    if isinstance(batch_size, Mapping):
        return {name: to_global(batch[name], mesh, size) for name, size in batch_size.items()}
    place, rows = batch_sharding(mesh), rows_of_process(mesh, batch_size)

    def part(array, index):
        start, stop, _ = index[0].indices(batch_size)
        first = np.searchsorted(rows, start)
        return array[first : first + stop - start]

    whole = lambda array: jax.make_array_from_callback((batch_size, *array.shape[1:]), place, partial(part, array))
    return jax.tree.map(whole, dict(batch))


def abstract_batch(example: Mapping[str, Any], batch_size: int | Mapping[str, int], mesh: Mesh) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of a global batch with examples like those of `example` `[b, ...]`."""
    if isinstance(batch_size, Mapping):
        return {name: abstract_batch(example[name], size, mesh) for name, size in batch_size.items()}
    place = batch_sharding(mesh)
    whole = lambda array: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=place)
    return jax.tree.map(whole, dict(example))


def param_shardings(rules: Sequence, params: Any, mesh: Mesh) -> Any:
    """Returns a tree like `params` (arrays or shapes) of NamedShardings.

    Raises:
      UserError: no rule matches a parameter, a rule matches nothing, or a dimension cannot be divided.
    """
    leaves = named_leaves(params)
    specs = match_rules(rules, leaves, where="config.partition", every_rule_used=rules is not RULES)
    shardings = [_sharding(name, leaf.shape, specs[name], mesh) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def follow_params(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a state that mirrors the parameters (optimizer moments, EMA).

    A leaf is sharded like a parameter if its name ends with the parameter's name and the shapes are equal. All other
    leaves are replicated.
    """
    of_param = {
        name: (leaf.shape, sharding)
        for (name, leaf), sharding in zip(named_leaves(params).items(), jax.tree.leaves(shardings), strict=True)
    }

    def sharding_of(name, leaf):
        parts = name.split("/")
        for start in range(len(parts)):
            shape, sharding = of_param.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    leaves = [sharding_of(name, leaf) for name, leaf in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def split_rows(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a memory: matrices [n, ...] by rows over `data` x `fsdp`, all else replicated."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = lambda leaf: len(leaf.shape) > 1 and leaf.shape[0] % shards == 0
    return jax.tree.map(lambda leaf: batch_sharding(mesh) if rows(leaf) else replicated(mesh), tree)


def _sharding(name, shape, spec, mesh):
    spec = tuple(spec)
    if len(spec) > len(shape):
        raise UserError(f"config.partition gives `{name}` {shape} the spec {spec}: more axes than dimensions")
    spec = (None,) * (len(shape) - len(spec)) + spec
    for size, axes in zip(shape, spec, strict=True):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            if axis not in mesh.shape:
                raise UserError(
                    f"config.partition gives `{name}` the mesh axis `{axis}`; the axes are {', '.join(AXES)}"
                )
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % parts:
            raise UserError(
                f"config.partition splits `{name}` {shape} over {' x '.join(axes)} = {parts}, which does not divide "
                f"{size}; change config.mesh or put a rule first, e.g. ('{name}', ())"
            )
    spec = tuple(tuple(axes) if isinstance(axes, list) else axes for axes in spec)
    return NamedSharding(mesh, PartitionSpec(*spec))
