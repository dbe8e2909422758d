"""Log-sum-exp and sigmoid losses over all pairs of two sets of embeddings, without the logits' matrix.

    l_ij = scale x_i . y_j + bias,   x [N, D] (images, queries), y [M, D] (texts, candidates)

One pass over the pairs serves rows and columns. The gradient makes a second pass and recomputes the logits. Memory is
O((N + M) D), on a mesh O((N + M) D / devices). `block` has the equations, `ring` the communication.

    row_lse, col_lse = pairwise_logsumexp(image, text, scale)
    loss = (row_lse.mean() + col_lse.mean()) / 2 - scale * (image * text).sum(1).mean()     # CLIP
    loss = pairwise_sigmoid_loss(image, text, scale, bias)                                  # SigLIP
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.errors import UserError
from vlm_jax.kernels.contrastive import block, blockwise, gpu, ring, tpu
from vlm_jax.kernels.contrastive.block import IGNORED_COLUMN, IGNORED_ROW, LOWEST, Results, Side, Spec
from vlm_jax.kernels.contrastive.reference import statistics as _reference

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "Results",
    "explain",
    "pairwise_logsumexp",
    "pairwise_sigmoid_loss",
    "statistics",
]


def _interpreted(kernel):
    run = {name: functools.partial(getattr(kernel, name), interpret=True) for name in ("forward", "backward")}
    return SimpleNamespace(**run, lacks=kernel.lacks)


IMPLEMENTATIONS = {
    "reference": None,
    "blockwise": blockwise,
    "tpu": tpu,
    "tpu_interpret": _interpreted(tpu),
    "gpu": gpu,
    "gpu_interpret": _interpreted(gpu),
}
"""Name -> module with `forward` and `backward` for one device's pairs, and `lacks`. `*_interpret` runs the same kernel
in Pallas's interpreter on any platform, slowly: for tests."""

PLAIN_PAIRS = 1024**2
"""On one device the plain form is the default up to this number of pairs: see experiments/contrastive_memory."""

BATCH_AXES = ("data", "fsdp")


class Choice(NamedTuple):
    """The implementation for given arguments, and the reason."""

    implementation: str
    reason: str


def pairwise_logsumexp(x, y, scale, bias=None, *, x_mask=None, y_mask=None, implementation=None, mesh=None, axes=None):
    """Returns the log-sum-exps of rows and columns of scale x y^T + bias, in one pass.

    Args:
      x: [N, D], float32, bfloat16, float16 or float64.
      y: [M, D], of x's dtype.
      scale: scalar.
      bias: scalar or None.
      x_mask: bool [N], False for ignored rows (padding): no column's sum contains an ignored row, and its result and
        gradients are 0 for any content.
      y_mask: bool [M], the same for columns.
      implementation: a key of `IMPLEMENTATIONS`; None chooses by platform and size (see `explain`).
      mesh: a `jax.sharding.Mesh`; x and y are sharded on their leading axis, and blocks travel a ring. Defaults to the
        mesh of `jax.set_mesh`, if that mesh has batch axes.
      axes: the mesh's axes that split the batch; defaults to `data` and `fsdp`, if the mesh has them.

    Returns:
      (row_lse [N], col_lse [M]), float32 (float64 for float64 inputs), with first-order gradients for x, y, scale and
      bias.

    Raises:
      UserError: shapes or dtypes do not agree, the implementation is unknown, the mesh lacks an axis, or the
        implementation does not support the embeddings.
    """
    rows, columns = statistics(
        x, y, scale, bias, x_mask=x_mask, y_mask=y_mask, implementation=implementation, mesh=mesh, axes=axes
    )
    return rows.lse, columns.lse


