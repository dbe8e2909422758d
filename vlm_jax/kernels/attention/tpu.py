"""Attention on a TPU: calls the Pallas kernels on [B, L, H, D], with gradient, `vmap` and sharding.

`tpu_short` holds the kernels for sequences that fit on chip, `tpu_long` the online softmax for longer sequences.

The backward pass keeps q, k, v, the row log-sum-exp [B, H, Lq], and for long sequences the output; no array of size
Lq x Lk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.kernels.attention import tpu_long, tpu_short
from vlm_jax.kernels.attention.tpu_heads import LANES, Spec, fits_groups
from vlm_jax.kernels.attention.tuning import sizes


class Static(NamedTuple):
    """Arguments that are fixed when attention is traced."""

    causal: bool
    scale: float
    interpret: bool


def lacks(q, k, bias, mask):
    """Returns in words why the kernels do not support these arguments; None if they do."""
    (_, lq, _, dim), lk, heads = q.shape, k.shape[1], _heads_here(q)
    length = f"{lq} queries on {lk} keys"
    if max(lq, lk) > 8192:
        return f"{length} (8192 at most)"
    if is_long(q, k) and bias is not None:
        return f"a bias with {length} of {heads} heads (the logits do not fit on chip)"
    if is_long(q, k) and mask is not None and mask.shape[1:3] != (1, 1):
        return f"a mask by query or head with {length} of {heads} heads (the logits do not fit on chip)"
    tiles = -(-lk // 8) * 8 * -(-lq // LANES) * LANES * 4
    biased = 0 if bias is None else min(bias.shape[1], heads)
    if biased and 4 * biased * tiles + _block_bytes(q, k) > 56 << 20:  # bias and gradient, two buffers each
        return f"a bias of {biased} heads with {length} (its gradient does not fit on chip)"
    if dim % 8 or (dim > LANES and dim % LANES):
        return f"head_dim {dim} (a multiple of 8 up to 128, or a multiple of 128)"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {q.dtype} (float32 and bfloat16 only)"
    if q.dtype != k.dtype:
        return f"queries of {q.dtype} with keys of {k.dtype}"
    return None


def tpu(q, k, v, *, bias, mask, causal, scale, interpret=False):
    """Attention by the Pallas kernels; arguments as in `kernels.attention`."""
    if isinstance(scale, jax.Array):  # traced, but the kernels need a number
        q, scale = (q * scale).astype(q.dtype), 1.0
    static = Static(causal, float(scale), interpret)
    return _attend(static, *_vary_together(q, k, v, bias, mask))


def _vary_together(*arrays):
    """Makes all arrays vary over the same axes under `shard_map`, e.g. a replicated bias beside a sharded batch.

    The transpose of the cast is the sum over those axes, as the gradient of the replicated array requires.
    """
    axes = lambda x: jax.typeof(x).manual_axis_type.varying
    every = frozenset().union(*(axes(x) for x in arrays if x is not None))
    cast = lambda x: jax.lax.pcast(x, tuple(every - axes(x)), to="varying") if every - axes(x) else x
    return [None if x is None else cast(x) for x in arrays]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, bias, mask):
    return _forward(static, q, k, v, bias, mask)[0]


def _attend_forward(static, q, k, v, bias, mask):
    out, lse = _forward(static, q, k, v, bias, mask, with_lse=True)
    kept = out if is_long(q, k) else None
    return out, (q, k, v, bias, mask, kept, lse)


def _attend_backward(static, saved, dout):
    return *_backward(static, *saved, dout), None


_attend.defvjp(_attend_forward, _attend_backward)


def _no_lse(q):
    return _vary_together(jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32), q)[0]


def _forward(static, q, k, v, bias, mask, with_lse=False):
    shape, lk = q.shape, k.shape[1]
    lse = _no_lse(q)
    if lk == 1:  # softmax over one key is 1
        return jnp.broadcast_to(v, shape), lse
    if shape[1] == 1:  # a matrix product of one column does not compile
        q = jnp.broadcast_to(q, (shape[0], 8, *shape[2:]))
    operands = (*map(_pack, (q, k, v)), _transposed_bias(q, k, bias), *_transposed_mask(q, k, mask))
    out, *rest = _run(Call("forward", static, shape[2], with_lse, is_long(q, k)), operands)
    return _unpack(out, q)[:, : shape[1]], rest[0][:, :, : shape[1]] if with_lse else lse


def _backward(static, q, k, v, bias, mask, out, lse, dout):
    lq, lk = q.shape[1], k.shape[1]
    if lk == 1:
        dbias = None if bias is None else jnp.zeros_like(bias)
        return jnp.zeros_like(q), jnp.zeros_like(k), dout.sum(1, keepdims=True).astype(v.dtype), dbias
    if lq == 1:  # adds seven copies of the query; their output is not read
        q, lse = jnp.broadcast_to(q, (q.shape[0], 8, *q.shape[2:])), jnp.broadcast_to(lse, (*lse.shape[:2], 8))
        out = None if out is None else jnp.broadcast_to(out, q.shape)
        dout = jnp.pad(dout, ((0, 0), (0, 7), (0, 0), (0, 0)))
    tbias, bias_grad = None, lambda _: (None,)
    if bias is not None:
        tbias, bias_grad = jax.vjp(functools.partial(_transposed_bias, q, k), bias)
    operands = (*map(_pack, (q, k, v)), tbias, *_transposed_mask(q, k, mask))
    operands += (None if out is None else _pack(out), _pack(dout), lse)
    dq, dk, dv, *dbias = _run(Call("backward", static, q.shape[2], True, is_long(q, k)), operands)
    return _unpack(dq, q)[:, :lq], _unpack(dk, k), _unpack(dv, v), *bias_grad(*dbias or (None,))


def _pack(x):
    return x.reshape(*x.shape[:2], -1)


def _unpack(x, like):
    return x.reshape(like.shape)


def _transposed_bias(q, k, bias):
    """Returns the bias in the kernels' layout, [1 | B, 1 | H, Lk, Lq] fp32; the transpose sums over broadcast axes."""
    if bias is None:
        return None
    bias = jnp.broadcast_to(bias.astype(jnp.float32), (*bias.shape[:2], q.shape[1], k.shape[1]))
    return bias.swapaxes(2, 3)


