"""Two towers, one embedding space: CLIP (Radford et al. 2021), LiT (Zhai et al. 2022), SigLIP (Zhai et al. 2023)."""

import dataclasses
import math
from typing import Any, ClassVar

import flax
import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.fields import Part, shared
from vlm_jax.models.pooling import MapPool


@flax.struct.dataclass
class Embeddings:
    """The result of two towers; fields of an input None are None.

    Attributes:
      image: fp32 [B, D], unit norm; for a tower with pool "all" [B, N, D], zeros for padding.
      text: fp32 [B, D], unit norm; for a tower with pool "all" [B, L, D], zeros for padding.
      image_tokens: [B, N, D_image], before pool and head.
      text_tokens: [B, L, D_text], before pool and head.
      scale: fp32 scalar, the factor on cosines: exp(logit_scale); None for one tower alone.
      bias: fp32 scalar added to logits, None for models without one.
      image_pooled: [B, D], the image tower's output before it is normalised, compute dtype.
      image_mask: bool [B, N], False for tokens of padding; None without padding.
      image_parts, text_parts: what the model's space says besides, name -> [B, ...]; None without a space.
      text_pooled: [B, D], the text tower's output before it is normalised, compute dtype.
    """

    image: Any
    text: Any
    image_tokens: Any
    text_tokens: Any
    scale: Any
    bias: Any
    image_pooled: Any = None
    image_mask: Any = None
    image_parts: Any = None
    text_parts: Any = None
    text_pooled: Any = None


def unit(x, eps=1e-8):
    """Returns x / (|x| + eps) over the last axis, at least in fp32; value and gradient at zero are zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square == 0, 1.0, square))
    return x / (jnp.where(square == 0, 0.0, norm) + eps)


def _tokens_before(outputs):
    return getattr(getattr(outputs.model, "image", None), "tokens_before", 0)


def token_embeddings(model, params, embeddings, side="image"):
    """Returns each token of a tower in the space of both, unit norm [B, N, D]; of pictures zeros for padding.

    Each token passes alone through the layers after the blocks: the pool, if it is attention, and the head; of the pool
    "concat", the head's part for the token's place.

    Args:
      model: a model with the tower.
      params: its parameters.
      embeddings: `Embeddings` of pictures, or of texts.
      side: the tower, "image" or "text".

    Raises:
      UserError: the pool couples tokens, or the tower has other layers than these.
    """
    tower, tokens = getattr(model, side, None), getattr(embeddings, f"{side}_tokens")
    pool = getattr(tower, "pool", None)
    if pool == "all":
        return getattr(embeddings, side)
    apart = pool == "concat" and not tower.out_dim
    if pool in (None, "none") or apart or getattr(model, "space", None) is not None or _has_other_layers(tower):
        what, pools = (
            ("patches", "gap, patches, tok or map") if side == "image" else ("words", "mean, last, eos or map")
        )
        raise UserError(
            f"{what} in the space of both towers need an {side} tower that ends with a pool and a head; this one has "
            f"pool `{pool}`: set model.{side}.pool to {pools}, without space, shared, rep_dim, final_norm"
        )
    own = params[side]
    if pool == "map":
        sizes = dict(heads=tower.pool_heads or tower.heads, mlp_dim=tower.pool_mlp_dim or tower.mlp_dim)
        alone = tokens.reshape(-1, 1, tokens.shape[-1])
        mapped = MapPool(**shared(tower) | sizes, parent=None).apply({"params": own["map_pool"]}, alone)
        tokens = mapped.reshape(tokens.shape)
    if pool == "concat":
        length, width = tokens.shape[1:]
        kernel = own["head"]["kernel"].reshape(length, width, -1).astype(tokens.dtype)
        tokens = length * jnp.einsum("bld,ldo->blo", tokens, kernel) + own["head"].get("bias", 0)
    elif tower.out_dim:
        head = nn.Dense(tower.out_dim, use_bias=tower.head_bias, dtype=tower.dtype, parent=None)
        tokens = head.apply({"params": own["head"]}, tokens)
    mask = embeddings.image_mask if side == "image" else None
    return unit(tokens) if mask is None else jnp.where(mask[..., None], unit(tokens), 0)


def _has_other_layers(tower):
    return tower.rep_dim or tower.trunk is not None or getattr(tower, "final_norm", None) == "pooled"


def _effective(outputs):
    """The model's parameters: in an adaptation, those that the recipe makes of its own."""
    effective = getattr(outputs.model, "effective", None)
    return effective(outputs.params) if effective else outputs.params


EMBEDDINGS = {
    "of_image": lambda o: o.apply("__call__", o["image"], None),
    "of_text": lambda o: o.apply("__call__", None, o["token_ids"]),
    "of_both": lambda o: o.apply("__call__", None, None),
    "image_embedding": lambda o: o["of_image"].image,
    "image_pooled": lambda o: o["of_image"].image_pooled,
    "image_tokens": lambda o: o["of_image"].image_tokens,
    "image_mask": lambda o: o["of_image"].image_mask,
    "image_parts": lambda o: o["of_image"].image_parts,
    "token_embeddings": lambda o: token_embeddings(o.model, _effective(o), o["of_image"]),
    "class_embeddings": lambda o: o["token_embeddings"][:, : _tokens_before(o)],
    "patch_embeddings": lambda o: o["token_embeddings"][:, _tokens_before(o) :],
    "patch_tokens": lambda o: o["image_tokens"][:, _tokens_before(o) :],
    "text_embedding": lambda o: o["of_text"].text,
    "text_pooled": lambda o: o["of_text"].text_pooled,
    "text_tokens": lambda o: o["of_text"].text_tokens,
    "text_parts": lambda o: o["of_text"].text_parts,
    "word_embeddings": lambda o: token_embeddings(o.model, _effective(o), o["of_text"], "text"),
    "scale": lambda o: o["of_both"].scale,
    "bias": lambda o: o["of_both"].bias,
}
"""The outputs of a model whose call returns `Embeddings`: the fields, from the rows `image` and `token_ids`."""


