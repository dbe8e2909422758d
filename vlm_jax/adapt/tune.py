"""Few-shot tuning: trains a recipe's parameters on labelled pictures, by cross-entropy over class names.

    clip = vlm_jax.load("runs/clip")
    adapted = tune(clip, Inserted(LowRank(rank=4)), images, labels, names, learning_rate=1e-3)
    adapted.classify(pictures)

A recipe states the parameters that train and their effect on the model, see `vlm_jax.adapt.recipe`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from vlm_jax.adapt.heads.checks import check_labels
from vlm_jax.adapt.heads.training import shuffled
from vlm_jax.adapt.recipe import Recipe, tree
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.models import insertion
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained, class_embeddings


def tune(
    pretrained: Pretrained,
    recipe: Recipe,
    images: Any,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    templates: Sequence[str] = ("{}",),
    steps: int = 200,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    show: bool = False,
) -> Pretrained:
    """Trains a recipe's parameters and returns the adapted model, which names pictures by `names`.

    AdamW under a cosine schedule to 0, on the mean cross-entropy of softmax(scale * cosine) over all names (CoOp,
    arXiv:2109.01134, equation 3), whatever loss the towers were trained with. An unchanged tower embeds its inputs
    once. Pictures pass the model's preprocessing, without augmentation.

    Args:
      pretrained: a two-tower model.
      recipe: see `Recipe`.
      images: preprocessed, [N, H, W, 3], or a list as for `Pretrained.embed_images`.
      labels: int [N], in range(len(names)).
      names: of the classes.
      templates: prompts; exactly one if the recipe changes the text tower.
      steps, batch_size, learning_rate, weight_decay: of the optimizer.
      seed: of the initial parameters and of the order of examples.
      show: shows a progress bar.

    Raises:
      UserError: the recipe and the model do not fit, or the loss is not finite.
    """
    if steps < 1:
        raise UserError(f"steps of tuning is {steps}; expected 1 or more")
    images = pretrained._pictures(images) if isinstance(images, list) else images
    labels = check_labels(labels, len(images), len(names))
    place = _context_place(pretrained)
    modules = recipe.insertions(pretrained.model, place)
    adapted = with_room(pretrained, modules)
    prompts = [template.replace("{}", name) for template in templates[:1] for name in names]
    token_ids = adapted._token_ids(prompts)
    if len(np.unique(token_ids, axis=0)) < len(np.unique(pretrained._token_ids(prompts), axis=0)):
        raise UserError("with the context, some names are cut to the same tokens; a shorter context, or longer texts?")
    rng, order = jax.random.key(seed), shuffled(len(labels), batch_size, -(-steps * batch_size // len(labels)), seed)
    params = pretrained.params
    if modules:
        params = insertion.begin(rng, adapted.model, params, jnp.asarray(images[:1]), jnp.asarray(token_ids[:1]))
    leaves = named_leaves(params)
    own = recipe.begin(jax.random.fold_in(rng, 1), adapted.model, leaves)
    changed = recipe.combine(own, leaves).keys()
    if not changed:
        raise UserError(f"{recipe} trains nothing of this model; compare the recipe with the model's parameter names")
    texts = jnp.asarray(token_ids)
    if any(name.startswith("text/") for name in changed):
        if len(templates) != 1:
            raise UserError(f"{len(templates)} templates, but the recipe changes the text tower; give one")
    else:
        texts = jnp.asarray(class_embeddings(pretrained.embed_texts, names, templates))
    if not any(name.startswith("image/") for name in changed):
        images = pretrained.embed_image_batch(images)
    state, loss = _optimizer(steps, learning_rate, weight_decay).init(own), 0.0
    for rows in tqdm(order[:steps], desc="tune", unit="step", disable=not show):
        batch = images[rows], np.where(rows < 0, -1, labels[rows]), texts
        own, state, loss = _step(adapted.model, recipe, steps, own, state, leaves, *batch, learning_rate, weight_decay)
    if not np.isfinite(loss):
        raise DivergedError(
            f"{type(recipe).__name__}: the loss is {loss} after {steps} steps; a smaller learning_rate?"
        )
    params = tree(leaves | recipe.combine(own, leaves))
    return dataclasses.replace(adapted, params=params, classes=tuple(names), templates=tuple(templates), head=None)


@partial(jax.jit, static_argnames=("model", "recipe", "steps"))
def _step(model, recipe, steps, own, state, leaves, images, labels, texts, learning_rate, weight_decay):
    def loss(own):
        logits = insertion.class_logits(model, tree(leaves | recipe.combine(own, leaves)), images, texts)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses, where=labels >= 0)

    value, gradient = jax.value_and_grad(loss)(own)
    updates, state = _optimizer(steps, learning_rate, weight_decay).update(gradient, state, own)
    return optax.apply_updates(own, updates), state, value


def _optimizer(steps, learning_rate, weight_decay):
    return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=weight_decay)


def with_room(pretrained: Pretrained, insertions: tuple) -> Pretrained:
    """The model with insertions and with room for contexts in its texts; the parameters have no insertions yet."""
    if not insertions:
        return pretrained
    room = "".join(f" | room({m.length}, {m.at})" for m in insertions if isinstance(m, insertion.Context))
    model = insertion.inserted(pretrained.model, *insertions)
    return dataclasses.replace(pretrained, model=model, tokenize=pretrained.tokenize + room)


def _context_place(pretrained: Pretrained) -> int:
    """1 if texts begin with a start token, else 0."""
    first = pretrained._token_ids(["a", "the"])[:, 0]
    return int(first[0] == first[1])