def _transposed_mask(q, k, mask):
    """Returns (keys [1 | B, 1, 1, Lk] fp32 or None, mask [1 | B, 1 | H, Lk, Lq] int32 or None), at most one of both."""
    if mask is None:
        return None, None
    if mask.shape[1:3] == (1, 1):
        return jnp.broadcast_to(mask, (mask.shape[0], 1, 1, k.shape[1])).astype(jnp.float32), None
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    return None, mask.swapaxes(2, 3).astype(jnp.int32)


class Call(NamedTuple):
    """One kernel call without its arrays; the hashable key of cached traces, partitioned and batched versions.

    Arrays, in order (arrays that are None are left out): q, k, v [B, L, H * D], bias, keys, mask, and for the backward
    pass out (long sequences only) and dout [B, Lq, H * D], and lse [B, H, Lq].
    """

    direction: str
    static: Static
    heads: int
    with_lse: bool
    long: bool = False  # whether by `tpu_long`
    present: tuple[bool, ...] = ()

    def results(self):
        """Returns for each result the operand with the same sharding, by its place in the full list; or "lse"."""
        if self.direction == "forward":
            return (0, "lse") if self.with_lse else (0,)
        return (0, 1, 2, 3) if self.present[3] else (0, 1, 2)


def _run(call, operands):
    call = call._replace(present=tuple(x is not None for x in operands))
    arrays = [x for x in operands if x is not None]
    if call.static.interpret:
        return local(call, *arrays)
    return _batched(call)(*arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def local(call, *arrays):
    """Runs the kernel on this device's share of the batch and the heads."""
    arrays = iter(arrays)
    operands = [next(arrays) if there else None for there in call.present]
    q, k = operands[:2]
    if call.long:
        return _long(call, *operands)
    spec = Spec(
        call.heads,
        q.shape[2] // call.heads,
        call.static.causal,
        call.static.scale,
        interpret=call.static.interpret,
    )
    spec = fits_groups(spec._replace(**sizes(call.direction, q.shape[1], k.shape[1], spec.head_dim)))
    if call.direction == "forward":
        return tuple(tpu_short.forward(*operands, spec=spec, lse=call.with_lse))
    return tuple(tpu_short.backward(*operands[:6], *operands[7:], spec=spec))


def is_long(q, k):
    """Returns whether a head's logits, or an example with all its heads, are too large for the chip."""
    return max(q.shape[1], k.shape[1]) > 1024 or _block_bytes(q, k) > 48 << 20


def _heads_here(q):
    """Returns the number of heads of q [B, L, H, D] on one device after the split of `_partitioned`."""
    mesh = jax.sharding.get_abstract_mesh()
    _, axes = _split(q.shape[2], mesh, _free(mesh), q)
    return q.shape[2] // math.prod(mesh.shape[name] for name in axes)


def _block_bytes(q, k):
    """Returns the bytes of the backward kernel's blocks: q, k, v, dout, three gradients of an example, two buffers."""
    lanes = -(-_heads_here(q) * q.shape[3] // LANES) * LANES
    return 14 * max(q.shape[1], k.shape[1]) * lanes * q.dtype.itemsize


def _long(call, q, k, v, bias, keys, mask, *rest):
    """Pads for `tpu_long` and calls it: lengths to whole blocks, head_dims that tile 128 lanes, whole lane tiles."""
    assert bias is None and mask is None
    lq, lk, heads, dim = q.shape[1], k.shape[1], call.heads, q.shape[2] // call.heads
    wide = dim if LANES % dim == 0 else -(-dim // LANES) * LANES
    many = -(-heads // max(1, LANES // wide)) * max(1, LANES // wide)
    spec = tpu_long.Spec(
        many, wide, call.static.causal, call.static.scale, lk, interpret=call.static.interpret
    )  # fmt: skip
    spec = spec._replace(
        queries=min(spec.queries, -(-lq // LANES) * LANES), keys=min(spec.keys, -(-lk // LANES) * LANES)
    )
    long_q, long_k = -(-lq // spec.queries) * spec.queries, -(-lk // spec.keys) * spec.keys

    def pad(x, length):
        if (wide, many, length) == (dim, heads, x.shape[1]):
            return x
        x = x.reshape(*x.shape[:2], heads, dim)
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, many - heads), (0, wide - dim)))
        return x.reshape(*x.shape[:2], many * wide)

    def cut(x, length):
        if (wide, many, length) == (dim, heads, x.shape[1]):
            return x
        return x.reshape(*x.shape[:2], many, wide)[:, :length, :heads, :dim].reshape(x.shape[0], length, heads * dim)

    pad_rows = lambda x: jnp.pad(x, ((0, 0), (0, many - heads), (0, long_q - lq)))
    if keys is not None:
        keys = jnp.pad(keys, ((0, 0), (0, 0), (0, 0), (0, long_k - lk)))
    qkv = (pad(q, long_q), pad(k, long_k), pad(v, long_k))
    if call.direction == "forward":
        out, lse = tpu_long.forward(*qkv, keys, spec=spec)
        return (cut(out, lq), lse[:, :heads, :lq])[: 1 + call.with_lse]
    out, dout, lse = rest
    by_head = lambda x: x.astype(jnp.float32).reshape(*x.shape[:2], heads, dim)
    delta = jnp.einsum("blhd,blhd->bhl", by_head(dout), by_head(out))
    grads = tpu_long.backward(*qkv, keys, pad(dout, long_q), pad_rows(lse), pad_rows(delta), spec=spec)
    return tuple(cut(x, length) for x, length in zip(grads, (lq, lk, lk), strict=True))


@functools.cache
def _batched(call):
    """Returns the partitioned call; `vmap` folds its axis into the batch, so that the kernels always see four axes."""

    @custom_vmap
    def run(*arrays):
        return _partitioned(call, *arrays)

    @run.def_vmap
    def rule(size, batched, *arrays):
        lead = lambda x, there: x if there else jnp.broadcast_to(x, (size, *x.shape))
        arrays = [lead(x, there) for x, there in zip(arrays, batched, strict=True)]
        batch = arrays[0].shape[1]
        whole = lambda x: jnp.broadcast_to(x, (size, batch, *x.shape[2:])) if x.shape[1] == 1 else x
        results = run(*(whole(x).reshape(size * batch, *x.shape[2:]) for x in arrays))
        results = [x.reshape(size, batch, *x.shape[1:]) for x in results]
        if call.direction == "backward" and call.present[3] and arrays[3].shape[1] != batch:
            results[3] = results[3].sum(1, keepdims=True)
        return tuple(results), (True,) * len(results)

    return run


def _partitioned(call, *arrays):
    """Splits the call over devices by batch and heads; all other axes of an operand stay whole.

    XLA cannot partition Mosaic kernels. Under a mesh they therefore run in a `shard_map` over every axis that is not
    manual yet. A bias shared by sharded examples (or heads) gets the sum of the devices' gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = _free(mesh)
    if all(mesh.shape[name] == 1 for name in free):
        return local(call, *arrays)
    batch, heads = _split(call.heads, mesh, free, arrays[0])
    places = [i for i, there in enumerate(call.present) if there]

    def spec(place, shape):
        if place in (3, 4, 5):  # bias, keys, mask: [1 | B, 1 | H, ...]
            return PartitionSpec(batch if shape[0] > 1 else None, heads if shape[1] > 1 else None)
        return PartitionSpec(batch, heads) if place in (8, "lse") else PartitionSpec(batch, None, heads)

    bias_shape = arrays[3].shape if call.present[3] else None
    shared = ()
    if call.direction == "backward" and bias_shape:
        shared = (batch if bias_shape[0] == 1 else ()) + (heads if bias_shape[1] == 1 else ())
    share = call._replace(heads=call.heads // math.prod(mesh.shape[name] for name in heads))

    def run(*arrays):
        results = list(local(share, *arrays))
        if shared:
            results[3] = jax.lax.psum(results[3], shared)
        return tuple(results)

    in_specs = tuple(spec(place, x.shape) for place, x in zip(places, arrays, strict=True))
    out_specs = tuple(spec(place, bias_shape) for place in call.results())
    return jax.shard_map(
        run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(free), check_vma=False
    )(*arrays)  # fmt: skip


def _free(mesh):
    """Returns the axes that are not manual yet."""
    return [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]


def _split(heads, mesh, free, q):
    """Returns (mesh axes of the batch, mesh axes of the heads): explicit axes from q's type, automatic ones by name."""
    explicit = [name for name in free if mesh.axis_types[mesh.axis_names.index(name)] == AxisType.Explicit]
    spec = tuple(jax.typeof(q).sharding.spec) if explicit else ()
    typed = [_names(spec[axis]) if axis < len(spec) else () for axis in (0, 2)]
    split = []
    for size, names, axes in ((q.shape[0], BATCH_AXES, typed[0]), (heads, HEAD_AXES, typed[1])):
        axes = tuple(axes)
        for name in names:
            if (
                name in free
                and name not in explicit
                and size % (math.prod(mesh.shape[a] for a in axes) * mesh.shape[name]) == 0
            ):
                axes += (name,)
        split.append(axes)
    return split


def _names(axes):
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)
"""The automatic mesh axes that split the batch and the heads (the names of `vlm_jax.params.sharding`)."""
