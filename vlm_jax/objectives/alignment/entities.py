"""Entities of regions: a fused model predicts which names a prompter gives to a random part of the picture."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.data import class_lists, ops
from vlm_jax.errors import UserError
from vlm_jax.models.block import AttentionInputs, over_heads
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.outputs import fold
from vlm_jax.objectives.term import WHERE, Context, Term

ASPECT = 0.3  # of a region, to 1 / 0.3, as in the authors' code


class Regions(Encoder, kw_only=True):
    """Blocks on a text's tokens and a picture's patches in one sequence; logits of a region's mean. See `Encoder`.

    Attributes:
      entities: number of logits.
    """

    entities: int

    @nn.compact
    def __call__(self, text_tokens, patches, mask, region):
        """[B, L, Dt], [B, N, Di], bool [B, L], bool [B, N] -> [B, entities]."""
        dense = lambda name, x, width=self.width: nn.Dense(width, dtype=self.dtype, name=name)(x)
        x = jnp.concatenate([dense("text", text_tokens), dense("image", patches)], axis=1)
        seen = jnp.concatenate([mask, jnp.ones(region.shape, bool)], axis=1)
        x = self.stack(x, AttentionInputs(over_heads(seen))).tokens[:, mask.shape[1] :]
        mean = jnp.sum(x * region[..., None], axis=1) / jnp.sum(region, axis=1, keepdims=True)
        return dense("fc2", nn.relu(dense("fc1", mean, 2 * self.width)), self.entities)


@method(
    family="terms",
    system="ALPRO",
    paper="arXiv:2112.09583",
    differs="a fused model predicts a region's names, as softly as a prompter sees them in the region alone",
    needs={
        "objective.teachers": {"prompter": {"decay": 1.0}},
        "objective.entities": [[3, 4, 0], [5, 6, 0], [7, 0, 0]],
        "objective.fusion": {"width": 16, "heads": 2},
    },
)
def entities(
    *,
    model: Any,
    entities: str | Sequence[str] | Sequence[Sequence[int]],
    teacher: str = "prompter",
    templates: str | Sequence[str] = "{}",
    tokenize: str = "tokenize(16)",
    fusion: Mapping[str, Any] | None = None,
    area: Sequence[float] = (0.3, 0.5),
    least: float = 0.2,
    pad_id: int | None = None,
) -> Term:
    """Prompting entity modelling (ALPRO, Li et al. 2022): -mean_i sum_m q_im log p_im, beside `contrastive`.

        q_i = softmax_m(scale <v(region i), t_m>) of the teacher,   p_i = softmax(head(mean fused patch in region i))

    v is the teacher's embedding of the picture whose pixels outside of the region are 0, t_m its mean embedding of the
    prompts of name m. Pictures whose largest q is below `least` are left out. The region is drawn for each row and
    step, from all boxes of whole patches of a share of the picture within `area`. The teacher reads the prompts in each
    step, with the run's tokenizer; no gradient flows to it.

    Args:
      model: linen module with two towers and the output `patch_tokens`, a square grid.
      entities: a list of classes, see `class_lists.read`, such as "emoji:seen" or a .txt file; or token ids [M, L].
      teacher: name of the prompter: a checkpoint trained by contrast, `spec=...`, or an average of the model.
      templates: prompts with `{}` for the name, see `class_lists.read_templates`.
      tokenize: ops from a prompt to the teacher's token ids.
      fusion: fields of `Regions`, such as dict(width=128, depth=2, heads=4); its parameters belong to the term.
      area: smallest and largest share of a region.
      least: smallest of the largest q that counts.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `kept`, the share of pictures that count; of these `accuracy`, the share whose likeliest name is q's.
    """
    if not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"{WHERE}: area is {tuple(area)}; expected two shares of a picture, the smaller one first")
    if not 0 <= least <= 1:
        raise UserError(f"{WHERE}: least is {least}; expected a probability, 0 to 1")
    ids = not isinstance(entities, str) and np.ndim(entities[0]) == 1
    names = entities if ids else tuple(class_lists.read(entities).values())
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", **(fusion or {})}
    fused = config.call(Regions, given, f"{WHERE}.fusion", entities=len(names))

    def features(outputs, ctx):
        patches, taught = outputs["patch_tokens"], outputs.teacher(teacher)
        if outputs["image_mask"] is not None or math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
            raise UserError(f"{WHERE}: entities takes pictures of one size in a square grid of patches")
        region = _regions(outputs.keys, len(patches), math.isqrt(patches.shape[1]), area)
        mask = is_text(outputs["token_ids"], *ctx.special(pad_id))
        logits = outputs.part("fusion", fused, outputs["text_tokens"], patches, mask, region)
        return {"logits": logits, "crop": taught.apply("__call__", _alone(taught.rows["image"], region), None).image}

    def loss(outputs, features, rows, ctx):
        taught = outputs.teacher(teacher)
        prompts = jnp.asarray(names)[None] if ids else _prompts(names, templates, tokenize, ctx)
        embedded = taught.on(token_ids=prompts.reshape(-1, prompts.shape[-1]))["text_embedding"]
        embedded = jnp.mean(embedded.reshape(*prompts.shape[:2], -1), axis=0)
        scores = jnp.matmul(features["crop"], embedded.T, precision=jax.lax.Precision.HIGHEST)
        q = jax.nn.softmax(taught["scale"] * scores)
        counts = jnp.max(q, axis=1) >= least
        mean = lambda x: jnp.sum(jnp.where(counts, x, 0)) / jnp.maximum(jnp.sum(counts), 1)
        logits = features["logits"].astype(q.dtype)
        right = jnp.argmax(logits, axis=1) == jnp.argmax(q, axis=1)
        value = -mean(jnp.sum(q * jax.nn.log_softmax(logits), axis=1))
        return value, {"kept": jnp.mean(counts), "accuracy": mean(right)}

    return Term("entities", features, loss)


def _prompts(names: Sequence[str], templates: str | Sequence[str], tokenize: str, ctx: Context) -> jax.Array:
    """Returns token ids, int [T, M, L], of all names in all templates."""
    if ctx.tokenizer is None:
        raise UserError(f"{WHERE}: entities are names, and the run has no tokenizer; set config.tokenizer")
    run = ops.parse(tokenize, ctx.tokenizer)
    made = lambda template, name: run({"text": template.format(name)}, np.random.default_rng(0))["token_ids"]
    return jnp.asarray([[made(one, name) for name in names] for one in class_lists.read_templates(templates)])


def _regions(keys: jax.Array | None, rows: int, side: int, area: Sequence[float]) -> jax.Array:
    """Returns one box of whole patches a row, bool [B, side^2], drawn by its key from all that fit."""
    boxes = [
        (top, left, top + h, left + w)
        for h in range(1, side + 1)
        for w in range(1, side + 1)
        if area[0] <= h * w / side**2 <= area[1] and ASPECT <= h / w <= 1 / ASPECT
        for top in range(side - h + 1)
        for left in range(side - w + 1)
    ]
    if not boxes:
        raise UserError(f"{WHERE}: no box of {side} x {side} patches has an area of {area[0]:g} to {area[1]:g}")
    keys = jax.random.split(jax.random.key(0), rows) if keys is None else keys
    chosen = jax.vmap(lambda key: jax.random.randint(fold(key, "region"), (), 0, len(boxes)))(keys)
    top, left, bottom, right = (x[:, None] for x in jnp.asarray(boxes)[chosen].T)
    y, x = jnp.divmod(jnp.arange(side**2), side)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


def _alone(images: jax.Array, region: jax.Array) -> jax.Array:
    """Returns pictures [B, H, W, 3] with 0 outside of the region, bool [B, side^2]."""
    side, (height, width) = math.isqrt(region.shape[1]), images.shape[1:3]
    at = lambda size: jnp.arange(size) * side // size
    inside = region.reshape(-1, side, side)[:, at(height)][:, :, at(width)]
    return jnp.where(inside[..., None], images, 0)
