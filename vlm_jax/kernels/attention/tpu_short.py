"""Attention on a TPU for sequences that fit on chip: the Pallas (Mosaic) kernels, forward and backward.

Logits are computed transposed, S^T = K Q^T, with keys along sublanes and queries along lanes, for two reasons:

- The softmax of Vaswani et al. 2017, equation 1, is over keys: a sum over sublanes (vector adds) instead of over lanes
  (cross-lane unit). A query's maximum, sum and log-sum-exp are lane vectors [1, Lq], which broadcast for free. The
  log-sum-exp goes to HBM as [B, H, Lq] without padding.
- O^T = V^T P^T has head_dim as the rows that stream through the matrix unit. Rows come in steps of 16, columns in
  steps of 128: O = P V with head_dim 64 would leave half of the unit empty, O^T fills the unit. The same holds for
  dV^T = dO^T P, dK^T = Q^T dS, dQ^T = K^T dS^T. The transposes run on the cross-lane unit, which is idle.

Arrays are packed, [B, L, H * D], as the projections return them (`tpu_heads` finds the heads).

Memory order: a grid step holds `examples` whole examples (all heads) of q, k, v, out in VMEM, one contiguous DMA each,
and computes a group of heads; examples are the slow grid axis. With `ahead` = n, the program has the logits of unit
i + n before the softmax of unit i, so that the compiler overlaps matrix and vector work.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vlm_jax.kernels.attention.reference import HIDDEN
from vlm_jax.kernels.attention.tpu_heads import LANES, Heads, LaggedHeads

LOG2E = 1.4426950408889634
SEES_NOTHING = 1e30  # replaces the log-sum-exp of a row without visible keys: exp(logit - 1e30) = 0

_contract = lambda a, b: (((a,), (b,)), ((), ()))
NN, NT = _contract(1, 0), _contract(1, 1)


def dot(a, b, dimensions):
    """Returns `lax.dot_general` with float32 sums; products of float32 are exact to float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _at(ref, b, h):
    """Returns [Lk, Lq] (or [1, Lk]) of an array [1 | examples, 1 | heads, ...] for an example and head of this step."""
    return ref[b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0]


def _logits(raw, spec, bias, keys, mask, first_key, first_query):
    """Returns scale * raw + bias, HIDDEN for hidden keys; raw [keys, queries] starts at first_key and first_query."""
    logits = raw * spec.scale
    if bias is not None:
        logits = logits + bias
    seen = None
    if keys is not None:
        seen = keys > 0.5
    if mask is not None:
        seen = mask != 0
    if spec.causal:
        key = jax.lax.broadcasted_iota(jnp.int32, raw.shape, 0) + first_key
        query = jax.lax.broadcasted_iota(jnp.int32, raw.shape, 1) + first_query
        seen = (key <= query) if seen is None else (key <= query) & seen
    return logits if seen is None else jnp.where(seen, logits, HIDDEN)


def key_column(ref, b, h):
    """Returns [Lk, 1], 1.0 for visible keys, from a row of the padding mask."""
    row = _at(ref, b, h)
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _split(spec, refs, has_bias, has_keys, has_mask):
    refs = list(refs)
    take = lambda there: refs.pop(0) if there else None
    return take(has_bias), take(has_keys), take(has_mask), refs


def _queue(heads, units, start, finish, chunks, per_chunk):
    """Traces start(i + ahead) piece by piece between the pieces of finish(i).

    The compiler overlaps matrix and vector work that stand close together in the program. Both are generators; start
    appends its results to a list, a piece for each chunk of keys. Past the last unit, heads that lag start the first
    units of the next grid step.
    """
    units, ahead, coming = list(units), heads.spec.ahead, []
    started = [[] for _ in units]
    first = -ahead
    if heads.lag and ahead:
        first, coming = 0, [[] for _ in range(ahead)]
        started[:ahead] = [heads.started(i, chunks, per_chunk) for i in range(ahead)]
    for i in range(first, len(units)):
        nothing, into = iter(()), i + ahead - len(units)
        begin = start(*units[i + ahead], started[i + ahead]) if into < 0 else nothing
        if coming and 0 <= into < ahead:
            begin = _of_the_next_step(heads, start(*units[into], coming[into]))
        end = finish(*units[i], started[i]) if i >= 0 else nothing
        if ahead and len(chunks) == 1:
            next(begin, None)
            heads.fetch()
        left = [begin, end] if ahead else [itertools.chain(begin, end)]
        while left:
            left = [pieces for pieces in left if next(pieces, left) is not left]
        if i >= 0:
            started[i].clear()
        heads.fetch()
    heads.commit(coming, chunks, per_chunk) if heads.lag else None


