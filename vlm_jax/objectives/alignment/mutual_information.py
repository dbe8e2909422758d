"""One loss for views, texts and classes: each is predicted from a picture that is mixed of two."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.subset import take
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.alignment.masked_tokens import check_grid, decoder_of, parts, token_contrast, tokens_of
from vlm_jax.objectives.contrastive.targets import column
from vlm_jax.objectives.term import WHERE, Objective, Row, Selection, Term

WEIGHTS = {"same_view": 1.0, "other_view": 1.0, "text": 1.0, "category": 1.0}


@method(
    family="terms",
    system="M3I",
    paper="arXiv:2211.09807",
    differs="in one stage, a picture mixed of two predicts views, texts and classes of both",
    needs={
        "objective.teachers": {"average": {"decay": 0.99}},
        "objective.view": "global",
        "objective.classes": 8,
        "objective.decoder": {"width": 16, "heads": 2},
    },
)
def mutual_information(
    *,
    model: Any,
    classes: int | None = None,
    key: str = "concept",
    teacher: str = "average",
    view: str = "view",
    share: float = 0.5,
    temperature: float = 0.1,
    decoder: Mapping[str, Any] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Objective:
    """Sum over targets z of -log P(z | what a mixed picture predicts of it) (M3I pre-training, Su et al. 2023).

        P(z | p) = exp(cos(p, z) / temperature) / sum over candidates z' of exp(cos(p, z') / temperature)

    The expectation of log P is the part of the mutual information of input and target that depends on the prediction.
    Row i is the picture i, of which `share` of the patches are those of another picture j. From the tokens of its own
    patches, picture i predicts (`same_view`) each of its patches that is hidden, by a decoder; picture j predicts from
    its own (`other_view`) another view of itself. Both predict their (`text`) and their (`category`). Targets and their
    candidates: tokens and pooled outputs of the teacher on pictures i and on `view`, of all rows; the model's
    embeddings of all texts; rows of a linear classifier, without the temperature. j is drawn anew in each step.

    Args:
      model: linen module with the outputs `patch_tokens`, `image_pooled`, `text_embedding`.
      classes: number of categories; None for no labels.
      key: the category, a key of the batch, integers [B]; rows below 0 have none.
      teacher: name of the teacher, an average of the run's parameters.
      view: key of the batch with another view of each picture, as large as the picture: the op `view` makes it.
      share: of the patches that are another picture's, rounded to whole patches.
      temperature: divides cosines.
      decoder: fields of `TokenDecoder`.
      weights: {part: weight} of the four parts above; a part of weight 0 is left out.

    Metrics: each part's loss, the mean over rows; of `text` and `category` of both pictures.
    """
    weights = {**WEIGHTS, **(weights or {})} | ({} if classes else {"category": 0.0})
    for name, weight in weights.items():
        if name not in WEIGHTS or weight < 0:
            raise UserError(f"{WHERE}.weights has {name}={weight}; expected numbers >= 0 for: {', '.join(WEIGHTS)}")
    used = [name for name, weight in weights.items() if weight]
    if not used:
        raise UserError(f"{WHERE}.weights are all 0; at least one part has to count")
    scale = 1 / temperature

    def select(features, rows, ctx):
        i = jnp.arange(len(features["rows"]))
        shift = jax.random.randint(ctx.rng, (), 1, max(len(i), 2))
        kept = {name: Row(name, i) for name in rows}
        return kept | {"other": Row("image", (i + shift) % len(i)), "partner": (i + shift) % len(i)}

    def features(outputs, ctx):
        taught = outputs.teacher(teacher)
        clean = tokens_of(taught, "patch_tokens")
        hidden, kept = parts(outputs.keys, *clean.shape[:2], share)
        picture, other = outputs["image"], outputs["other"]
        check_grid(outputs.model, picture, clean.shape[1])
        mixed = jnp.where(_pixels(hidden, clean.shape[1], picture.shape[1:3]), other, picture)
        tokens = outputs.on(**outputs.rows | {"image": mixed})["patch_tokens"]
        own = {"one": take(tokens, kept), "two": take(tokens, hidden)}
        pooled = {name: jnp.mean(x, axis=1) for name, x in own.items()}
        dense = lambda name, x, width: outputs.part(name, nn.Dense(width, dtype=x.dtype), x)
        found = {}
        if "same_view" in used:
            made = outputs.part("decoder", decoder_of(decoder, clean.shape[-1]), own["one"], kept, clean.shape[1])
            found["same_view"] = {"own": unit(take(made, hidden)), "clean": unit(clean), "places": hidden}
        if "other_view" in used:
            if view not in outputs.rows or outputs[view].shape != picture.shape:
                raise UserError(f"{WHERE}.view is `{view}`; expected a picture {list(picture.shape)}: op `view`")
            target = taught.on(**taught.rows | {"image": outputs[view]})["image_pooled"]
            made = dense("other_view", pooled["two"], target.shape[-1])
            found["other_view"] = {"made": unit(made), "target": unit(target)}
        if "text" in used:
            text = outputs["text_embedding"]
            made = {name: unit(dense("text", x, text.shape[-1])) for name, x in pooled.items()}
            found["text"] = made | {"target": text}
        if "category" in used:
            found["category"] = {name: dense("category", x, classes) for name, x in pooled.items()}
        return found

    def loss(outputs, features, rows, ctx):
        own, partner = jnp.arange(len(rows["partner"])), rows["partner"]
        metrics = {}
        if "same_view" in used:
            metrics["same_view"] = token_contrast(scale, **features["same_view"])[0]
        if "other_view" in used:
            found = features["other_view"]
            metrics["other_view"] = jnp.mean(_surprise(scale * found["made"] @ found["target"].T, partner))
        if "text" in used:
            found = features["text"]
            both = (found["one"], own), (found["two"], partner)
            metrics["text"] = sum(jnp.mean(_surprise(scale * made @ found["target"].T, at)) for made, at in both)
        if "category" in used:
            labels = column(rows, key, len(own), f"{WHERE}.key")
            both = (features["category"]["one"], labels), (features["category"]["two"], labels[partner])
            metrics["category"] = sum(_labelled(logits, of) for logits, of in both)
        return sum(weights[name] * value for name, value in metrics.items()), metrics

    mixed = Selection("mixed", lambda outputs, ctx: {"rows": jnp.zeros(len(outputs["image"]))}, select)
    return Objective((Term("mutual_information", features, loss, on=mixed.name),), (mixed,))


def _surprise(logits: jax.Array, at: jax.Array) -> jax.Array:
    """Returns -log of the probability [B] of one candidate each, of logits [B, M] and integers [B]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), at[:, None], axis=1)[:, 0]


def _labelled(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean over rows that have a label."""
    losses = jnp.where(labels < logits.shape[1], _surprise(logits, jnp.clip(labels, 0, logits.shape[1] - 1)), jnp.nan)
    known = labels >= 0
    return jnp.sum(jnp.where(known, losses, 0)) / jnp.maximum(jnp.sum(known), 1)


def _pixels(patches: jax.Array, length: int, size: tuple[int, int]) -> jax.Array:
    """Returns bool [B, H, W, 1], the pixels of some patches, integers [B, M] below N."""
    height, width = size
    rows = round((length * height / width) ** 0.5)
    if length % rows or height % rows or width % (length // rows):
        raise UserError(
            f"{WHERE}: {length} patches do not divide pictures of {height} x {width}; resize to whole patches"
        )
    chosen = jnp.any(patches[..., None] == jnp.arange(length), axis=1).reshape(len(patches), rows, length // rows)
    return jnp.repeat(jnp.repeat(chosen, height // rows, 1), width * rows // length, 2)[..., None]