class TwoTower(nn.Module):
    """An image tower and a text tower, with the scale and bias of their logits; or one tower alone.

    Attributes:
      trunk: a `Trunk` that is the attribute `trunk` of both towers as well, or None. It stands first: a module in
        several attributes has the name of the first.
      image: the image tower, or None.
      text: the text tower, or None.
      scale_init: initial factor on cosines (stored as its log, `logit_scale`).
      bias_init: initial `logit_bias`; None for a model without one (softmax losses do not need it).
      space: a part of the family "spaces", which makes embeddings of the towers' tokens; None: each tower's pool and
        head do.
    """

    trunk: nn.Module | None = dataclasses.field(default=None, kw_only=True)
    image: nn.Module | None
    text: nn.Module | None
    scale_init: float = 10.0
    bias_init: float | None = None
    space: Part | None = None
    can: ClassVar = frozenset({"embed"})

    outputs: ClassVar = EMBEDDINGS

    @nn.compact
    def __call__(self, images, token_ids, *, hidden=None, kept=None, train=False):
        """Embeds images and texts; either may be None.

        Args:
          images: inputs of the image tower, floating [B, H, W, 3], already normalised; or precomputed pooled outputs
            [B, D] of a locked tower; or None.
          token_ids: integers [B, L]; or the texts' embeddings, floating [B, D]; or None.
            hidden, kept: patches that are masked, and that are seen, see `ViT`; or None.
          train: whether dropout and drop path are active (they draw from the rng `dropout`).

        Returns:
          `Embeddings`.
        """
        for name, given in (("image", images), ("text", token_ids)):
            if given is not None and getattr(self, name) is None:
                raise UserError(f"the model has no {name} tower; it cannot embed {name}s")
        scale = bias = None
        if self.image is not None and self.text is not None:
            log_scale = self.param("logit_scale", nn.initializers.constant(math.log(self.scale_init)), ())
            scale = jnp.exp(log_scale)
        if self.bias_init is not None:
            bias = self.param("logit_bias", nn.initializers.constant(self.bias_init), ())
        image = text = image_tokens = text_tokens = image_pooled = text_pooled = image_mask = None
        if images is not None and getattr(images, "ndim", 4) == 2:
            if self.is_initializing():
                self.image(jnp.zeros((1, *_picture_size(self.image), 3)))
            image = unit(images)
        elif images is not None:
            given = {name: one for name, one in (("hidden", hidden), ("kept", kept)) if one is not None}
            encoded = of_image = self.image(images, train=train, **given)
            image, image_tokens = self._embedding("image", encoded), encoded.tokens
            image_pooled, image_mask = encoded.pooled, encoded.mask
        if jnp.issubdtype(getattr(token_ids, "dtype", int), jnp.floating):
            text = unit(token_ids)
        elif token_ids is not None:
            encoded = of_text = self.text(token_ids, train=train)
            text, text_tokens = self._embedding("text", encoded), encoded.tokens
            text_pooled = encoded.pooled
        image_parts = text_parts = None
        if self.space is not None:
            space = self.space(name="space")
            if image_tokens is not None:
                image, image_parts = space(of_image, "image", self._words())
            elif images is not None:
                raise UserError("config.model.space reads an image tower's tokens; precomputed embeddings have none")
            if text_tokens is not None:
                text, text_parts = space(of_text, "text", self._words())
        if image is not None and text is not None and image.ndim != text.ndim:
            raise UserError(
                'one tower has pool "all", a vector for every token, the other has one vector; give both "all"'
            )
        if image is not None and text is not None and image.shape[-1] != text.shape[-1]:
            raise UserError(
                f"image embeddings have {image.shape[-1]} dimensions, text embeddings {text.shape[-1]}; "
                "set out_dim of image and text to one number"
            )
        more = image_pooled, image_mask, image_parts, text_parts, text_pooled
        return Embeddings(image, text, image_tokens, text_tokens, scale, bias, *more)

    def _embedding(self, name, encoded):
        return None if self.space is not None else unit(_pooled(name, encoded))

    def _words(self):
        """Returns the token embeddings [V, D] of the text tower; at init, after the tower has been called."""
        own = {} if self.text is None else self.text.variables.get("params", {})
        return own.get("token_embed", {}).get("embedding")


def _picture_size(tower):
    """Returns (height, width) of pictures for initialising a tower."""
    size = getattr(tower, "image_size", None)
    if size is None and hasattr(tower, "patch"):
        raise UserError("on precomputed embeddings the image tower's positions need config.model.image.image_size")
    return (size, size) if isinstance(size, int) else size or (32, 32)


def _pooled(name, encoded):
    if encoded.pooled is None:
        raise UserError(f'the {name} tower has pool "none", but two towers compare one vector each; choose a pool')
    return encoded.pooled
