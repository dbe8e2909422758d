"""The ResNet with attention pooling of OpenAI's CLIP, an image tower (Radford et al. 2021, section 2.4)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.kernels import attention
from vlm_jax.models import positions
from vlm_jax.models.convolutions import ConvNorm, check_images
from vlm_jax.models.pooling import Encoded

VARIANTS = {  # blocks of each stage, width, heads of the pool, width of the embedding
    "RN50": ((3, 4, 6, 3), 64, 32, 1024),
    "RN101": ((3, 4, 23, 3), 64, 32, 512),
    "RN50x4": ((4, 6, 10, 6), 80, 40, 640),
    "RN50x16": ((6, 8, 18, 8), 96, 48, 768),
    "RN50x64": ((3, 15, 36, 10), 128, 64, 1024),
}
EXPANSION = 4  # outputs of a block, by its inner channels
EPS = 1e-5


def lookup(variant):
    """Returns {"stages", "width", "heads", "out_dim"} for a key of `VARIANTS`."""
    return dict(zip(("stages", "width", "heads", "out_dim"), choose(VARIANTS, variant, "variant"), strict=True))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and the sum with the input (He et al. 2016); an average pool takes the stride.

    Attributes:
      inner: channels of the first two convolutions.
      stride: of the average pools after the second convolution and before the shortcut's (Zhang 2019).
      shortcut: whether the input passes a convolution.
      dtype: dtype of the convolutions.
    """

    inner: int
    stride: int
    shortcut: bool
    dtype: str

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, H / stride, W / stride, 4 inner]."""
        layer = lambda features, kernel, name: ConvNorm(features, kernel, 1, self.dtype, kernel // 2, EPS, name=name)
        y = jax.nn.relu(layer(self.inner, 1, "conv1")(x))
        y = _mean_of(jax.nn.relu(layer(self.inner, 3, "conv2")(y)), self.stride)
        y = layer(EXPANSION * self.inner, 1, "conv3")(y)
        if self.shortcut:
            x = layer(EXPANSION * self.inner, 1, "shortcut")(_mean_of(x, self.stride))
        return jax.nn.relu(x + y)


def _mean_of(x, side):
    return nn.avg_pool(x, (side, side), (side, side)) if side > 1 else x


class AttentionPool(nn.Module):
    """Attention from the mean of the tokens to the mean and all tokens, with learned positions; no last matrix.

    Attributes:
      heads: attention heads.
      dtype: dtype of the matmuls.
    """

    heads: int
    dtype: str

    @nn.compact
    def __call__(self, tokens, table):
        """[B, N, D], positions [1, N + 1, D] -> [B, D]."""
        width = tokens.shape[-1]
        if width % self.heads:
            raise UserError(f"width {width} of the last stage does not divide into {self.heads} heads")
        mean = jnp.mean(tokens, axis=1, keepdims=True, dtype=jnp.promote_types(tokens.dtype, jnp.float32))
        tokens = jnp.concatenate([mean.astype(tokens.dtype), tokens], axis=1) + table.astype(tokens.dtype)
        split = lambda x: x.reshape(*x.shape[:2], self.heads, width // self.heads)
        project = lambda name, x: split(nn.Dense(width, dtype=self.dtype, name=name)(x))
        query, key, value = project("query", tokens[:, :1]), project("key", tokens), project("value", tokens)
        return attention(query, key, value).reshape(len(tokens), width)


class ResNet(nn.Module):
    """Stem of three convolutions -> bottlenecks in four stages -> attention pool -> head.

    Norms have stored statistics, see `FrozenBatchNorm`.

    Attributes:
      stages: number of blocks of each stage.
      width: channels of the stem; the last stage has 32 times as many.
      heads: of the attention pool.
      image_size: (height, width) in pixels or one int; other sizes raise. None accepts every size that fits the
        parameters.
      pool: "attention" or "none".
      out_dim: width of the head; None for no head.
      head_bias: whether the head has a bias.
      dtype: compute dtype.
    """

    stages: tuple[int, ...]
    width: int
    heads: int
    image_size: int | tuple[int, int] | None = None
    pool: str = "attention"
    out_dim: int | None = None
    head_bias: bool = True
    dtype: str = "float32"
    stride: ClassVar = 32  # pixels of a token's side
    cls_position: ClassVar = True  # the first row of positions is of the mean

    @nn.compact
    def __call__(self, images, *, layers=(), train=False):
        """Encodes images.

        Args:
          images: floating [B, H, W, 3], already normalised.
          layers: numbers of blocks whose outputs are returned, from 0; negative ones count from the end.
          train: unused; other towers have this argument.

        Returns:
          `Encoded`: pooled [B, D] or [B, out_dim] (None for pool "none"), tokens [B, h * w, D] before the pool.
        """
        check_images(images, self.image_size)
        if self.pool not in ("attention", "none") or (self.pool == "none" and self.out_dim):
            raise UserError(f"pool is `{self.pool}`; a ResNet has `attention`, or `none` without out_dim")
        x = images.astype(self.dtype)
        for i, (features, stride) in enumerate(((self.width // 2, 2), (self.width // 2, 1), (self.width, 1))):
            x = jax.nn.relu(ConvNorm(features, 3, stride, self.dtype, 1, EPS, name=f"stem_{i}")(x))
        x, outputs = _mean_of(x, 2), []
        for stage, count in enumerate(self.stages):
            for i in range(count):
                stride = 2 if stage and not i else 1
                block = Bottleneck(self.width * 2**stage, stride, not i, self.dtype, name=f"blocks_{len(outputs)}")
                x = block(x)
                outputs.append(x)
        tokens_of = lambda x: x.reshape(len(x), -1, x.shape[-1])
        tokens, aux = tokens_of(x), {"layers": tuple(tokens_of(outputs[i]) for i in layers)} if layers else {}
        if self.pool == "none":
            return Encoded(None, tokens, None, aux)
        if self.has_variable("params", "pos_embed"):
            have = self.get_variable("params", "pos_embed").shape[1]
            if have != tokens.shape[1] + 1:
                raise UserError(
                    f"images give {tokens.shape[1]} tokens, the position table has {have} rows, one of them for their "
                    "mean; resize the images, or load with image_size= and resample="
                )
        table = positions.learned(self, tokens.shape[1] + 1, tokens.shape[-1])
        pooled = AttentionPool(self.heads, self.dtype, name="attn_pool")(tokens, table)
        if self.out_dim:
            pooled = nn.Dense(self.out_dim, use_bias=self.head_bias, dtype=self.dtype, name="head")(pooled)
        return Encoded(pooled, tokens, None, aux)
