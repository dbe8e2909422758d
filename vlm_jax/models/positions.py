"""Positions: learned, 2-D sine-cosine, relative; and resampling of a learned table to another grid."""

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import choose
from vlm_jax.errors import UserError


def sincos2d(height, width, dim, temperature=10_000.0, dtype=jnp.float32):
    """Returns 2-D sine-cosine positions (Chen et al. 2021, "MoCo v3", appendix).

    Args:
      height, width: size of the grid, in patches.
      dim: D, a multiple of 4.
      temperature: ratio of the longest to the shortest wavelength.
      dtype: dtype of the result.

    Returns:
      [1, height * width, D], row-major.
    """
    if dim % 4:
        raise UserError(f"sincos2d positions need a width that is a multiple of 4; got {dim}")
    y, x = np.mgrid[:height, :width]
    omega = temperature ** -(np.arange(dim // 4) / max(dim // 4 - 1, 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return jnp.asarray(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None], dtype)


def learned(module, length, width):
    """Returns the parameter `pos_embed` [1, length, width] of a linen module, N(0, 1 / width) at init."""
    return module.param("pos_embed", nn.initializers.normal(width**-0.5), (1, length, width))


def relative_bucket(ahead, buckets, distance, two_way):
    """Returns the row in a table of relative positions (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Follows Mesh TensorFlow: half of the rows are for exact distances, the others for ranges that grow by a constant
    factor up to `distance`.

    Args:
      ahead: integers, the key's position minus the query's.
      buckets: rows of the table.
      distance: distances from here on share the last row.
      two_way: True: keys ahead use the upper half of the rows; False: keys ahead share the row of distance 0.

    Returns:
      integers of the same shape, 0 <= row < buckets.
    """
    first = 0
    if two_way:
        buckets //= 2
        first = jnp.where(ahead > 0, buckets, 0)
    away = jnp.abs(ahead) if two_way else jnp.maximum(-ahead, 0)
    exact = buckets // 2
    ranges = buckets - exact
    ends = [exact * (distance / exact) ** (k / ranges) for k in range(1, ranges)]
    ends = jnp.asarray([math.ceil(end - 1e-6) for end in ends], jnp.int32)  # integers: the same on any platform
    return first + jnp.where(away < exact, away, exact + jnp.searchsorted(ends, away, "right", method="compare_all"))


class RelativeBias(nn.Module):
    """The bias on attention logits by the distance of a key from a query: a table [buckets, heads].

    Attributes:
      heads: attention heads.
      buckets, distance, two_way: see `relative_bucket`.
    """

    heads: int
    buckets: int = 32
    distance: int = 128
    two_way: bool = True

    @nn.compact
    def __call__(self, ahead):
        """Key positions minus query positions, integers [Lq, Lk] -> fp32 [heads, Lq, Lk]."""
        init = nn.initializers.normal(0.1)
        table = self.param("table", init, (self.buckets, self.heads))
        return jnp.moveaxis(table[relative_bucket(ahead, self.buckets, self.distance, self.two_way)], -1, 0)


def resample_posemb(table, old_grid, new_grid, method="linear"):
    """Resamples a learned table to another grid by one of the published methods.

    Args:
      table: [1, h * w, D]; the caller splits off rows of other tokens (cls).
      old_grid: (h, w) of the table.
      new_grid: the target (h, w).
      method: a key of `RESAMPLING`: "linear", corner-aligned (big_vision: `scipy.ndimage.zoom(order=1)`); "bicubic",
        antialiased (open_clip, timm); "bicubic_sharp", not antialiased, a = -0.75 (DINOv2 and ViT in Transformers).

    Returns:
      float32 numpy array [1, new_h * new_w, D].
    """
    table = np.asarray(table, np.float32)
    if table.ndim != 3 or table.shape[:2] != (1, old_grid[0] * old_grid[1]):
        raise UserError(f"a position table for the grid {tuple(old_grid)} has shape [1, h * w, D]; got {table.shape}")
    rows, columns = map(choose(RESAMPLING, method, "the resampling method"), old_grid, new_grid)
    grid = np.einsum("yh,xw,hwd->yxd", rows, columns, table.reshape(*old_grid, -1), optimize=True)
    return grid.reshape(1, -1, table.shape[-1]).astype(np.float32)


def to_rows(table, rows, method="linear"):
    """Resamples a learned table of a square grid to another number of rows.

    A class token's row stays, or goes where the new table has none.

    Args:
      table: [1, n, D], rows of a square grid, perhaps after one row of a class token.
      rows: the new n, of a square grid, perhaps after a class token's row.
      method: as for `resample_posemb`.

    Returns:
      float32 numpy array [1, rows, D].

    Raises:
      UserError: one of the grids is no square, or only the new table has a class token.
    """
    table = np.asarray(table, np.float32)
    for first, kept in ((0, 0), (1, 1), (1, 0)):
        counts = table.shape[1] - first, rows - kept
        old, new = map(math.isqrt, counts)
        if (old * old, new * new) == counts:
            grid = resample_posemb(table[:, first:], (old, old), (new, new), method)
            return np.concatenate([table[:, :kept], grid], axis=1)
    raise UserError(
        f"{table.shape[1]} rows of positions cannot become {rows}: expected squares, and no new class token"
    )


KEPT = 20  # positions of texts that stay where they are in a longer table


def of_length(table, length):
    """Fits a learned table of text positions to another length: the first rows, or a stretched table.

    Stretching keeps the first positions, which short captions have trained well, and reads the others between two old
    ones, evenly spaced (Zhang et al. 2024, "Long-CLIP", arXiv:2403.15378: 77 positions become 248). The line through
    the last two goes on to the end.

    Args:
      table: [1, n, D].
      length: the new n.

    Returns:
      float32 numpy array [1, length, D].

    Raises:
      UserError: the table is too short to be stretched.
    """
    table = np.asarray(table, np.float32)
    count = table.shape[1]
    if length <= count:
        return table[:, :length]
    if count < KEPT + 2:
        raise UserError(f"{count} positions of texts cannot become {length}; expected a table of {KEPT + 2} or more")
    at = np.concatenate([np.arange(KEPT), KEPT + np.arange(length - KEPT) * ((count - KEPT) / (length - KEPT))])
    before = np.minimum(at.astype(int), count - 2)
    share = (at - before).astype(np.float32)[:, None]
    return table[:, before] * (1 - share) + table[:, before + 1] * share


def resampled(table, old_grid, grids, length):
    """Resamples a learned table to each picture's grid: bilinear, antialiased (SigLIP 2's NaFlex).

    Args:
      table: [h * w, D].
      old_grid: (h, w) of the table.
      grids: integers [B, 2], the target (h, w).
      length: N; of each picture the first h * w positions count, row by row.

    Returns:
      [B, N, D].
    """
    at, columns = jnp.arange(length), grids[:, 1:]
    wanted = jnp.stack([at // columns, at % columns])  # [2, B, N]

    def weights(old, new, at):
        step = old / new[:, None]
        distance = jnp.arange(old) - ((at + 0.5) * step - 0.5)[..., None]
        share = jnp.maximum(1 - jnp.abs(distance) / jnp.maximum(step, 1)[..., None], 0)
        return share / jnp.maximum(share.sum(-1, keepdims=True), 1e-6)  # weights beyond the picture may all be 0

    rows, columns = (weights(old_grid[axis], grids[:, axis], wanted[axis]) for axis in (0, 1))
    share = rows[..., :, None] * columns[..., None, :]
    return jnp.matmul(
        share.reshape(*share.shape[:2], -1), table, precision="highest"
    )  # the own grid: exactly the table


def _corner_aligned(old, new):
    """Returns linear weights [new, old]; the first and last rows keep their places."""
    at = np.linspace(0.0, old - 1.0, new) if new > 1 else np.zeros(1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)


def _bicubic(old, new, a, antialias):
    """Returns weights [new, old] of Keys' kernel (parameter a) at pixel centres; edges repeat unless antialiased."""
    step = old / new
    stretch = max(step, 1.0) if antialias else 1.0
    reach = int(np.ceil(2 * stretch)) + 1
    source = np.arange(-reach, old + reach)
    x = np.abs((np.arange(new)[:, None] + 0.5) * step - 0.5 - source) / stretch
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    share = np.where(x <= 1, near, np.where(x < 2, far, 0))
    repeat_edges = np.clip(source, 0, old - 1)[:, None] == np.arange(old)
    share = share[:, reach:-reach] if antialias else share @ repeat_edges
    return share / share.sum(1, keepdims=True)


RESAMPLING = {
    "linear": _corner_aligned,
    "bicubic": functools.partial(_bicubic, a=-0.5, antialias=True),
    "bicubic_sharp": functools.partial(_bicubic, a=-0.75, antialias=False),
}