def pairwise_sigmoid_loss(
    x,
    y,
    scale,
    bias=None,
    *,
    x_labels=None,
    y_labels=None,
    x_mask=None,
    y_mask=None,
    implementation=None,
    mesh=None,
    axes=None,
):
    """-1/N sum_ij log sigmoid(z_ij l_ij), z = +1 for positives, else -1 (SigLIP, arXiv:2303.15343, section 3.2).

    Args:
      x_labels, y_labels: int [N] and [M]; pairs with equal labels are positives. None: the pairs (x_i, y_i) are.
      others: as in `pairwise_logsumexp`.

    Returns:
      Scalar; N counts only rows where `x_mask` is True.
    """
    if x_labels is None and y_labels is None:
        x_labels, y_labels = jnp.arange(len(x)), jnp.arange(len(y))
    rows, _ = statistics(
        x, y, scale, bias, x_labels=x_labels, y_labels=y_labels, x_mask=x_mask, y_mask=y_mask, penalty="sigmoid",
        implementation=implementation, mesh=mesh, axes=axes,
    )  # fmt: skip
    return jnp.sum(rows.loss) / (len(x) if x_mask is None else jnp.maximum(jnp.sum(x_mask), 1))


def statistics(
    x,
    y,
    scale,
    bias=None,
    *,
    x_labels=None,
    y_labels=None,
    x_mask=None,
    y_mask=None,
    penalty="softmax",
    positives=False,
    best=False,
    implementation=None,
    mesh=None,
    axes=None,
) -> tuple[Results, Results]:
    """Returns statistics of rows and columns for contrastive losses and metrics, in one pass.

    Args:
      x_labels, y_labels: int [N] and [M], or None; pairs with equal labels are positives.
      penalty: "softmax": `lse` of rows and columns. "sigmoid": `loss` of rows.
      positives: also `positive_sum` and `positive_count` (softmax only).
      best: also `best_positive` and `best_negative`.
      others: as in `pairwise_logsumexp`.

    Returns:
      (`Results` of rows [N], `Results` of columns [M]).
    """
    mesh = ambient_mesh(axes) if mesh is None else mesh
    arrays = dict(x_labels=x_labels, y_labels=y_labels, x_mask=x_mask, y_mask=y_mask)
    choice = explain(x, y, scale, bias, **arrays, implementation=implementation, mesh=mesh, axes=axes)
    if penalty not in ("softmax", "sigmoid"):
        raise UserError(f"contrastive penalty is `{penalty}`; expected one of: softmax, sigmoid")
    if x_labels is None and (best or positives or penalty == "sigmoid"):
        raise UserError("contrastive statistics of positives need x_labels and y_labels; got None")
    scale = jnp.asarray(scale, block.accumulator(x))
    bias = None if bias is None else jnp.asarray(bias, scale.dtype)
    for name in ("x_labels", "y_labels"):
        if arrays[name] is not None:
            arrays[name] = jnp.asarray(arrays[name]).astype(jnp.int32)
    spec = Spec(penalty, positives, best, by=choice.implementation)
    if choice.implementation == "reference":
        return _reference(spec, x, y, scale, bias, **arrays)
    where = None
    if mesh is not None:
        axes = _axes(mesh, axes)
        where = (mesh, axes) if _devices(mesh, axes) > 1 else None
    return _statistics(spec, where, x, y, scale, bias, arrays)


