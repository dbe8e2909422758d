"""Adversarial examples: they stay in their ball to the bit, and follow a loop in float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data import ops
from vlm_jax.errors import UserError
from vlm_jax.objectives import adversarial
from vlm_jax.objectives.adversarial import Ball, Pixels, ascend


def test_no_bit_outside_of_the_ball():
    """|y - x| <= radius as exact fractions, for centres at which x +- radius is rounded."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 255, 300), rng.uniform(0, 1e-3, 50), [0, 255]]).astype(np.float32)
    for radius in (0.0, 0.3, 1.0, 4 / 3):
        low, high = map(np.asarray, jax.jit(lambda x, r=radius: tuple(Ball.around(x, r, 0.0, 255.0)))(x))
        r = Fraction(float(np.float32(radius)))
        for centre, *ends in zip(x.tolist(), low.tolist(), high.tolist(), strict=True):
            assert all(abs(Fraction(end) - Fraction(centre)) <= r and 0 <= end <= 255 for end in ends)
        np.testing.assert_allclose(high, np.minimum(x + np.float32(radius), 255), rtol=1e-6)
        if radius == 0:
            np.testing.assert_array_equal(high, x)


def test_ascent_is_the_loop():
    rng = np.random.default_rng(1)
    x, w = rng.uniform(0, 255, (2, 3)), rng.normal(size=(2, 3))
    with jax.enable_x64():
        ball = Ball.around(jnp.asarray(x), 2.0, 0.0, 255.0)
        risk = lambda y: jnp.sum(w * y**2)
        y = x
        for _ in range(3):
            y = np.clip(np.clip(y + 0.7 * np.sign(2 * w * y), x - 2, x + 2), 0, 255)
        np.testing.assert_allclose(ascend(risk, ball.draw(None), ball, steps=3, size=0.7), y, rtol=1e-12)
        g = 2 * w * x
        once = ascend(risk, jnp.asarray(x), ball, steps=1, size=0.7, direction=adversarial.largest)
        np.testing.assert_allclose(once, np.clip(x + 0.7 * g / np.abs(g).max(1, keepdims=True), 0, 255), rtol=1e-9)
        blind = lambda x: jnp.sum(ascend(risk, x, ball, steps=2, size=1.0))
        assert not np.any(jax.grad(blind)(jnp.asarray(x)))
    drawn = Ball.around(jnp.zeros(1000), 1.0).draw(jax.random.key(0))
    assert np.abs(drawn).max() <= 1 and abs(np.mean(drawn)) < 0.1


@pytest.mark.parametrize("last", ["normalize", "normalize('clip')", "normalize(0.4, (0.2, 0.3, 0.4))", "to_float"])
def test_pixels_of_a_model(last):
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    made = ops.parse(last)({"image": picture}, None)["image"]
    units = Pixels.of(f"decode | resize(16) | {last}")
    np.testing.assert_array_equal(units.pixels(made), picture)
    np.testing.assert_allclose(units.images(units.pixels(made)), made, atol=1e-6)


def test_units_must_be_known():
    with pytest.raises(UserError, match="`decode` has no `normalize` or `to_float`, which say what a pixel is"):
        Pixels.of("decode")
