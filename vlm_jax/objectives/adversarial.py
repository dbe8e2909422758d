"""Adversarial examples: inputs or hidden values that raise a loss inside a ball.

    units = Pixels.of(preprocess)
    start = units.pixels(images)
    ball = Ball.around(start, 1.0, 0.0, 255.0)                       # a grey level, and still a picture
    worst = ascend(lambda p: loss(units.images(p)), ball.draw(rng), ball, steps=3, size=0.5)

`shifted` adds to what a module of the model returns, for balls around embeddings. No gradient flows through `ascend`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.data import ops
from vlm_jax.data.ops import image as image_ops
from vlm_jax.errors import UserError


class Ball(NamedTuple):
    """All arrays between `low` and `high`."""

    low: jax.Array
    high: jax.Array

    @classmethod
    def around(cls, x: jax.Array, radius: Any, lowest: Any = -jnp.inf, highest: Any = jnp.inf) -> "Ball":
        """Returns the arrays y with |y - x| <= radius, to the last bit, and lowest <= y <= highest.

        Args:
          x: the centre, floating, between `lowest` and `highest`.
          radius: at least 0, broadcasts to x.
          lowest, highest: limits of what an input may be, broadcast to x.
        """
        r = jnp.broadcast_to(jnp.asarray(radius, x.dtype), x.shape)
        return cls(jnp.maximum(-_sum_below(-x, r), lowest), jnp.minimum(_sum_below(x, r), highest))

    def project(self, y: jax.Array) -> jax.Array:
        """Returns the nearest array of the ball."""
        return jnp.clip(y, self.low, self.high)

    def draw(self, rng: jax.Array | None) -> jax.Array:
        """Returns a uniform draw; without a key, the middle."""
        share = 0.5 if rng is None else jax.random.uniform(rng, self.low.shape, self.low.dtype)
        return self.project(self.low + share * (self.high - self.low))


def _sum_below(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns a + b of floats, rounded down where the sum is rounded: Knuth's exact error says where."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return jnp.where(error < 0, jnp.nextafter(total, jnp.full_like(total, -jnp.inf)), total)


def largest(gradient: jax.Array) -> jax.Array:
    """Returns g / max |g| over the last axis, SMART's direction (arXiv:1911.03437, in the authors' code)."""
    return gradient / (jnp.max(jnp.abs(gradient), axis=-1, keepdims=True) + 1e-12)


def ascend(
    risk: Callable,
    start: jax.Array,
    ball: Ball,
    *,
    steps: int,
    size: float,
    direction: Callable = jnp.sign,
) -> jax.Array:
    """Returns `steps` times y <- project(y + size * direction(gradient of risk)), without gradient: PGD.

    With the sign, one step as large as the radius from the centre is FGSM (arXiv:1412.6572); several are PGD (Madry et
    al. 2018, arXiv:1706.06083).

    Args:
      risk: array -> scalar, a sum over rows if rows shall not see the number of rows.
      start: a member of the ball.
      ball: the permitted arrays.
      steps, size: number and size of the steps.
      direction: of a gradient.
    """
    step = lambda y, _: (ball.project(y + size * direction(jax.grad(risk)(y))), None)
    return jax.lax.stop_gradient(jax.lax.scan(step, ball.project(start), length=steps)[0])


def held(outputs: Any, **rows: Any) -> Any:
    """Returns `outputs` on other rows, without gradient to the parameters: for the risk of `ascend`."""
    view = outputs.on(**rows)
    view.params = jax.lax.stop_gradient(view.params)
    return view


class Pixels(NamedTuple):
    """The units of a model's pictures, x = pixel * scale - offset.

    Attributes:
      scale, offset: float32 [3].
    """

    scale: np.ndarray
    offset: np.ndarray

    @classmethod
    def of(cls, preprocess: str | None) -> "Pixels":
        """Reads the units from a model's preprocessing, an op string.

        Raises:
          UserError: it has no `normalize` or `to_float`.
        """
        pipeline = ops.parse(preprocess or "")
        for step in reversed((*pipeline.before, *pipeline.after)):
            if step.name == "to_float":
                return cls(np.full(3, 1 / 255, np.float32), np.zeros(3, np.float32))
            if step.name == "normalize":
                return cls(*image_ops.scale_and_offset(*step.args, **step.kwargs))
        raise UserError(f"`{preprocess}` has no `normalize` or `to_float`, which say what a pixel is to the model")

    def pixels(self, images: jax.Array) -> jax.Array:
        """Normalised pictures [..., 3] -> whole grey levels, 0 to 255, of their dtype."""
        return jnp.clip(jnp.round((images + self.offset) / self.scale), 0, 255)

    def images(self, pixels: jax.Array) -> jax.Array:
        """Inverts `pixels`."""
        return pixels * self.scale - self.offset


@contextlib.contextmanager
def shifted(path: tuple[str, ...], shift: Any) -> Iterator[list[jax.Array]]:
    """Adds `shift` to what the module at `path` returns; yields a list of these values, before the shift."""
    seen = []

    def add(call, args, kwargs, context):
        value = call(*args, **kwargs)
        if context.module.path != path or context.method_name != "__call__":
            return value
        seen.append(value)
        return value + jnp.asarray(shift, value.dtype)

    with nn.intercept_methods(add):
        yield seen
