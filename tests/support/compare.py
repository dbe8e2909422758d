"""Comparisons of arrays and of trees of them."""

import jax
import numpy as np

from vlm_jax.params.table import named_leaves


def close(got, want, rtol=1e-5, atol=1e-5):
    """Asserts that arrays, or trees of arrays, are equal up to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def close_in_scale(got, want, tolerance=1e-5):
    """Asserts equality up to `tolerance` of the largest value, of 1 where all are smaller."""
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(np.abs(want).max(), 1))


def same(got, want):
    """Asserts that dicts of arrays have the same names and values."""
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def bits(tree):
    """{name: (dtype, bytes)} of a tree of arrays, for comparisons that see NaN and -0."""
    return {name: (np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for name, leaf in named_leaves(tree).items()}