def explain(
    x,
    y,
    scale=None,
    bias=None,
    *,
    x_labels=None,
    y_labels=None,
    x_mask=None,
    y_mask=None,
    implementation=None,
    mesh=None,
    axes=None,
) -> Choice:
    """Returns the `Choice` for the same arguments (arrays or `jax.ShapeDtypeStruct`s).

    With implementation=None the platform decides: the mesh's devices, else `jax.default_backend()`. On a TPU the choice
    is `tpu` if `tpu` supports the embeddings. In all other cases the batch size decides between `reference` and
    `blockwise`. `gpu` runs only by name.
    """
    _check(x, y, scale, bias, x_labels, y_labels, x_mask, y_mask)
    mesh = ambient_mesh(axes) if mesh is None else mesh
    devices = 1 if mesh is None else _devices(mesh, _axes(mesh, axes))
    around = (
        f"; {devices} devices pass columns around a ring over {' x '.join(_axes(mesh, axes))}" if devices > 1 else ""
    )
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise UserError(
                f"contrastive implementation is `{implementation}`; expected one of: {', '.join(IMPLEMENTATIONS)}"
            )
        if around and implementation == "reference":
            raise UserError("contrastive implementation `reference` runs on one device; use another, or None")
        lacks = getattr(IMPLEMENTATIONS[implementation], "lacks", lambda *_: None)(x, y)
        if lacks:
            raise UserError(f"contrastive implementation `{implementation}` cannot do {lacks}; use another, or None")
        return Choice(implementation, f"asked for by name{around}")
    unlike = ""
    if _platform(mesh) == "tpu":
        lacks = tpu.lacks(x, y)
        if not lacks:
            return Choice("tpu", f"the platform is tpu{around}")
        unlike = f"; the platform is tpu, but `tpu` cannot do {lacks}"
    pairs = len(x) * len(y)
    if not around and pairs <= PLAIN_PAIRS:
        faster = f"{pairs} pairs are at most {PLAIN_PAIRS}, below which holding all logits is faster"
        return Choice("reference", faster + unlike)
    if around:
        return Choice("blockwise", f"the batch is sharded{around}{unlike}")
    return Choice("blockwise", f"{pairs} pairs are more than {PLAIN_PAIRS}: logits are computed block by block{unlike}")


def _platform(mesh):
    device = (jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh).abstract_device
    return device.platform if device else jax.default_backend()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(spec, where, x, y, scale, bias, arrays):
    return _forward(spec, where, x, y, scale, bias, arrays)[0]


def _forward(spec, where, x, y, scale, bias, arrays):
    rows, columns = _sides(x, y, bias, arrays)
    stats = _run(spec, where, "forward", scale, rows, columns)
    stats = [jax.tree.map(lambda a, side=side: a[: len(side)], s) for s, side in zip(stats, (x, y), strict=True)]
    results = tuple(_results(s, arrays[mask]) for s, mask in zip(stats, ("x_mask", "y_mask"), strict=True))
    kept = [(s.max, s.sum, s.positive_count) for s in stats]
    return results, (x, y, scale, bias, arrays, kept)


def _backward(spec, where, saved, cotangents):
    x, y, scale, bias, arrays, kept = saved
    rows, columns = _sides(x, y, bias, arrays)
    sides, dbias = [], 0
    masks = arrays["x_mask"], arrays["y_mask"]
    for side, mask, (top, total, count), g in zip((rows, columns), masks, kept, cotangents, strict=True):
        counted = lambda values, mask=mask: values if mask is None else jnp.where(mask, values, 0)
        if spec.penalty == "sigmoid":
            weight = None if g.loss is None else counted(g.loss)
        else:
            of_lse = jnp.where(top > LOWEST / 2, counted(g.lse), 0)
            weight, dbias = of_lse / jnp.maximum(total, jnp.finfo(total.dtype).tiny), dbias + jnp.sum(of_lse)
        positive = None
        if spec.positives:
            positive = counted(g.positive_sum)
            dbias += jnp.sum(positive * count)
        sides.append(side._replace(max=top, weight=weight, positive=positive))
    to_rows, to_columns, sums = _run(spec, where, "backward", scale, *sides)
    to_rows, to_columns = to_rows[: len(x)], to_columns[: len(y)]
    dscale = jnp.sum(jnp.sum(rows.z.astype(to_rows.dtype) * to_rows, axis=1))
    if spec.penalty == "sigmoid":
        dbias = jnp.sum(sums[: len(x)])
    counted = lambda d, z, mask: (scale * (d if mask is None else jnp.where(mask[:, None], d, 0))).astype(z.dtype)
    dx, dy = counted(to_rows, x, masks[0]), counted(to_columns, y, masks[1])
    return dx, dy, dscale, None if bias is None else dbias.astype(bias.dtype), None


_statistics.defvjp(_forward, _backward)


