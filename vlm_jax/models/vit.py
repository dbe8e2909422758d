"""The image tower: a Vision Transformer (Dosovitskiy et al. 2020)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.models.convolutions import ConvNorm
from vlm_jax.models.layers import Dense
from vlm_jax.models.pooling import Encoded
from vlm_jax.models.rotary import Rotary
from vlm_jax.models.subset import subset
from vlm_jax.models.transformer import Encoder


def patchify(images, patch):
    """Cuts images [B, H, W, C] into patches [B, h, w, patch * patch * C]; drops remaining rows and columns."""
    h, w = images.shape[1] // patch, images.shape[2] // patch
    images = images[:, : h * patch, : w * patch]
    images = images.reshape(images.shape[0], h, patch, w, patch, images.shape[-1])
    return images.swapaxes(2, 3).reshape(images.shape[0], h, w, -1)


class Tokens(NamedTuple):
    """Embedded tokens in the place of pictures: patches, texts that follow them, or both.

    Attributes:
      tokens: [B, L, D], with positions.
      Others: see `Encoder.run`.
    """

    tokens: Any
    mask: Any = None
    bidirectional: Any = None
    caches: Any = None
    position: Any = None


class ViT(Encoder, kw_only=True):
    """Patches -> blocks -> pool -> head.

    Attributes:
      patch: side of a patch in pixels.
      image_size: (height, width) in pixels or one int; other sizes raise. None accepts every size that fits the
        parameters. Packed patches need `image_size`: the position table is resampled from this size to each picture's.
      pool: "gap" (the mean of all tokens, cls included), "patches" (without cls and registers), "map", "tok", "concat",
        "max", "all", "none", or "second": with cls, the first register, a second cls token (TIPS: arXiv:2410.16512).
      posemb: "learned", "sincos2d" or "none".
      rotary: rotary positions of the patches besides `posemb`, or None. In configs: dict(...) of `rotary.Rotary`.
      cls: whether a cls token comes first; None: only if pool is "tok".
      cls_position: whether the first row of the learned positions is for the cls token (OpenAI's CLIP).
      registers: number of learned tokens after the cls token, if there is one, without position (Darcet et al. 2023).
      stem: channels of convolutions before the patch projection, each with norm and GELU (MobileCLIP-B; Xiao et al.
        2021, arXiv:2106.14881). The projection then covers 2 x 2 of their outputs, as does each after the first, which
        covers the rest of the patch. Norms have stored statistics, see `FrozenBatchNorm`. () for none.
      patch_bias: whether the patch projection has a bias.
      pre_norm: whether a norm follows the positions (OpenAI's CLIP).
      any_size: whether pictures may have other sizes than `image_size`, such as local crops: the learned positions are
        then resampled, bilinear and antialiased, as for packed patches.
      keep: share of each picture's patches that training sees, drawn anew for each picture and step (FLIP: Li et al.
        2022, arXiv:2212.00794); 1 keeps all. Evaluation sees all patches.
      final_norm: what the last norm is of: the "tokens"; the "pooled" vector (CLIPA); or "none".
      Others: see `Encoder`.
    """

    patch: int
    image_size: int | tuple[int, int] | None = None
    pool: str = "gap"
    posemb: str = "learned"
    rotary: Rotary | None = None
    cls: bool | None = None
    cls_position: bool = False
    registers: int = 0
    stem: tuple[int, ...] = ()
    patch_bias: bool = True
    pre_norm: bool = False
    any_size: bool = False
    keep: float = 1.0
    final_norm: str = "tokens"

    @nn.compact
    def __call__(
        self, images, *, hidden=None, kept=None, prefix=None, blocks=True, context=None, context_mask=None, layers=(),
        train=False,
    ):  # fmt: skip
        """Encodes images.

        Args:
          images: floating [B, H, W, 3], already normalised; H and W at least `patch`. Or packed patches of pictures of
            different sizes (NaFlex: Tschannen et al. 2025, section 2.4.2), dict(patches=floating
            [B, N, patch * patch * 3], grid=integers [B, 2]): row by row; the first grid.prod() patches count. Or
            `Tokens`: the result is then that of `Encoder.run`.
          hidden: (bool [B, N], floating [D]): patches whose embeddings become a mask token, and the token, to which
            positions are added (iBOT: arXiv:2111.07832). Or None.
          kept: integers [B, n], numbers of the patches that the blocks see, in order, as `subset` draws them; others
            are dropped, and `tokens` has these alone. None: all, or the share `keep`.
          prefix: integers [B], number of patches that all tokens see; others are visible from their own place on
            (AIMv2: arXiv:2411.14402, section 2.2). None: all tokens see all patches.
          blocks: False returns the embedded patches in the place of tokens, for `Tokens`.
          context, context_mask, layers: see `Encoder.encode`.
          train: whether dropout and drop path are active.

        Returns:
          `Encoded`.
        """
        if isinstance(images, Tokens):
            tokens, *others = images
            return self.run(tokens, train=train, **dict(zip(Tokens._fields[1:], others, strict=True)))
        has_cls = self.pool == "tok" if self.cls is None else self.cls
        covers_cls = has_cls and self.cls_position
        mask = rotation = None
        if isinstance(images, Mapping):
            x, table, mask = self._packed(images, has_cls)
        else:
            self._check(images)
            x = images.astype(self.dtype)
            x = self._through_stem(x) if self.stem else patchify(x, self.patch)
            _, h, w, _ = x.shape
            x = x.reshape(x.shape[0], h * w, -1)
            table = self._positions(h, w, covers_cls)
            if self.rotary is not None:
                rotation = self.rotary.rotation(h, w, self.head_dim or self.width // self.heads)
        if not self.stem:
            x = Dense(self.width, use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed")(x)
        if hidden is not None:
            x = self._hidden(x, *hidden, train)
        table = table.astype(self.dtype)
        x = x + table[:, -x.shape[1] :]
        if kept is not None or (train and self.keep != 1):
            kept, real = self._kept(x, mask, kept)
            pick = lambda rows: jnp.take_along_axis(jnp.broadcast_to(rows, (len(x), *rows.shape[-2:])), kept, axis=1)
            rotation = jax.tree.map(pick, rotation)
            x, mask = pick(x), real
        if has_cls:
            cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width)).astype(self.dtype)
            first = [cls + table[:, :1] if covers_cls else cls]
            if self.registers:
                shape = (1, self.registers, self.width)
                first.append(self.param("registers", nn.initializers.normal(0.02), shape).astype(self.dtype))
            x = jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], *t.shape[1:])) for t in first), x], axis=1)
        if self.pre_norm:
            x = self.new_norm("pre_norm")(x)
        if not blocks:
            if self.rotary is not None:
                raise UserError("patches and texts in one sequence have no rotary positions; leave out `rotary`")
            return Encoded(None, x, mask)
        if self.final_norm not in ("tokens", "pooled", "none"):
            raise UserError(f"final_norm is `{self.final_norm}`; expected one of: tokens, pooled, none")
        options = dict(context=context, context_mask=context_mask, rotation=rotation, layers=layers, train=train)
        seen = mask
        if prefix is not None:
            at = jnp.arange(x.shape[1])
            seen = (at <= at[:, None]) | (at < self.tokens_before + prefix[:, None, None])
            seen = seen if mask is None else seen & mask[:, None]
        x, _, aux = self.encode(x, mask=seen, norm=self.final_norm == "tokens", **options)
        pool_mask, pooled = mask, self.final_norm == "pooled"
        if self.pool == "patches" and has_cls:
            pool_mask = jnp.broadcast_to(jnp.arange(x.shape[1]) > self.registers, x.shape[:2])
        return self.summarise(x, mask=mask, pool_mask=pool_mask, norm=pooled).replace(aux=aux)

    def _through_stem(self, x):
        """[B, H, W, 3] -> embedded patches [B, h, w, D]."""
        first, rest = divmod(self.patch, 2 ** len(self.stem))
        if rest:
            raise UserError(f"a patch of {self.patch} px is no multiple of {2 ** len(self.stem)}, as its stem needs")
        for i, width in enumerate(self.stem):
            side = 2 if i else first
            x = jax.nn.gelu(ConvNorm(width, side, side, self.dtype, 0, 1e-5, name=f"stem_{i}")(x), approximate=False)
        options = dict(padding="VALID", use_bias=self.patch_bias, dtype=self.dtype)
        return nn.Conv(self.width, (2, 2), (2, 2), **options, name="patch_embed")(x)

    @property
    def tokens_before(self):
        """The number of tokens before the patches: the cls token and registers."""
        has_cls = self.pool == "tok" if self.cls is None else self.cls
        return 1 + self.registers if has_cls else 0

    def _hidden(self, x, where, token, train):
        if where.shape != x.shape[:2] or (train and self.keep != 1):
            raise UserError(
                f"hidden patches should be bool {list(x.shape[:2])} with keep 1.0; got {list(where.shape)} with "
                f"keep {self.keep}"
            )
        return jnp.where(where[..., None], token.astype(x.dtype), x)

    def _kept(self, x, mask, kept):
        """Returns the numbers [B, n, 1] of the patches [B, N, D] that are seen, in order, and their mask."""
        if kept is not None:
            if mask is not None or self.pool == "concat":
                raise UserError("kept patches are of pictures of one size, and of a pool other than `concat`")
            return kept[..., None], None
        if not 0 < self.keep < 1 or self.pool == "concat":
            raise UserError(
                f"keep is {self.keep} with pool `{self.pool}`; expected above 0, at most 1, and not `concat`"
            )
        kept, real = subset(jax.random.uniform(self.make_rng("dropout"), x.shape[:2]), self.keep, mask)
        return kept[..., None], real

    def _positions(self, h, w, covers_cls):
        if self.posemb == "learned":
            own = self._own_grid() if self.any_size else (h, w)
            table = self._table(own[0] * own[1] + covers_cls, own)
            if own == (h, w):
                return table
            rows = positions.resampled(table[0, covers_cls:], own, jnp.array([(h, w)]), h * w)
            return jnp.concatenate([table[:, :covers_cls], rows], axis=1)
        if self.posemb == "sincos2d":
            return positions.sincos2d(h, w, self.width, dtype=jnp.promote_types(self.dtype, jnp.float32))
        if self.posemb == "none":
            return jnp.zeros((1, h * w, self.width))
        raise UserError(f"posemb is `{self.posemb}`; expected one of: learned, sincos2d, none")

    def _packed(self, images, has_cls):
        """Returns patches [B, N, P], positions [B, N, D], mask bool [B, N]."""
        patches, grid = images["patches"], images["grid"]
        if patches.ndim != 3 or patches.shape[-1] != 3 * self.patch**2 or grid.shape != (patches.shape[0], 2):
            raise UserError(
                f"packed patches should be patches [B, N, {3 * self.patch**2}] and grid [B, 2]; got "
                f"{list(patches.shape)} and {list(grid.shape)}: pack_patches({self.patch}, ...) in the data ops"
            )
        if has_cls or self.posemb != "learned" or self.rotary is not None or self.stem or self.image_size is None:
            raise UserError("packed patches need posemb `learned` alone, an image_size, no stem and no cls token")
        if self.pool in ("last", "concat"):
            raise UserError(
                f"packed patches end with padding, which the pool `{self.pool}` would read; use another pool"
            )
        own = self._own_grid()
        table = positions.learned(self, own[0] * own[1], self.width)[0]
        mask = jnp.arange(patches.shape[1]) < jnp.prod(grid, axis=1)[:, None]
        return patches.astype(self.dtype), positions.resampled(table, own, grid, patches.shape[1]), mask

    def _own_grid(self):
        """Returns (rows, columns) of patches of a picture of `image_size`."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch, width // self.patch

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
        if self.any_size and self.image_size is None:
            raise UserError("any_size needs an image_size, the size of pictures whose positions are learned")
        size = None if self.any_size else self.image_size
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
