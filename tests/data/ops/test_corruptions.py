"""Corruptions of pictures: closed forms, and that each takes more away at a higher severity."""

import colorsys

import numpy as np
import pytest
from scipy import ndimage

from vlm_jax.data.ops import parse
from vlm_jax.data.ops.corruptions import CORRUPTIONS
from vlm_jax.errors import UserError

GREYS = np.random.default_rng(0).uniform(0, 1, (112, 112))
PICTURE = np.stack([ndimage.gaussian_filter(GREYS, s) for s in (3, 4, 5)], axis=-1)
PICTURE = ((PICTURE - PICTURE.min()) / np.ptp(PICTURE) * 255).astype(np.uint8)
MOVING = ("elastic", "glass_blur")  # they move pixels as far at a low severity: no more is lost at a high one


def corrupted(kind, severity, picture=PICTURE, seed=0):
    return parse(f"corrupt('{kind}', {severity})")({"image": picture}, np.random.default_rng(seed))["image"]


@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_more_is_lost_at_a_higher_severity(kind):
    found = [corrupted(kind, severity) for severity in (1, 5)]
    assert all(one.shape == PICTURE.shape and one.dtype == np.uint8 for one in found)
    mild, strong = (np.mean((one.astype(float) - PICTURE) ** 2) for one in found)
    assert min(strong, mild) > 0 and (strong > mild or kind in MOVING)
    np.testing.assert_array_equal(corrupted(kind, 5), found[1])


def test_noise_has_the_stated_spread():
    grey = np.full((64, 64, 3), 128, np.uint8)
    noise = corrupted("gaussian_noise", 1, grey).astype(float) / 255
    assert noise.std() == pytest.approx(0.08, rel=0.05)
    shot = corrupted("shot_noise", 1, grey).astype(float) / 255
    assert shot.var() == pytest.approx(128 / 255 / 60, rel=0.1), "a Poisson variable's variance is its mean"
    impulses = corrupted("impulse_noise", 5, grey)
    assert np.mean(impulses != 128) == pytest.approx(0.27, abs=0.02)


def test_brightness_and_contrast_by_hand():
    x = PICTURE.astype(float) / 255
    mean = x.mean(axis=(0, 1))
    np.testing.assert_allclose(corrupted("contrast", 2), ((x - mean) * 0.3 + mean) * 255, atol=0.51)
    brighter = corrupted("brightness", 3)
    for i, j in ((3, 4), (20, 30), (111, 0)):
        h, s, v = colorsys.rgb_to_hsv(*x[i, j])
        expected = np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1)))
        np.testing.assert_allclose(brighter[i, j], 255 * expected, atol=0.51)


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic", "pixelate"])
def test_a_flat_picture_stays(kind):
    flat = np.full((48, 48, 3), (40, 90, 200), np.uint8)
    np.testing.assert_allclose(corrupted(kind, 4, flat), flat, atol=1)


def test_a_severity_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="severity is 6"):
        corrupted("fog", 6)
    with pytest.raises(UserError, match="rain"):
        corrupted("rain", 1)
