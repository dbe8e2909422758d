"""Pictures changed to mislead a model: projected gradient ascent on the cross-entropy over class names."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.objectives.adversarial import Ball, Pixels, ascend


class Attack:
    """Changes pictures by up to `radius` grey levels, of 0 to 255, so that a model misses their class.

    Arguments of `config`: radius (1.0), steps (10), size of a step (2.5 * radius / steps). The ascent begins at the
    picture, so that a picture's result does not depend on others.
    """

    def __init__(self, pretrained: Any, text: np.ndarray | None, section: dict[str, Any]):
        """`text`: unit-norm embeddings of the classes, [C, D]."""
        self.radius, self.steps, self.size = config.call(_settings, section, "the attack")
        if getattr(pretrained, "compares_pairs", False) or getattr(pretrained, "head", None) is not None:
            raise UserError("an attack needs a model of two towers without a head")
        if text is None or np.ndim(text) != 2:
            raise UserError("an attack needs one host, and one vector for each class")
        self.units, self.text = Pixels.of(pretrained.preprocess), np.asarray(text, np.float32)
        self.pretrained = pretrained

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Preprocessed pictures [B, H, W, 3] and classes int [B], -1 for none -> pictures at their worst."""
        options = self.text, self.units, self.radius, self.size
        fn = lambda model, params, rows: _worst(model, self.steps, params, *rows, *options)
        return self.pretrained._run(fn, (np.asarray(images), np.asarray(labels)))


def _settings(*, radius: float = 1.0, steps: int = 10, size: float | None = None) -> tuple[float, int, float]:
    if radius < 0 or steps < 1 or (size is not None and size <= 0):
        raise UserError(f"the attack has radius={radius}, steps={steps}, size={size}; expected numbers above 0")
    return radius, steps, 2.5 * radius / steps if size is None else size


@functools.partial(jax.jit, static_argnums=(0, 1))
def _worst(model, steps, params, images, labels, text, units, radius, size):
    units, pixels = Pixels(*units), Pixels(*units).pixels(images)
    scale = jnp.exp(params["logit_scale"])

    def risk(pixels):
        embedded = model.apply({"params": params}, units.images(pixels), None).image
        logits = scale * jnp.matmul(embedded, text.T, precision="highest")
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(labels >= 0, losses, 0))

    return units.images(ascend(risk, pixels, Ball.around(pixels, radius, 0.0, 255.0), steps=steps, size=size))
