"""All pairs of a batch sharded over a mesh: columns travel a ring, in both directions at once.

Each of n devices holds N / n rows and M / n columns. One half of the columns goes clockwise, the other half
counter-clockwise, so that both directions of a link carry data. After n steps each half has met every row and is home.
Liu et al. 2023 (arXiv:2310.01889) pass keys and values like this. Cheng et al. 2024 (Inf-CL, arXiv:2410.17243, section
3.2) pass the texts of a contrastive batch, in one direction and with only the rows' log-sum-exps. Here the columns'
partial results travel too, so that one pass serves both directions of the loss.

Step t computes one block. Meanwhile the devices send the embeddings of step t + 1 and the partial results of step
t - 1; the results are merged when both are there. A transfer never waits for the computation of the same step.

Devices pass columns along neighbouring chips (see `order`). A v5e pod needs this order to send asynchronously.

Memory per device: x and dx, three times y (home, here, next) and dy; O((N + M) / n D), and one block of logits.
"""

import jax
import jax.numpy as jnp

from vlm_jax.kernels.contrastive import block
from vlm_jax.kernels.contrastive.block import Side, Spec, Stats


def forward(sweep, spec: Spec, axes, order, scale, x: Side, y: Side) -> tuple[Stats, Stats]:
    """Returns the stats of this device's rows and columns; call it inside `shard_map`.

    Args:
      sweep: the `forward` of one device, e.g. `blockwise.forward`.
      spec: the requested results.
      axes: mesh axes of the ring.
      order: the devices, as positions along `axes`, in ring order; see `order`.
      scale: scalar.
      x: this device's rows.
      y: this device's columns, an even number.
    """
    dtype = block.accumulator(x.z)
    half = len(y.z) // 2

    def step(carry, _):
        rows, here, behind = carry
        ahead, behind = send(here, axes, order), send(behind, axes, order)
        parts = [sweep(spec, scale, x, columns) for columns in here]
        for part, _ in parts:
            rows = block.merge(rows, part)
        behind = tuple(block.merge(arrived, there) for arrived, (_, there) in zip(behind, parts, strict=True))
        return (rows, ahead, behind), None

    nothing = block.empty(spec, half, dtype, row=False)
    start = block.empty(spec, len(x.z), dtype, row=True), halves(y), (nothing, nothing)
    (rows, _, behind), _ = jax.lax.scan(step, start, length=len(order))
    return rows, whole(send(behind, axes, order))


def backward(sweep, spec: Spec, axes, order, scale, x: Side, y: Side):
    """Returns d y, d^T x and, for the sigmoid, the sum of d, for this device; arguments as in `forward`."""
    dtype = block.accumulator(x.z)

    def step(carry, _):
        to_rows, here, behind = carry
        ahead, behind = send(here, axes, order), send(behind, axes, order)
        parts = [sweep(spec, scale, x, columns) for columns in here]
        for of_rows, _, sums in parts:
            to_rows = jax.tree.map(jnp.add, to_rows, (of_rows, sums))
        behind = tuple(arrived + there for arrived, (_, there, _) in zip(behind, parts, strict=True))
        return (to_rows, ahead, behind), None

    sums = jnp.zeros(len(x.z), dtype) if spec.penalty == "sigmoid" else None
    nothing = jnp.zeros((len(y.z) // 2, y.z.shape[1]), dtype)
    start = (jnp.zeros(x.z.shape, dtype), sums), halves(y), (nothing, nothing)
    ((to_rows, sums), _, behind), _ = jax.lax.scan(step, start, length=len(order))
    return to_rows, whole(send(behind, axes, order)), sums


def send(pair, axes, order):
    """Sends the first of the pair to the next device and the second to the previous device."""
    clockwise = list(zip(order, order[1:] + order[:1], strict=True))
    counter = [(there, here) for here, there in clockwise]
    shift = lambda tree, pairs: jax.tree.map(lambda a: jax.lax.ppermute(a, axes, pairs), tree)
    return shift(pair[0], clockwise), shift(pair[1], counter)


def order(mesh, axes) -> tuple[int, ...]:
    """Returns the ring order of the devices along `axes`.

    On a grid of chips (v5e, v6e) the order is a closed walk over neighbours: every hop is one link. On a v5e of more
    than 4 x 4 chips, libtpu makes a collective-permute asynchronous only if all its pairs are near ("must satisfy
    routing limitations"). The last hop in index order is far, so that every transfer would block. For other shapes, an
    odd grid, or an abstract mesh (without known devices), the order is the index order.
    """
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    indices = tuple(range(size))
    if not isinstance(mesh, jax.sharding.Mesh):
        return indices
    names = list(mesh.axis_names)
    devices = mesh.devices.transpose([names.index(a) for a in (*axes, *(n for n in names if n not in axes))])
    places = [tuple(getattr(device, "coords", ()))[:2] for device in devices.reshape(size, -1)[:, 0]]
    at = {place: i for i, place in enumerate(places)}
    if len(at) < size or len(places[0]) < 2:
        return indices
    low, high = ([pick(place[k] for place in places) for k in (0, 1)] for pick in (min, max))
    sides = [high[k] - low[k] + 1 for k in (0, 1)]
    walk = closed_walk(*sides) if sides[0] * sides[1] == size else None
    return indices if walk is None else tuple(at[a + low[0], b + low[1]] for a, b in walk)


def closed_walk(rows: int, columns: int) -> list[tuple[int, int]] | None:
    """Returns a closed walk over all cells of a grid, from neighbour to neighbour; None if no such walk exists."""
    if rows * columns == 2:
        return [(0, 0), (rows - 1, columns - 1)]
    if rows % 2:
        walk = closed_walk(columns, rows) if columns % 2 == 0 else None
        return walk and [(a, b) for b, a in walk]
    if columns < 2:
        return None
    across = range(1, columns)
    there = [(a, b) for a in range(rows) for b in (across if a % 2 == 0 else reversed(across))]
    return there + [(a, 0) for a in reversed(range(rows))]


def halves(tree):
    """Returns (first halves, second halves) of every array's rows."""
    cut = lambda a: (a[: len(a) // 2], a[len(a) // 2 :])
    return tuple(jax.tree.map(lambda a, i=i: cut(a)[i], tree) for i in (0, 1))


def whole(pair):
    """Inverts `halves`."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *pair)
