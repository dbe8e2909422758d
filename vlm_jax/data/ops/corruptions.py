"""The fifteen corruptions of ImageNet-C, at five severities (Hendrycks and Dietterich 2019, arXiv:1903.12261).

Levels are those of the authors' code for pictures of 224 px; lengths in pixels follow the picture's smaller side. Some
pictures differ from the published ones: frost is drawn, not photographed; fog is noise of all octaves, not a surface of
diamonds and squares; blurs along a line have one side of a Gaussian; pixels behind glass change places, where the
authors' code copies one over the other.
"""

import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from vlm_jax.data.ops.image import Picture, array
from vlm_jax.data.ops.registry import op
from vlm_jax.errors import UserError

Kind = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic", "pixelate", "jpeg",
]  # fmt: skip
SIZE = 224


@op
def corrupt(image: object, rng: np.random.Generator, kind: Kind, severity: int = 3) -> Picture:
    """Corrupts a picture as ImageNet-C does.

    Args:
      image: [H, W, 3], of the size that the model sees: the op stands after `resize`.
      rng: the example's generator.
      kind: one of the fifteen.
      severity: 1 to 5.
    """
    if severity not in (1, 2, 3, 4, 5):
        raise UserError(f"op `corrupt`: severity is {severity}; expected 1 to 5")
    x = array(image)[..., :3].astype(np.float64) / 255
    change, levels = CORRUPTIONS[kind]
    x = change(x, rng, min(x.shape[:2]) / SIZE, levels[severity - 1])
    return np.clip(np.rint(x * 255), 0, 255).astype(np.uint8)


def _gaussian_noise(x, rng, unit, level):
    return x + rng.normal(0, level, x.shape)


def _shot_noise(x, rng, unit, level):
    return rng.poisson(x * level) / level


def _impulse_noise(x, rng, unit, level):
    u = rng.random(x.shape)
    return np.where(u < level / 2, 0.0, np.where(u < level, 1.0, x))


def _defocus_blur(x, rng, unit, level):
    radius, soft = level
    radius = max(radius * unit, 0.5)
    reach = np.arange(-np.ceil(radius), np.ceil(radius) + 1)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(float)
    disk = ndimage.gaussian_filter(disk, soft)
    return ndimage.convolve(x, (disk / disk.sum())[:, :, None], mode="reflect")


def _blur(x, sigma):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _glass_blur(x, rng, unit, level):
    """Each pixel changes places with one nearby, between two blurs."""
    sigma, reach, rounds = level
    reach = max(round(reach * unit), 1)
    x = _blur(x, sigma * unit)
    h, w, _ = x.shape
    for _ in range(rounds):
        moves = rng.integers(-reach, reach, size=(h, w, 2))
        for row in range(h - reach - 1, reach - 1, -1):
            for column in range(w - reach - 1, reach - 1, -1):
                other = row + moves[row, column, 0], column + moves[row, column, 1]
                x[row, column], x[other] = x[other].copy(), x[row, column].copy()
    return _blur(x, sigma * unit)


def _streak(x, radius, sigma, angle):
    """Blurs along a line through each pixel, by a Gaussian of one side."""
    steps = np.arange(max(round(radius), 1) + 1)
    weights = np.exp(-(steps**2) / (2 * max(sigma, 1e-3) ** 2))
    total = sum(
        weight * ndimage.shift(x, (*step, *(0,) * (x.ndim - 2)), order=1, mode="nearest")
        for weight, step in zip(weights, steps[:, None] * (np.sin(angle), np.cos(angle)), strict=True)
    )
    return total / weights.sum()


def _motion_blur(x, rng, unit, level):
    radius, sigma = level
    return _streak(x, radius * unit, sigma * unit, np.radians(rng.uniform(-45, 45)))


def _zoomed(x, factor):
    h, w = x.shape[:2]
    middle = (np.array((h, w)) - 1) / 2
    offset = (*(middle - middle / factor), *(0,) * (x.ndim - 2))
    return ndimage.affine_transform(x, (1 / factor, 1 / factor, *(1,) * (x.ndim - 2)), offset, order=1, mode="nearest")


