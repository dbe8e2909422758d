"""A captioner whose decoder also predicts the picture, patch by patch (Fini et al. 2024, AIMv2)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.prefix_captioner import PrefixCaptioner


def _patches(o):
    """Returns I, the number of patches of a picture."""
    if isinstance(o["image"], Mapping):
        raise UserError("a next_patch_captioner predicts patches of pictures of one size; packed patches have several")
    return math.prod(side // o.model.image.patch for side in o["image"].shape[1:3])


def _prefix(o):
    """Returns M [B], the patches that all patches see: drawn from 1 to I - 1; without training, I // 2."""
    count = _patches(o)
    if not o.train:
        return jnp.full(len(o["image"]), count // 2)
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 2), (), 1, count))(o.keys)


def _sequence(o):
    """Returns the hidden states of picture and text [B, N + L, D]."""
    (context, mask), inputs = o["context"], shift_right(o["token_ids"], o.model.decoder.start_id)
    return o.apply("decode", inputs, context, context_mask=mask, whole=True).hidden


def _next_patch(o):
    """Returns (predictions of patches 2 to I [B, I - 1, 3 patch^2], bool [B, I - 1]: whether a patch follows M)."""
    count, end = _patches(o), o["context"][0].shape[1]  # a cls token may come first
    predicted = o.apply("pixels", o["sequence"][:, end - count : end - 1])
    return predicted, jnp.arange(1, count) >= o["prefix"][:, None]


class NextPatchCaptioner(PrefixCaptioner, kw_only=True):
    """A `PrefixCaptioner` whose decoder predicts each next patch of the picture, and then the text.

    "Multimodal Autoregressive Pre-training of Large Vision Encoders" (arXiv:2411.14402), sections 2.1 and 2.2. For
    losses the tower has prefix attention: M ~ U{1, ..., I - 1} patches, drawn for each picture, see each other; every
    later patch sees those up to itself. Captions, likelihoods and features see the whole picture. Pictures of one batch
    have one size.
    """

    outputs: ClassVar = PrefixCaptioner.outputs | {
        "prefix": _prefix,
        "seen": lambda o: o.apply("see", o["image"], prefix=o["prefix"]),
        "sequence": _sequence,
        "next_token": lambda o: (o["sequence"][:, o["context"][0].shape[1] :], o["token_ids"]),
        "next_patch": _next_patch,
    }

    def setup(self):
        super().setup()
        self.patch_head = nn.Dense(3 * self.image.patch**2, dtype=self.decoder.dtype)

    def __call__(self, inputs, target_ids, *, train=False):
        """As in `Conditional`."""
        logits = super().__call__(inputs, target_ids, train=train)
        if self.is_initializing():
            self.pixels(jnp.zeros((1, 1, self.decoder.width)))
        return logits

    def see(self, images, *, prefix=None, train=False):
        """Images -> (tokens of the tower [B, N, D], None); prefix: integers [B], see `ViT`."""
        encoded = self.image(images, prefix=prefix, train=train)
        return encoded.tokens, encoded.mask

    def pixels(self, hidden):
        """Hidden states [B, l, D] of patches -> the next patches, normalised, fp32 [B, l, 3 patch^2]."""
        return self.patch_head(hidden).astype(jnp.promote_types(hidden.dtype, jnp.float32))
