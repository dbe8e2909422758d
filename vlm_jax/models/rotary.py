"""Rotary positions in two dimensions: queries and keys turn by angles that grow with the place of their patch."""

from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError


@flax.struct.dataclass
class Rotation:
    """The rotation of N tokens.

    Attributes:
      cos, sin: of the angles, fp32 [N, head_dim / 2]; [B, N, head_dim / 2] if examples differ.
      halves: whether channels i and i + head_dim / 2 turn together; else 2 i and 2 i + 1.
    """

    cos: jax.Array
    sin: jax.Array
    halves: bool = flax.struct.field(pytree_node=False)


class Rotary(NamedTuple):
    """Axial rotary positions (Su et al. 2021, arXiv:2104.09864; in two dimensions: Fang et al. 2023, arXiv:2303.11331).

    angle_k = place * temperature^(-4 k / head_dim), k < head_dim / 4, for the row and for the column of a patch.

    Attributes:
      temperature: ratio of the shortest to the longest wavelength, nearly.
      centred: whether places are the centres of the patches, from -1 to 1 over the picture, times 2 pi (DINOv3: Simeoni
        et al. 2025, arXiv:2508.10104, section 3.2); else numbers of rows and columns.
      offset: the number of the first row and column.
      reference: (rows, columns) to which numbers are scaled, the grid of the pretraining (EVA-02); None: no scale.
      columns_first: whether the angles of the column stand before those of the row.
      halves: see `Rotation`.
    """

    temperature: float = 10_000.0
    centred: bool = False
    offset: float = 0.0
    reference: tuple[int, int] | None = None
    columns_first: bool = False
    halves: bool = False

    def rotation(self, height: int, width: int, head_dim: int) -> Rotation:
        """Returns the `Rotation` of a grid of patches, row by row; raises if head_dim is no multiple of 4."""
        if head_dim % 4:
            raise UserError(f"rotary positions need a head_dim that is a multiple of 4; got {head_dim}")
        speeds = self.temperature ** -(np.arange(head_dim // 4) / (head_dim // 4))
        axes = []
        for axis, size in enumerate((height, width)):
            place = np.arange(size) + self.offset
            if self.centred:
                place = 2 * np.pi * (2 * (place + 0.5) / size - 1)
            elif self.reference is not None:
                place = place / size * self.reference[axis]
            axes.append(np.outer(place, speeds))
        rows, columns = np.repeat(axes[0], width, axis=0), np.tile(axes[1], (height, 1))
        angles = np.concatenate((columns, rows) if self.columns_first else (rows, columns), axis=1)
        return Rotation(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32), self.halves)


def rotate(heads: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the last N tokens of queries or keys [B, L, H, head_dim]; in fp32, the result in their dtype.

    Tokens before (cls, registers, prompts) have no place.
    """
    first = heads.shape[1] - rotation.cos.shape[-2]
    own, axis = heads[:, first:].astype(jnp.promote_types(heads.dtype, jnp.float32)), -2 if rotation.halves else -1
    sides = (2, -1) if rotation.halves else (-1, 2)
    x, y = jnp.moveaxis(own.reshape(*own.shape[:-1], *sides), axis, 0)
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]
    turned = jnp.stack([x * cos - y * sin, y * cos + x * sin], axis=axis).reshape(own.shape).astype(heads.dtype)
    return jnp.concatenate([heads[:, :first], turned], axis=1) if first else turned
