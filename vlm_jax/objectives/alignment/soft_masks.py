"""Image-text matching of pictures whose regions fade: those that the model looks at for one word of the text."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.block import AttentionInputs, over_heads
from vlm_jax.models.layers import Norm
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.selections import hard_pairs
from vlm_jax.objectives.term import WHERE, Objective, Term


class FusionWithMap(Encoder, kw_only=True):
    """Words attend to a picture's tokens, in the open, and then pass blocks as in `matching.Fusion`. See `Encoder`."""

    @nn.compact
    def __call__(self, text_tokens, image_tokens, mask, more=0.0, image_mask=None):
        """[B, L, Dt], [B, N, Di], bool [B, L] -> logits [B, 2], attention [B, H, L, N], to which `more` is added.

        `image_mask`: bool [B, N], False for padding; or None.
        """
        dense = lambda name, x: nn.Dense(self.width, dtype=self.dtype, name=name)(x)
        split = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
        x = dense("inputs", text_tokens)
        query, key, value = (
            split(dense("query", x)),
            split(dense("key", image_tokens)),
            split(dense("value", image_tokens)),
        )
        scores = jnp.einsum("blhd,bnhd->bhln", query, key) / query.shape[-1] ** 0.5
        attention = jax.nn.softmax(scores, where=over_heads(image_mask))
        seen = jnp.einsum("bhln,bnhd->blhd", attention + more, value)
        x = Norm(dtype=self.dtype, name="seen_norm")(x + dense("out", seen.reshape(x.shape)))
        x = self.stack(x, AttentionInputs(over_heads(mask), image_tokens, over_heads(image_mask))).tokens
        return nn.Dense(2, dtype=self.dtype, name="head")(x[:, 0]), attention


@method(
    family="terms",
    system="TextDriven-SoftMask",
    paper="arXiv:2304.00719",
    differs="true pairs match even when the regions of one word fade",
)
def soft_masks(
    *,
    model: Any,
    fusion: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    masked: float = 1.0,
    targets: str | Mapping[str, Any] = "identity",
    groups: int = 1,
    pad_id: int | None = None,
) -> Objective:
    """Image-text matching, and matching of softly masked pictures (Park and Han 2023); beside `focal` as a penalty.

        a = attention of word w to patches,  g = gradient of the true pair's matching score by a
        m = Grad-CAM, mean over heads of a max(0, g), scaled to 0 to 1;  masked picture: (1 - strength m_k) v_k

    The word w is drawn for each row and step. No gradient flows to the mask. With strength 0, the masked pictures are
    the pictures.

    Args:
      model: linen module with the outputs that `hard_pairs` reads.
      fusion: fields of `FusionWithMap`, such as dict(width=128, depth=2, heads=4); its parameters belong to the term.
      strength: how much the most important region fades, 0 to 1.
      masked: weight of the masked pictures' loss.
      targets, groups: see `hard_pairs`.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`, of the mined pairs; `masked`, the loss of masked pictures, and `masked_accuracy`.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"{WHERE}: strength is {strength}; expected 0 to 1")
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", "cross": "after", **(fusion or {})}
    fusion = config.call(FusionWithMap, given, f"{WHERE}.fusion")
    inputs = lambda outputs, ctx: (
        outputs["text_tokens"], outputs["image_tokens"], is_text(outputs["token_ids"], *ctx.special(pad_id)),
    )  # fmt: skip

    def of_pairs(outputs, ctx):
        real = outputs.rows.get("image_mask")
        return outputs.part("fusion", fusion, *inputs(outputs, ctx), image_mask=real)[0]

    def of_masked(outputs, ctx):
        (text, image, mask), real = inputs(outputs, ctx), outputs["image_mask"]
        run = lambda image, more=0.0: outputs.part("fusion", fusion, text, image, mask, more, image_mask=real)

        def score(more):
            logits, attention = run(image, more)
            return jnp.sum(logits[:, 1]), attention  # rows do not depend on each other

        nothing = jnp.zeros((len(image), fusion.heads, text.shape[1], image.shape[1]), image.dtype)
        gradient, attention = jax.grad(score, has_aux=True)(nothing)
        cams = jnp.mean(attention * jax.nn.relu(gradient), axis=1)  # [b, L, N]
        if outputs.keys is None:
            words = jnp.argmax(mask, axis=1)
        else:
            words = jax.vmap(jax.random.categorical)(outputs.keys, jnp.where(mask, 0.0, -jnp.inf))
        cam = jnp.take_along_axis(cams, words[:, None, None], axis=1)[:, 0]
        low = jnp.min(cam, axis=1, keepdims=True, where=real, initial=jnp.inf)
        high = jnp.max(cam, axis=1, keepdims=True)  # at least 0, as of padding
        fading = jax.lax.stop_gradient((cam - low) / jnp.maximum(high - low, 1e-12))
        return run(image * (1 - strength * fading[..., None]).astype(image.dtype))[0]

    def loss(outputs, features, rows, ctx):
        match = rows[pairs.name]["match"]
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels
        mined, faded = features[pairs.name], features["batch"]
        of_faded = jnp.mean(entropy(faded, jnp.ones(len(faded), jnp.int32)))
        accuracy = {
            "accuracy": jnp.mean(jnp.argmax(mined, -1) == match),
            "masked_accuracy": jnp.mean(jnp.argmax(faded, -1) == 1),
        }
        return jnp.mean(entropy(mined, match)) + masked * of_faded, accuracy | {"masked": of_faded}

    pairs = hard_pairs(model=model, targets=targets, groups=groups)
    return Objective((Term("soft_masks", {pairs.name: of_pairs, "batch": of_masked}, loss),), (pairs,))