def _of_the_next_step(heads, pieces):
    while True:
        heads.ahead = True
        more = next(pieces, pieces) is not pieces
        heads.ahead = False
        if not more:
            return
        yield


def _chunks(length, size):
    """Returns slices of `size`; the last slice takes the rest, never 1: products with one column do not compile."""
    stops = [*range(size, length - 1, size), length]
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _heads(spec, refs, results, scratch):
    dtype = refs[0].dtype
    return LaggedHeads(spec, dtype, refs, results, scratch) if spec.lagged else Heads(spec, dtype)


def _forward(q_ref, k_ref, v_ref, *refs, spec, has_bias, has_keys, has_mask, has_lse):
    bias_ref, keys_ref, mask_ref, refs = _split(spec, refs, has_bias, has_keys, has_mask)
    out_ref, *refs = refs
    lse_ref, scratch = (refs[0], refs[1:]) if has_lse else (None, refs)
    heads, length, columns = _heads(spec, (q_ref, k_ref, v_ref), (out_ref,), scratch), q_ref.shape[1], {}
    plain = not (has_bias or has_keys or has_mask or spec.causal) and spec.scale > 0
    outs, lses = {}, {}
    tiles = _chunks(length, spec.tile)
    factor = spec.scale * LOG2E if plain else LOG2E  # scale and change of base in one multiplication

    chunks = _chunks(k_ref.shape[1], spec.chunk)

    def start(b, g, h, rows, parts):
        k, q = heads.only(k_ref, b, g, h), heads.group(q_ref, b, g)[rows]
        for chunk in chunks:
            parts.append(dot(k[chunk], q, NT))
            yield

    def logits_of(b, g, h, rows, chunk, raw):
        if plain:
            return raw
        number = heads.index(g, h)
        column = column_of(b, h, number)[chunk] if has_keys else None
        bias = _at(bias_ref, b, number)[chunk, rows] if has_bias else None
        mask = _at(mask_ref, b, number)[chunk, rows] if has_mask else None
        return _logits(raw, spec, bias, column, mask, chunk.start, rows.start)

    def column_of(b, h, number):
        place = b, h if has_keys and keys_ref.shape[1] > 1 else 0
        if has_keys and place not in columns:
            columns[place] = key_column(keys_ref, b, number)
        return columns.get(place)

    def finish(b, g, h, rows, parts):
        value, total, out = heads.transposed(v_ref, b, g, h), 0.0, 0.0
        parts = [logits_of(b, g, h, rows, chunk, raw) for chunk, raw in zip(chunks, parts, strict=True)]
        top = functools.reduce(jnp.maximum, [jnp.max(logits, axis=0, keepdims=True) for logits in parts])
        for chunk, logits in zip(chunks, parts, strict=True):
            weights = jnp.exp2((logits - top) * factor)
            total = total + jnp.sum(weights, axis=0, keepdims=True)
            out = out + dot(value[:, chunk], weights.astype(v_ref.dtype), NN)
            yield
        if has_lse:
            lse = (top * spec.scale if plain else top) + jnp.log(total)
            if has_keys or has_mask:
                lse = jnp.where(top > 0.5 * HIDDEN, lse, SEES_NOTHING)
            lses.setdefault((b, g, h), []).append(lse)
            if rows.stop == length:
                lse_ref[b, pl.ds(heads.index(g, h), 1), :] = jnp.concatenate(lses.pop((b, g, h)), 1)
        outs.setdefault((b, g, rows.start), []).append(out * (1.0 / total))
        if heads.last(g, h):
            heads.write(out_ref, b, g, rows, outs.pop((b, g, rows.start)))

    # All heads of a group for a tile of queries, then the next tile.
    units = [(b, g, h, rows) for b, g, h in heads.units() for rows in tiles]
    units.sort(key=lambda unit: (unit[0], unit[1], unit[3].start, unit[2]))
    _queue(heads, units, start, finish, chunks, 1)


