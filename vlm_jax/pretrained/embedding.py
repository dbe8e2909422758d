"""Embeddings of batches, compiled once for each model, and of class names in prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models import pooling
from vlm_jax.models.insertions import after_towers
from vlm_jax.models.transformer import Encoder


@partial(jax.jit, static_argnames="model")
def embed(model: nn.Module, params: Any, images: jax.Array | None, token_ids: jax.Array | None) -> jax.Array:
    """Returns unit-norm embeddings, fp32 [B, D], of the image tower's input or of token ids [B, L]."""
    embeddings = model.apply({"params": params}, images, token_ids)
    return embeddings.image if token_ids is None else embeddings.text


@partial(jax.jit, static_argnames=("model", "layer"))
def features(model: nn.Module, params: Any, images: jax.Array, layer: int | None = None) -> jax.Array:
    """Returns the mean of the image tower's tokens before any head, or of a block's tokens, fp32 [B, D]."""
    if layer is not None:
        if not isinstance(model.image, Encoder):
            raise UserError(f"the image tower, a {type(model.image).__name__}, has no blocks of a transformer")
        run = lambda model, images: model.image(images, layers=(layer,))
        encoded = model.apply({"params": params}, images, method=run)
        tokens, mask = encoded.aux["layers"][0], encoded.mask
    elif "embed" not in model.can:
        tokens, mask = model.apply({"params": params}, images, method="see")
    else:
        found = model.apply({"params": params}, images, None)
        tokens, mask = found.image_tokens, found.image_mask
    return pooling.pool("mean", tokens.astype(jnp.float32), mask)


@partial(jax.jit, static_argnames=("model", "side", "layers"))
def features_of_layers(model: nn.Module, params: Any, inputs: Any, side: str, layers: tuple[int, ...]) -> tuple:
    """Returns the outputs of chosen blocks of a tower, "image" or "text", fp32 [B, L, D] each."""
    run = lambda model, inputs: getattr(model, side)(inputs, layers=layers)
    result = model.apply({"params": params}, inputs, method=run)
    encoded = result if isinstance(result, pooling.Encoded) else result[0]  # CoCa's text tower: (Decoded, cls)
    return tuple(tokens.astype(jnp.float32) for tokens in encoded.aux["layers"])


pair_logits = jax.jit(after_towers.class_logits, static_argnames="model")


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns unit-norm class embeddings, float32 [C, D]: the normalised mean of the names' normalised prompts.

    Texts with a vector for every token keep all prompts: [C, templates, L, D].

    Args:
      embed_texts: texts -> float [n, D], or [n, L, D].
      names: C class names.
      templates: prompts; `{}` stands for the name.
    """
    embeddings = np.asarray(embed_texts(prompts_of(names, templates)), np.float32)
    embeddings = embeddings.reshape(len(names), len(templates), *embeddings.shape[1:])
    return embeddings if embeddings.ndim == 4 else unit(unit(embeddings).mean(axis=1))


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns every name in every template, grouped by name."""
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template `{template}` has no `{{}}` for the class name")
    return [template.replace("{}", name) for name in names for template in templates]


def unit(x: np.ndarray) -> np.ndarray:
    """Returns x / |x| over the last axis; 0 stays 0."""
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
