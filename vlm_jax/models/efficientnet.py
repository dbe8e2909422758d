"""A convolutional image tower: EfficientNet-Lite (Tan and Le 2019, arXiv:1905.11946).

The Lite variants are the EfficientNets for small devices: ReLU6 replaces swish, blocks have no squeeze-and-excitation,
and the widths of stem and head do not depend on the multiplier.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.convolutions import ConvNorm, check_images
from vlm_jax.models.pooling import Encoded, pool

LITE = {  # width multiplier, depth multiplier, side of the images in pixels
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}
STAGES = (  # repeats, kernel, stride, expansion, outputs (table 1)
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class BlockSizes(NamedTuple):
    """Kernel side, stride, expansion and output channels of one block."""

    kernel: int
    stride: int
    expansion: int
    outputs: int


def lookup(variant):
    """Returns {"width_multiplier", "depth_multiplier"} for a key of `LITE`."""
    width, depth, _ = choose(LITE, variant, "variant")
    return dict(width_multiplier=width, depth_multiplier=depth)


def block_sizes(width_multiplier, depth_multiplier):
    """Returns the `BlockSizes` of all blocks. Widths are multiples of 8. First and last stage are never repeated."""
    blocks = []
    for i, (repeats, kernel, stride, expansion, outputs) in enumerate(STAGES):
        if i not in (0, len(STAGES) - 1):
            repeats = math.ceil(repeats * depth_multiplier)
        outputs = _round_to_8(outputs * width_multiplier)
        blocks += [BlockSizes(kernel, stride if j == 0 else 1, expansion, outputs) for j in range(repeats)]
    return blocks


def _round_to_8(channels):
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8


class Block(nn.Module):
    """Mobile inverted bottleneck (Sandler et al. 2018): expand 1x1, depthwise, project 1x1; residual if shapes allow.

    Attributes:
      sizes: the block's `BlockSizes`.
      dtype: dtype of the convolutions.
    """

    sizes: BlockSizes
    dtype: str

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), outputs]."""
        kernel, stride, expansion, outputs = self.sizes
        y = x
        if expansion != 1:
            y = jax.nn.relu6(ConvNorm(expansion * x.shape[-1], 1, 1, self.dtype, name="expand")(y))
        y = jax.nn.relu6(ConvNorm(None, kernel, stride, self.dtype, name="depthwise")(y))
        y = ConvNorm(outputs, 1, 1, self.dtype, name="project")(y)
        return x + y if stride == 1 and outputs == x.shape[-1] else y


class EfficientNetLite(nn.Module):
    """Stem -> blocks -> 1x1 convolution -> pool -> head. Made for released weights: see `FrozenBatchNorm`.

    Padding is TensorFlow's "SAME" at every image size (PyTorch ports agree only at their native size).

    Attributes:
      width_multiplier: factor on the channels of the blocks; `lookup` has the variants' factors.
      depth_multiplier: factor on the repeats of all stages but the first and the last.
      stem_width: channels of the first convolution.
      head_width: D, channels of the last convolution.
      pool: "gap" (the mean over the grid), "max" or "none".
      out_dim: width of the head (1000 for ImageNet's logits); None for no head.
      head_bias: whether the head has a bias.
      dtype: compute dtype.
    """

    width_multiplier: float = 1.0
    depth_multiplier: float = 1.0
    stem_width: int = 32
    head_width: int = 1280
    pool: str = "gap"
    out_dim: int | None = None
    head_bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, *, train=False):
        """Encodes images.

        Args:
          images: floating [B, H, W, 3], already normalised.
          train: unused; other towers have this argument.

        Returns:
          `Encoded`: pooled [B, D] or [B, out_dim] (None for pool "none"), tokens [B, h * w, D] with
          h = ceil(H / 32), w = ceil(W / 32), mask None.

        Raises:
          UserError: the images have another shape or dtype, the pool is unknown, or a head has no pool.
        """
        self._check(images)
        x = jax.nn.relu6(ConvNorm(self.stem_width, 3, 2, self.dtype, name="stem")(images.astype(self.dtype)))
        for i, sizes in enumerate(block_sizes(self.width_multiplier, self.depth_multiplier)):
            x = Block(sizes, self.dtype, name=f"blocks_{i}")(x)
        x = jax.nn.relu6(ConvNorm(self.head_width, 1, 1, self.dtype, name="last")(x))
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.pool == "none":
            return Encoded(None, tokens, None)
        pooled = pool(self.pool, tokens)
        if self.out_dim:
            pooled = nn.Dense(self.out_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(pooled)
        return Encoded(pooled, tokens, None)

    def _check(self, images):
        if self.pool not in ("gap", "max", "none"):
            raise UserError(f"pool is `{self.pool}`; an EfficientNet has one of: gap, max, none")
        if self.pool == "none" and self.out_dim:
            raise UserError('pool "none" gives no vector for a head; leave out_dim unset')
        check_images(images)
