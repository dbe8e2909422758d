"""Tokens of a picture or text of which the model sees a part: they follow tokens that see the whole."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.models.block import AttentionInputs
from vlm_jax.models.subset import take
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import unit
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.alignment.self_distillation import masks
from vlm_jax.objectives.generative.masked_words import hide
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Term

_PACKED = f"{WHERE}: masked tokens are of pictures of one size; these are packed, with padding"


class TokenDecoder(Encoder, kw_only=True):
    """Blocks on seen tokens at their places and a mask token at all others; a prediction for every place.

    Attributes:
      out: width of the predictions.
      Others: see `Encoder`.
    """

    out: int = 1

    @nn.compact
    def __call__(self, tokens, places, length):
        """[B, n, D], integers [B, n], N -> [B, N, out]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="inputs")(tokens)
        token = self.param("mask", nn.initializers.normal(0.02), (self.width,)).astype(self.dtype)
        table = self.param("pos_embed", nn.initializers.normal(0.02), (1, length, self.width)).astype(self.dtype)
        seen = jnp.arange(length) == places[..., None]  # [B, n, N]: a product in the place of a scatter
        filled = jnp.einsum("bnl,bnd->bld", seen.astype(x.dtype), x, precision="highest")
        x = jnp.where(jnp.any(seen, axis=1)[..., None], filled, token) + table
        return nn.Dense(self.out, dtype=self.dtype, name="head")(self.stack(x, AttentionInputs()).tokens)


def decoder_of(fields: Mapping[str, Any] | None, width: int) -> TokenDecoder:
    """Returns a `TokenDecoder` of a config's fields, for predictions of a width."""
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", **(fields or {})}
    return config.call(TokenDecoder, given, f"{WHERE}.decoder", out=width)


def parts(keys: jax.Array | None, rows: int, length: int, share: float) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers of hidden patches [B, M] and of seen ones [B, N - M], in order, drawn by each row's key."""
    if not 0 < round(share * length) < length:
        raise UserError(f"{WHERE}.share is {share} of {length} tokens; expected that one is hidden, and one seen")
    where, hidden = masks(keys, rows, length, share)
    return hidden, jnp.argsort(where, axis=1, stable=True)[:, : length - hidden.shape[1]]


def seeing(outputs: Outputs, kept: jax.Array) -> Outputs:
    """Returns a view on the rows of which the image tower sees some patches; outputs of pictures are of these."""
    view = outputs.on(**outputs.rows)
    view.once("of_image", lambda o: o.apply("__call__", o["image"], None, kept=kept))
    return view


def tokens_of(outputs: Outputs, name: str) -> jax.Array:
    """Returns tokens [B, N, D] of pictures of one size."""
    if isinstance(outputs["image"], Mapping):
        raise UserError(_PACKED)
    return outputs[name]