def _zoom_blur(x, rng, unit, level):
    most, step = level
    factors = np.arange(1, most, step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _snow(x, rng, unit, level):
    mean, std, zoom, threshold, radius, sigma, kept = level
    flakes = _zoomed(rng.normal(mean, std, x.shape[:2]), zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _streak(flakes, radius * unit, sigma * unit, np.radians(rng.uniform(-135, -45)))[:, :, None]
    whiter = np.maximum(x, x.mean(axis=2, keepdims=True) * 1.5 + 0.5)
    return kept * x + (1 - kept) * whiter + flakes + flakes[::-1, ::-1]


def _plasma(rng, h, w, decay):
    """A fractal surface in [0, 1] by midpoint displacement: noise of every octave, its amplitude 1 / decay^octave."""
    total, octave = np.zeros((h, w)), 0
    while 2**octave <= max(h, w):
        coarse = rng.uniform(-1, 1, (2**octave + 1, 2**octave + 1))
        grid = np.meshgrid(np.linspace(0, 2**octave, h), np.linspace(0, 2**octave, w), indexing="ij")
        total += ndimage.map_coordinates(coarse, grid, order=1) / decay**octave
        octave += 1
    return (total - total.min()) / np.ptp(total)


def _frost(x, rng, unit, level):
    kept, ice = level
    crystals = np.abs(_plasma(rng, *x.shape[:2], 1.3) - 0.5) * 2  # ridges, as ice grows on a pane
    return kept * x + ice * (1 - crystals)[:, :, None] ** 2 * np.array((0.85, 0.95, 1.0))


def _fog(x, rng, unit, level):
    amount, decay = level
    top = x.max()
    return (x + amount * _plasma(rng, *x.shape[:2], decay)[:, :, None]) * top / (top + amount)


def _brightness(x, rng, unit, level):
    """Adds to V of HSV: hue and saturation stay."""
    value = x.max(axis=2, keepdims=True)
    return np.where(value > 0, x / np.maximum(value, 1e-9), 1.0) * np.clip(value + level, 0, 1)


def _contrast(x, rng, unit, level):
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * level + mean


def _elastic(x, rng, unit, level):
    """Moves by a smooth field, after a small affine map of three points."""
    alpha, sigma, move = (share * min(x.shape[:2]) for share in level)
    h, w, _ = x.shape
    third, middle = min(h, w) // 3, np.array((h // 2, w // 2))
    points = np.stack([middle + third, middle + np.array((third, -third)), middle - third]).astype(float)
    moved = points + rng.uniform(-move, move, points.shape)
    ones = np.ones((3, 1))
    affine = np.linalg.solve(np.hstack([moved, ones]), np.hstack([points, ones]))[:, :2]
    field = [ndimage.gaussian_filter(rng.uniform(-1, 1, (h, w)), sigma, mode="reflect", truncate=3) for _ in range(2)]
    grid = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"), axis=-1)
    source = np.concatenate([grid, np.ones((h, w, 1))], axis=-1) @ affine + alpha * np.stack(field, axis=-1)
    at = source.transpose(2, 0, 1)
    return np.stack([ndimage.map_coordinates(x[..., c], at, order=1, mode="reflect") for c in range(3)], axis=-1)


def _pixelate(x, rng, unit, level):
    h, w, _ = x.shape
    image = Image.fromarray(np.rint(x * 255).astype(np.uint8))
    small = image.resize((max(int(w * level), 1), max(int(h * level), 1)), Image.Resampling.BOX)
    return np.asarray(small.resize((w, h), Image.Resampling.NEAREST)) / 255


def _jpeg(x, rng, unit, level):
    file = io.BytesIO()
    Image.fromarray(np.rint(x * 255).astype(np.uint8)).save(file, "JPEG", quality=level)
    return np.asarray(Image.open(file)) / 255


CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {  # kind -> function, its levels
    "gaussian_noise": (_gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (_shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (_impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (_glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (_motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (_zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        _snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (_frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (_fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic": (
        _elastic,
        (
            (488 / 224, 170.8 / 224, 24.4 / 224),
            (488 / 224, 19.52 / 224, 48.8 / 224),
            (12.2 / 224, 2.44 / 224, 4.88 / 224),
            (17.08 / 224, 2.44 / 224, 4.88 / 224),
            (29.28 / 224, 2.44 / 224, 4.88 / 224),
        ),
    ),
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),
}