def _backward(q_ref, k_ref, v_ref, *refs, spec, has_bias, has_keys, has_mask, one_bias):
    bias_ref, keys_ref, mask_ref, refs = _split(spec, refs, has_bias, has_keys, has_mask)
    dout_ref, lse_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    results = dq_ref, dk_ref, dv_ref
    heads, dim = _heads(spec, (q_ref, k_ref, v_ref, dout_ref), results, refs[has_bias:]), spec.head_dim
    columns, grads = {}, {}
    plain = not (has_bias or has_keys or has_mask or spec.causal) and spec.scale > 0
    wide = spec.aligned and dim >= LANES  # dV and dK not transposed: their columns fill the matrix unit

    chunks = _chunks(k_ref.shape[1], spec.chunk)

    def start(b, g, h, parts):
        k, v, q, dout = heads.only(k_ref, b, g, h), heads.only(v_ref, b, g, h), heads.group(q_ref, b, g), None
        dout = heads.group(dout_ref, b, g)
        for chunk in chunks:
            parts.append((dot(k[chunk], q, NT), dot(v[chunk], dout, NT)))
            yield

    def finish(b, g, h, parts):
        number = heads.index(g, h)
        lse = lse_ref[b, pl.ds(number, 1), :]
        if has_keys and b not in columns:
            columns[b] = key_column(keys_ref, b, number)
        total, done = 0.0, []
        for chunk, (raw, dweights) in zip(chunks, parts, strict=True):
            if plain:
                weights = jnp.exp2(raw * (spec.scale * LOG2E) - lse * LOG2E)
            else:
                bias = _at(bias_ref, b, number)[chunk] if has_bias else None
                mask = _at(mask_ref, b, number)[chunk] if has_mask else None
                column = columns[b][chunk] if has_keys else None
                logits = _logits(raw, spec, bias, column, mask, chunk.start, 0)
                weights = jnp.exp2((logits - lse) * LOG2E)
            products = weights * dweights
            total = total + jnp.sum(products, axis=0, keepdims=True)
            done.append((weights, products))
            yield
        q, dout = heads.group(q_ref, b, g), heads.group(dout_ref, b, g)
        kt = heads.transposed(k_ref, b, g, h)
        if not wide:
            qt, doutt = heads.transposed(q_ref, b, g, h), heads.transposed(dout_ref, b, g, h)
        dq, dks, dvs = 0.0, [], []
        for chunk, (weights, products) in zip(chunks, done, strict=True):
            dlogits = products - weights * total
            if has_keys or has_mask:  # a row without visible keys: weights 1 / Lk for dV, 0 for dQ, dK, dbias
                weights = weights + jnp.where(lse > 0.5 * SEES_NOTHING, 1.0 / k_ref.shape[1], 0.0)
            if has_bias:
                own = jnp.where(heads.again, 0.0, dlogits) if heads.lag else dlogits
                _accumulate(refs[0], b, number, chunk, own)
            dlogits, weights = dlogits.astype(q_ref.dtype), weights.astype(q_ref.dtype)
            dvs.append(dot(weights, dout, NN) if wide else dot(doutt, weights, NT))
            dks.append(dot(dlogits, q, NN) if wide else dot(qt, dlogits, NT))
            dq = dq + dot(kt[:, chunk], dlogits, NN)
            yield
        join = lambda parts: jnp.concatenate(parts, 0 if wide else 1) if len(parts) > 1 else parts[0]
        grads.setdefault((b, g), []).append((dq * spec.scale, join(dks) * spec.scale, join(dvs)))
        if heads.last(g, h):
            dq, dk, dv = zip(*grads.pop((b, g)), strict=True)
            heads.write(dq_ref, b, g, slice(None), dq)
            for ref, parts in ((dk_ref, dk), (dv_ref, dv)):
                if wide:
                    heads.write_group(ref, b, g, slice(None), parts[0])
                else:
                    heads.write(ref, b, g, slice(None), parts)

    if has_bias:
        _zero_before_first(refs[0], heads, one_bias)
    _queue(heads, heads.units(), start, finish, chunks, 2)


def _zero_before_first(ref, heads, one_bias):
    """Zeroes dbias at its first step: its block stays on chip while the examples or heads that share a bias pass."""
    first = pl.program_id(0) <= heads.lag if one_bias else heads.step == 0
    if one_bias and not heads.lag and not isinstance(heads.step, int):
        first = first & (heads.step == 0)

    @pl.when(first)
    def _():
        ref[...] = jnp.zeros_like(ref)


def _accumulate(ref, b, h, rows, value):
    b, h = (b if ref.shape[0] > 1 else 0), (h if ref.shape[1] > 1 else 0)
    ref[b, h, rows] = ref[b, h, rows] + value