def check_grid(model: Any, image: Any, length: int) -> None:
    """Raises a UserError if a model's pictures [B, H, W, 3] have another number of patches than a teacher's."""
    if isinstance(image, Mapping):
        raise UserError(_PACKED)
    patch = getattr(getattr(model, "image", None), "patch", None)
    own = patch and (image.shape[1] // patch) * (image.shape[2] // patch)
    if own and own != length:
        raise UserError(f"{WHERE}: the model has {own} patches, the teacher {length}; expected as many, see `inputs`")


@method(
    family="terms",
    system="UTA",
    paper="arXiv:2405.19009",
    differs="a tower that sees some patches, without mask tokens, follows a frozen teacher's tokens at their places",
    needs={"objective.teachers": {"teacher": {"decay": 1.0, "inputs": {"image": "global"}}}},
)
def unmasked_tokens(*, model: Any, teacher: str = "teacher", share: float = 0.5, of: str = "patch_embeddings") -> Term:
    """Mean over seen patches of 1 - cos(s_n, t_n) (unmasked token alignment, Liu et al. 2024).

    s_n is token n of the model, which sees 1 - `share` of the patches, drawn for each picture and step; t_n that of the
    teacher, which sees all. Of `patch_embeddings`, class tokens count as well if both have as many. Tokens of a CLIP in
    the space of both towers carry the model into that space: with the teacher's text tower, it classifies without
    having seen a text.

    Args:
      model: linen module whose call takes `kept` (see `ViT`), with as many patches as the teacher.
      teacher: name of the teacher, a checkpoint.
      share: of the patches that are hidden, rounded to whole patches.
      of: tokens that are compared: "patch_embeddings" or "patch_tokens"; of another width than the teacher's, they pass
        a linear map of the term's own.

    Metrics: `cosine`, the mean over seen patches.
    """
    config.choose({"patch_embeddings": 0, "patch_tokens": 0}, of, f"{WHERE}.of")

    def features(outputs, ctx):
        taught = outputs.teacher(teacher)
        want = tokens_of(taught, of)
        check_grid(outputs.model, outputs["image"], want.shape[1])
        kept = parts(outputs.keys, *want.shape[:2], share)[1]
        seen = seeing(outputs, kept)
        own, want = seen[of], take(want, kept)
        if of == "patch_embeddings":
            classes = seen["class_embeddings"], taught["class_embeddings"]
            if classes[0].shape == classes[1].shape:
                own, want = (jnp.concatenate(pair, axis=1) for pair in zip(classes, (own, want), strict=True))
        if own.shape[-1] != want.shape[-1]:
            own = outputs.part(of, nn.Dense(want.shape[-1], param_dtype=own.dtype), own)
        return jnp.mean(jnp.sum(unit(own, 1e-12) * unit(want, 1e-12), axis=-1), axis=1)

    def loss(outputs, cosines, rows, ctx):
        return 1 - jnp.mean(cosines), {"cosine": jnp.mean(cosines)}

    return Term("unmasked_tokens", features, loss)


@method(
    family="terms",
    system="ONE-PEACE",
    paper="arXiv:2305.11172",
    differs="each hidden unit is told from all units of the batch, as the model encodes them when nothing is hidden",
    needs={"objective.decoder": {"width": 16, "heads": 2}},
)
def denoising_contrast(
    *,
    model: Any,
    of: str = "image",
    share: float = 0.75,
    temperature: float = 0.4,
    decoder: Mapping[str, Any] | None = None,
    mask_id: int | None = None,
    pad_id: int | None = None,
) -> Term:
    """Intra-modal denoising contrast (ONE-PEACE, Wang et al. 2023), beside `contrastive`.

        -mean over hidden units n of log softmax over all units m of the batch of cos(p_n, z_m) / temperature, at m = n

    z are the tower's tokens of whole pictures, which `contrastive` has as well; no gradient flows to them. Of pictures,
    the tower sees the other patches alone, and p are predictions of a decoder that has mask tokens at the hidden
    places. Of texts, p are the tower's tokens where words are hidden as in `masked_words`, without a decoder. The
    published weights are 1 of pictures, 0.5 of texts. Towers that share their blocks: `model.shared`.

    Args:
      model: linen module whose call takes `kept` (see `ViT`); of texts, any with `text_tokens`.
      of: "image" or "text".
      share: of the units that are hidden; the published one of texts is 0.15.
      temperature: divides cosines.
      decoder: fields of `TokenDecoder`, such as dict(width=256, depth=2); of pictures.
      mask_id: of texts, see `masked_words`.
      pad_id: of texts, id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`, the share of hidden units that are nearer to their own than to all others.
    """
    config.choose({"image": 0, "text": 0}, of, f"{WHERE}.of")
    if of == "text" and not 0 < share <= 1:
        raise UserError(f"{WHERE}.share is {share}; expected a share of the tokens, above 0, up to 1")
    if (of == "text") != (mask_id is not None):
        raise UserError(f"{WHERE}: mask_id is {mask_id} with of=`{of}`; texts need the id of their mask, pictures none")

    def of_images(outputs, ctx):
        clean = tokens_of(outputs, "patch_tokens")
        hidden, kept = parts(outputs.keys, *clean.shape[:2], share)
        decode = decoder_of(decoder, clean.shape[-1])
        made = outputs.part("decoder", decode, seeing(outputs, kept)["patch_tokens"], kept, clean.shape[1])
        return {"own": take(made, hidden), "clean": clean, "places": hidden}

    def of_texts(outputs, ctx):
        ids = jnp.asarray(outputs["token_ids"])
        real = is_text(ids, *ctx.special(pad_id))
        size = getattr(getattr(model, "text", None), "vocab_size", None) or int(mask_id) + 1
        hidden, seen = hide(ids, real, outputs.keys, share, mask_id, size)
        own = outputs.on(token_ids=seen)["text_tokens"]
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return {"own": own, "clean": outputs["text_tokens"], "places": places, "hidden": hidden, "real": real}

    def features(outputs, ctx):
        found = (of_images if of == "image" else of_texts)(outputs, ctx)
        clean = jax.lax.stop_gradient(unit(found["clean"], 1e-12))
        return found | {"own": unit(found["own"], 1e-12), "clean": clean}

    def loss(outputs, features, rows, ctx):
        value, accuracy = token_contrast(1 / temperature, **features)
        return value, {"accuracy": accuracy}

    return Term("denoising_contrast", features, loss)


def token_contrast(
    scale: float,
    own: jax.Array,
    clean: jax.Array,
    places: jax.Array,
    hidden: jax.Array | None = None,
    real: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean over units of -log softmax over all units of scale x product, the share that are nearest).

    Memory is that of the tokens, see `kernels.contrastive`; the work is that of B M x B N products.

    Args:
      scale: the factor on products.
      own: [B, M, D], unit norm.
      clean: [B, N, D], unit norm.
      places: integers [B, M], which of the N units of its row is a unit's own.
      hidden: bool [B, M], the units that count; None for all.
      real: bool [B, N], False for padding; None for no padding.
    """
    rows, length = clean.shape[:2]
    flat = lambda x: None if x is None else x.reshape(-1, *x.shape[2:])
    labels = flat(places + length * jnp.arange(rows)[:, None]), jnp.arange(rows * length)
    given = dict(x_labels=labels[0], y_labels=labels[1], x_mask=flat(hidden), y_mask=flat(real))
    found, _ = kernel.statistics(flat(own), flat(clean), scale, **given, positives=True, best=True)
    counts = jnp.ones(own.shape[0] * own.shape[1], bool) if hidden is None else flat(hidden)
    mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / jnp.maximum(jnp.sum(counts), 1)
    return mean(found.lse - found.positive_sum), mean(found.best_positive > found.best_negative)
