"""A convolutional image tower: ConvNeXt (Liu et al. 2022, arXiv:2201.03545)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.convolutions import check_images, depthwise
from vlm_jax.models.layers import ACTIVATIONS, Mlp, Norm
from vlm_jax.models.pooling import Encoded, pool

VARIANTS = {  # blocks and channels of each stage (section 3; xxlarge: open_clip)
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}


def lookup(variant):
    """Returns {"stages", "widths"} for a key of `VARIANTS`."""
    return dict(zip(("stages", "widths"), choose(VARIANTS, variant, "variant"), strict=True))


def _conv(width, side, dtype, name):
    """Returns a convolution of squares that do not overlap."""
    return nn.Conv(width, (side, side), (side, side), padding="VALID", dtype=dtype, name=name)


class Block(nn.Module):
    """x + scale * mlp(norm(depthwise 7x7(x))), after norm and 2x2 convolution if the block begins a stage.

    Attributes:
      width: output channels.
      first: whether the block begins a stage (not the first one): half the sides, and `width` channels.
      layer_scale: initial value of the learned scale; None for no scale.
      drop_path: rate of leaving out the branch, for each example alone (Huang et al. 2016).
      norm_eps: epsilon of the norms.
      dtype: compute dtype.
    """

    width: int
    first: bool
    layer_scale: float | None
    drop_path: float
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x, train):
        """[B, H, W, C] -> [B, H, W, width]."""
        norm = lambda name: Norm(eps=self.norm_eps, dtype=self.dtype, name=name)
        if self.first:
            x = _conv(self.width, 2, self.dtype, "shrink")(norm("shrink_norm")(x))
        y = nn.Conv(
            self.width, (7, 7), padding="SAME", feature_group_count=self.width, conv_general_dilated=depthwise,
            dtype=self.dtype, name="depthwise",
        )(x)  # fmt: skip
        y = Mlp(4 * self.width, "gelu", dtype=self.dtype, name="mlp")(norm("norm")(y))
        if self.layer_scale is not None:
            init = nn.initializers.constant(self.layer_scale)
            y = y * self.param("layer_scale", init, (self.width,)).astype(y.dtype)
        if self.drop_path and train:
            keep = 1.0 - self.drop_path
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, (len(y), 1, 1, 1))
            y = jnp.where(kept, y / keep, 0).astype(y.dtype)
        return x + y


class ConvNeXt(nn.Module):
    """Stem of 4x4 patches -> blocks in stages -> mean -> norm -> head.

    Attributes:
      stages: number of blocks of each stage.
      widths: channels of each stage.
      image_size: (height, width) in pixels or one int; other sizes raise. None accepts every size.
      layer_scale: initial value of a learned scale of each block; None for no scale.
      drop_path: rate of the last block; rates grow linearly from 0 at the first block.
      norm_eps: epsilon of the norms.
      pool: "gap" (the mean over the grid), "max" or "none".
      rep_dim: width of rep_activation(dense(pooled)) before the head; None for no such layer.
      rep_activation: a key of `layers.ACTIVATIONS`.
      out_dim: width of the head; None for no head.
      head_bias: whether the head has a bias.
      dtype: compute dtype.
    """

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    image_size: int | tuple[int, int] | None = None
    layer_scale: float | None = 1e-6
    drop_path: float = 0.0
    norm_eps: float = 1e-6
    pool: str = "gap"
    rep_dim: int | None = None
    rep_activation: str = "gelu"
    out_dim: int | None = None
    head_bias: bool = True
    dtype: str = "float32"
    stride: ClassVar = 32  # pixels of a token's side

    @nn.compact
    def __call__(self, images, *, layers=(), train=False):
        """Encodes images.

        Args:
          images: floating [B, H, W, 3], already normalised.
          layers: numbers of blocks whose outputs are returned, from 0; negative ones count from the end.
          train: whether drop path is active (it draws from the rng `dropout`).

        Returns:
          `Encoded`: pooled [B, D] or [B, out_dim] (None for pool "none"), tokens [B, h * w, D] before the pool.
        """
        check_images(images, self.image_size)
        if self.pool not in ("gap", "max", "none") or (self.pool == "none" and (self.out_dim or self.rep_dim)):
            raise UserError(f"pool is `{self.pool}`; a ConvNeXt has `gap`, `max`, or `none` without head")
        if len(self.stages) != len(self.widths):
            raise UserError(f"a ConvNeXt has stages {self.stages} and widths {self.widths}; expected one width a stage")
        norm = lambda name: Norm(eps=self.norm_eps, dtype=self.dtype, name=name)
        x = norm("stem_norm")(_conv(self.widths[0], 4, self.dtype, "stem")(images.astype(self.dtype)))
        outputs, depth = [], sum(self.stages)
        for stage, (count, width) in enumerate(zip(self.stages, self.widths, strict=True)):
            for i in range(count):
                number = len(outputs)
                rate = self.drop_path * number / max(depth - 1, 1)
                fields = (width, bool(stage) and not i, self.layer_scale, rate, self.norm_eps, self.dtype)
                x = Block(*fields, name=f"blocks_{number}")(x, train)
                outputs.append(x)
        tokens_of = lambda x: x.reshape(len(x), -1, x.shape[-1])
        tokens, aux = tokens_of(x), {"layers": tuple(tokens_of(outputs[i]) for i in layers)} if layers else {}
        if self.pool == "none":
            return Encoded(None, tokens, None, aux)
        x = norm("norm")(pool(self.pool, tokens))
        if self.rep_dim:
            act = choose(ACTIVATIONS, self.rep_activation, "rep_activation")
            x = act(nn.Dense(self.rep_dim, dtype=self.dtype, name="rep")(x))
        if self.out_dim:
            x = nn.Dense(self.out_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(x)
        return Encoded(x, tokens, None, aux)