def _block(array, spec, lag):
    """Returns the block of an array [1 | B, ...]: a grid step's examples, or the entry that all examples share."""
    shared, trailing = array.shape[0] == 1, (0,) * (array.ndim - 1)
    if spec.lagged:
        last = array.shape[0] * spec.heads - 1
        place = lambda n: (jax.lax.div(jnp.clip(n - lag, 0, last), spec.heads), *trailing)
        return pl.BlockSpec((1, *array.shape[1:]), (lambda n: (0, *trailing)) if shared else place)
    index = lambda i, j: (0 if shared else i, *trailing)
    return pl.BlockSpec((1 if shared else spec.examples, *array.shape[1:]), index)


def _call(kernel, name, spec, inputs, outputs, fetched, late, begun, carries):
    """Runs a kernel over (examples, groups of heads).

    If heads lag, scratch holds the inputs in `fetched`, the first `late` outputs, and the products (of shapes `begun`)
    that a step begins for the next step.
    """
    batch = inputs[0].shape[0]
    grid, semantics = (batch // spec.examples, spec.steps), ("arbitrary" if carries else "parallel", "arbitrary")
    if spec.lagged:
        grid, semantics = (batch * spec.heads + 2,), ("arbitrary",)
    packed = lambda x: any(x is y for y in fetched)
    late = outputs[:late]
    scratch = [pltpu.VMEM((x.shape[1], LANES), x.dtype) for x in fetched]
    scratch += [pltpu.VMEM((spec.head_dim, x.shape[1]), jnp.float32) for x in late]
    scratch += [pltpu.VMEM(shape, jnp.float32) for shape in begun]
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[_block(x, spec, 0 if packed(x) else 1) for x in inputs],
        out_specs=[_block(x, spec, 2 if any(x is y for y in late) else 1) for x in outputs],
        out_shape=outputs,
        scratch_shapes=scratch if spec.lagged else [],
        interpret=spec.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT),
    )(*inputs)


VMEM_LIMIT = 64 << 20


def like(q, shape, dtype):
    """Returns the type of a result that varies over the same mesh axes as q (under `shard_map`)."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(q).manual_axis_type)


def forward(q, k, v, bias, keys, mask, *, spec, lse):
    """Returns out [B, Lq, H * D] and, if `lse`, the logits' log-sum-exp [B, H, Lq] (fp32).

    q [B, Lq, H * D]; k, v [B, Lk, H * D]; bias [1 | B, 1 | H, Lk, Lq] fp32, keys [1 | B, 1, 1, Lk] fp32 (1.0 =
    visible), mask [1 | B, 1 | H, Lk, Lq] int32 (1 = visible). bias, keys and mask may be None.
    """
    extras = [x for x in (bias, keys, mask) if x is not None]
    inputs = [q, k, v, *extras]
    outputs = [like(q, q.shape, q.dtype)]
    if lse:
        outputs.append(like(q, (q.shape[0], spec.heads, q.shape[1]), jnp.float32))
    flags = dict(has_bias=bias is not None, has_keys=keys is not None, has_mask=mask is not None)
    tiles = _chunks(q.shape[1], spec.tile)
    if spec.lagged:
        spec = spec._replace(ahead=min(spec.ahead, len(tiles)))
    begun = [(k.shape[1], rows.stop - rows.start) for rows in tiles[: spec.ahead]]
    kernel = functools.partial(_forward, spec=spec, has_lse=lse, **flags)
    return _call(kernel, "attention_forward", spec, inputs, outputs, (q, k, v), 1, begun, carries=False)


def backward(q, k, v, bias, keys, mask, dout, lse, *, spec):
    """Returns dq, dk, dv with the shapes of q, k, v, and dbias if bias is given; arguments as in `forward`."""
    extras = [x for x in (bias, keys, mask) if x is not None]
    inputs = [q, k, v, *extras, dout, lse]
    outputs = [like(q, x.shape, x.dtype) for x in (q, k, v)]
    if bias is not None:
        outputs.append(like(q, bias.shape, jnp.float32))
    flags = dict(has_bias=bias is not None, has_keys=keys is not None, has_mask=mask is not None)
    one_bias = bias is not None and bias.shape[0] == 1
    if spec.lagged:
        spec = spec._replace(ahead=min(spec.ahead, 1))
    begun = [(k.shape[1], q.shape[1])] * 2 * spec.ahead
    kernel = functools.partial(_backward, spec=spec, one_bias=one_bias, **flags)
    return _call(kernel, "attention_backward", spec, inputs, outputs, (q, k, v, dout), 3, begun, carries=one_bias)
