"""Absolute positions: learned, 2-D sine-cosine, and the resampling of a learned table to another grid."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError


def sincos2d(height, width, dim, temperature=10_000.0):
    """2-D sine-cosine positions (Chen et al. 2021, "MoCo v3", appendix).

    Args:
      height, width: of the grid, in patches.
      dim: D, a multiple of 4.
      temperature: ratio of the longest to the shortest wavelength.

    Returns:
      float32 [1, height * width, D], row-major.
    """
    if dim % 4:
        raise UserError(f"sincos2d positions need a width that is a multiple of 4; got {dim}")
    y, x = np.mgrid[:height, :width]
    omega = temperature ** -(np.arange(dim // 4) / max(dim // 4 - 1, 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return jnp.asarray(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None], jnp.float32)


def learned(module, length, width):
    """The parameter `pos_embed` [1, length, width] of a linen module, N(0, 1 / width) at init."""
    return module.param("pos_embed", nn.initializers.normal(width**-0.5), (1, length, width))


def resample_posemb(table, old_grid, new_grid):
    """Resamples a learned table to another grid, corner-aligned and linear (`scipy.ndimage.zoom(order=1)`).

    Args:
      table: [1, h * w, D]; rows of other tokens (cls) are the caller's to split off.
      old_grid: (h, w) of the table.
      new_grid: (h, w) wanted.

    Returns:
      float32 numpy array [1, new_h * new_w, D].
    """
    table = np.asarray(table, np.float32)
    if table.ndim != 3 or table.shape[:2] != (1, old_grid[0] * old_grid[1]):
        raise UserError(f"a position table for the grid {tuple(old_grid)} has shape [1, h * w, D]; got {table.shape}")
    grid = table.reshape(*old_grid, -1)
    for axis, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
        at = np.linspace(0.0, old - 1.0, new) if new > 1 else np.zeros(1)
        low = np.minimum(at.astype(int), max(old - 2, 0))
        share = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        grid = grid.take(low, axis) * (1 - share) + grid.take(np.minimum(low + 1, old - 1), axis) * share
    return grid.reshape(1, -1, table.shape[-1])
