"""The image tower: a Vision Transformer (Dosovitskiy et al. 2020)."""

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.layers import Dense
from vlm_jax.models.transformer import Encoder


def patchify(images, patch):
    """Cuts images [B, H, W, C] into patches [B, h, w, patch * patch * C]; rows and columns left over are dropped."""
    h, w = images.shape[1] // patch, images.shape[2] // patch
    images = images[:, : h * patch, : w * patch]
    images = images.reshape(images.shape[0], h, patch, w, patch, images.shape[-1])
    return images.swapaxes(2, 3).reshape(images.shape[0], h, w, -1)


class ViT(Encoder, kw_only=True):
    """Patches -> blocks -> pool -> head.

    Attributes:
      patch: side of a patch in pixels.
      image_size: (height, width) in pixels or one int, checked; None takes whatever the parameters are made for.
      pool: "gap" (the mean of all tokens, cls included), "map", "tok", "concat", "max" or "none".
      posemb: "learned", "sincos2d" or "none".
      cls: whether a cls token comes first; None: exactly where pool is "tok".
      cls_position: whether the learned positions have a row for it, the first (OpenAI's CLIP).
      patch_bias: whether the patch projection has a bias.
      pre_norm: whether a norm follows the positions (OpenAI's CLIP).
      Others: see `Encoder`.
    """

    patch: int
    image_size: int | tuple[int, int] | None = None
    pool: str = "gap"
    posemb: str = "learned"
    cls: bool | None = None
    cls_position: bool = False
    patch_bias: bool = True
    pre_norm: bool = False

    @nn.compact
    def __call__(self, images, *, train=False):
        """Encodes images.

        Args:
          images: floating [B, H, W, 3], already normalised; H and W at least `patch`.
          train: whether dropout and drop path are active.

        Returns:
          `Encoded`.
        """
        self._check(images)
        x = patchify(images.astype(self.dtype), self.patch)
        _, h, w, _ = x.shape
        x = Dense(self.width, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(
            x.reshape(x.shape[0], h * w, -1)
        )
        has_cls = self.pool == "tok" if self.cls is None else self.cls
        covers_cls = has_cls and self.cls_position
        if self.posemb == "learned":
            table = self._table(h * w + covers_cls, (h, w))
        elif self.posemb == "sincos2d":
            table = positions.sincos2d(h, w, self.width)
        elif self.posemb == "none":
            table = jnp.zeros((1, h * w, self.width))
        else:
            raise UserError(f"posemb is `{self.posemb}`; expected one of: learned, sincos2d, none")
        table = table.astype(self.dtype)
        x = x + table[:, -h * w :]
        if has_cls:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
            cls = cls + table[:, :1] if covers_cls else cls
            x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)), x], axis=1)
        if self.pre_norm:
            x = self.new_norm("pre_norm")(x)
        x = self.encode(x, train=train)
        return self.summarise(x)

    def _table(self, length, grid):
        if self.has_variable("params", "pos_embed"):
            have = self.get_variable("params", "pos_embed").shape[1]
            if have != length:
                raise UserError(
                    f"images give a grid of {grid[0]} x {grid[1]} patches of {self.patch} px ({length} positions), the "
                    f"position table has {have}; resize the images, or the table with models.resample_posemb"
                )
        return positions.learned(self, length, self.width)

    def _check(self, images):
        size = self.image_size
        want = (size, size) if isinstance(size, int) else size
        asked = "[B, H, W, 3]" if want is None else f"[B, {want[0]}, {want[1]}, 3]"
        if images.ndim != 4 or images.shape[-1] != 3 or (want is not None and images.shape[1:3] != tuple(want)):
            raise UserError(
                f"images should be {asked}; got {list(images.shape)}: resize in the data ops or change image_size"
            )
        if min(images.shape[1:3]) < self.patch:
            raise UserError(f"images of {images.shape[1]} x {images.shape[2]} are smaller than a patch of {self.patch}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"images should be floating and normalised; got {images.dtype}: add normalize to the data ops"
            )
