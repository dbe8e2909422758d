"""Tables of text positions of another length; positions of pictures on other grids."""

import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.models import positions


def test_77_become_248_as_published():
    """Long-CLIP, four new places for each old one behind the first 20, three more on the line through the last two."""
    old = np.random.default_rng(0).normal(size=(77, 4)).astype(np.float32)
    new = list(old[:20])
    for i in range(20, 76):
        new += [old[i] * (4 - k) / 4 + old[i + 1] * k / 4 for k in range(4)]
    new += [old[76] + k * (old[76] - old[75]) / 4 for k in range(4)]
    found = positions.of_length(old[None], 248)
    np.testing.assert_allclose(found[0], new, atol=1e-6)
    np.testing.assert_array_equal(found[0, :20], old[:20])


def test_shorter_and_equal():
    old = np.random.default_rng(0).normal(size=(1, 30, 4)).astype(np.float32)
    np.testing.assert_array_equal(positions.of_length(old, 30), old)
    np.testing.assert_array_equal(positions.of_length(old, 8), old[:, :8])
    with pytest.raises(UserError, match="16 positions of texts cannot become 20"):
        positions.of_length(old[:, :16], 20)


def test_positions_of_each_picture_are_bilinear_and_antialiased():
    """Smaller and larger grids than the table's, long ones among them; on its own grid it is the table."""
    table = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    grids = np.array([(2, 6), (9, 2), (1, 1), (7, 5), (4, 3)])
    found = jax.jit(positions.resampled, static_argnums=(1, 3))(table, (4, 3), grids, 35)
    for own, grid in zip(found, grids, strict=True):
        expected = jax.image.resize(table.reshape(4, 3, 8), (*grid, 8), "bilinear", antialias=True)
        np.testing.assert_allclose(own[: np.prod(grid)], expected.reshape(-1, 8), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[-1, :12], table)