def _sides(x, y, bias, arrays):
    """Returns (rows, columns); masked ones have the logit `LOWEST`, a label without match, and a zero embedding."""

    def side(z, mask, labels, ignored, bias):
        add = None if bias is None else jnp.broadcast_to(bias, len(z))
        if mask is not None:
            add = jnp.where(mask, 0 if add is None else add, jnp.asarray(LOWEST, block.accumulator(z)))
            z = jnp.where(mask[:, None], z, 0)
            labels = None if labels is None else jnp.where(mask, labels, ignored)
        return Side(z, add, labels)

    return (
        side(x, arrays["x_mask"], arrays["x_labels"], IGNORED_ROW, bias),
        side(y, arrays["y_mask"], arrays["y_labels"], IGNORED_COLUMN, None),
    )


def _results(stats, mask):
    counted = lambda values: values if mask is None or values is None else jnp.where(mask, values, 0)
    lse = None
    if stats.max is not None:
        lse = counted(jnp.where(stats.max > LOWEST / 2, stats.max + jnp.log(stats.sum), -jnp.inf))
    return Results(lse, *map(counted, stats[2:5]), *stats[5:])


def _run(spec, where, direction, scale, rows, columns):
    """Runs the pass on one device or around the ring; the results may be padded."""
    sweep = getattr(IMPLEMENTATIONS[spec.by], direction)
    if where is None:
        return sweep(spec, scale, rows, columns)
    mesh, axes = where
    size = _devices(mesh, axes)
    fill = lambda n, unit: -(-n // unit) * unit
    rows = blockwise.pad(rows, fill(len(rows.z), size), IGNORED_ROW)
    columns = blockwise.pad(columns, fill(len(columns.z), 2 * size), IGNORED_COLUMN)
    passing = functools.partial(getattr(ring, direction), sweep, spec, axes, ring.order(mesh, axes))
    split = PartitionSpec(axes)
    return jax.shard_map(
        passing, mesh=mesh, in_specs=(PartitionSpec(), split, split), out_specs=split, check_vma=False
    )(scale, rows, columns)  # fmt: skip


def ambient_mesh(axes=None):
    """Returns the mesh of `jax.set_mesh` if it splits batches over devices, outside `shard_map`; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = BATCH_AXES if axes is None else (axes,) if isinstance(axes, str) else axes
    split = [name for name in names if kinds.get(name) == AxisType.Auto and mesh.shape[name] > 1]
    return mesh if split and AxisType.Manual not in kinds.values() else None


def _axes(mesh, axes):
    if axes is None:
        axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
        if not axes:
            raise UserError(
                f"the mesh has the axes {', '.join(mesh.shape)}, none of {', '.join(BATCH_AXES)}; give axes="
            )
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        if axis not in mesh.shape:
            raise UserError(f"the mesh has no axis `{axis}`; it has: {', '.join(mesh.shape)}")
    return axes


def _devices(mesh, axes):
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size


def _check(x, y, scale, bias, x_labels, y_labels, x_mask, y_mask):
    shapes = f"x {x.shape} {x.dtype}, y {y.shape} {y.dtype}"
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape + y.shape:
        raise UserError(f"contrastive embeddings are x [N, D] and y [M, D]; got {shapes}")
    if x.dtype != y.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"contrastive embeddings must have equal floating dtypes; got {shapes}; cast one with .astype")
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and jnp.ndim(value):
            raise UserError(f"contrastive {name} is a scalar; got shape {jnp.shape(value)}")
    if (x_labels is None) != (y_labels is None):
        raise UserError("contrastive labels are given for x and y, or for neither")
    for name, values, z, kind in (
        ("x_labels", x_labels, x, jnp.integer),
        ("y_labels", y_labels, y, jnp.integer),
        ("x_mask", x_mask, x, jnp.bool_),
        ("y_mask", y_mask, y, jnp.bool_),
    ):
        if values is not None and (values.shape != z.shape[:1] or not jnp.issubdtype(values.dtype, kind)):
            raise UserError(
                f"contrastive {name} is {kind.__name__} {z.shape[:1]}, one for each embedding; got {values.dtype} "
                f"{values.shape}"
            )
