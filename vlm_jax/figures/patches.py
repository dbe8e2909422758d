"""Maps over the patches of pictures, laid on them."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from vlm_jax.figures import style
from vlm_jax.figures.style import HEAT, Picture


@style.styled
def maps(images: Sequence[Any], maps: Any, titles: Sequence[str] | None = None) -> Picture:
    """Pictures, each beside itself under its map; each map from its own least to its own greatest value.

    Args:
      images: n pictures.
      maps: float [n, h, w], such as `attention_maps.attention` gives.
      titles: n texts, or None.
    """
    images, maps = style.pixels(images), np.asarray(maps, np.float64)
    style.check(maps.ndim == 3 and len(maps) == len(images), f"maps [{len(images)}, h, w]", maps)
    rows, columns = style.grid(len(images), 3)
    title = 0.0 if titles is None else 0.26
    picture = Picture(figsize=(3.4 * columns, (1.7 + title) * rows + 0.5), layout="constrained")
    axes = picture.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for pair in axes:
        for each in pair:
            each.axis("off")
    for i, (pair, image) in enumerate(zip(axes, images, strict=False)):
        pair[0].imshow(image)
        pair[1].imshow(overlaid(image, (maps[i] - maps[i].min()) / max(np.ptp(maps[i]), 1e-12)))
        if titles is not None:
            pair[0].set_title(style.short(titles[i], 40), fontsize=9)
    bar = picture.colorbar(ScalarMappable(cmap=HEAT), ax=axes.ravel().tolist(), location="bottom", aspect=60,
                           fraction=0.03, ticks=[0, 1])  # fmt: skip
    bar.set_ticklabels(["least of the picture", "greatest"])
    return picture


@style.styled
def word_patch(image: Any, words: Sequence[str], maps: Any) -> Picture:
    """A picture, then itself under the map of each word; one scale for all of them.

    Args:
      image: a picture.
      words: m words or texts.
      maps: float [m, h, w], such as `attention_maps.word_patch(model, [image], words)[0]`.
    """
    image, maps = style.pixel(image), np.asarray(maps, np.float64)
    style.check(maps.ndim == 3 and len(maps) == len(words) > 0, f"maps [{len(words)}, h, w]", maps)
    rows, columns = style.grid(len(words) + 1, 5)
    picture = Picture(figsize=(2.0 * columns, 2.2 * rows + 0.5), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False)
    scale = Normalize(maps.min(), max(maps.max(), maps.min() + 1e-12))
    for each in axes.flat:
        each.axis("off")
    axes.flat[0].imshow(image)
    for each, word, values in zip(axes.flat[1:], words, maps, strict=False):
        each.imshow(overlaid(image, scale(values).data))
        each.set_title(style.wrapped(word, 24, 2), fontsize=9, loc="center")
    picture.colorbar(ScalarMappable(scale, HEAT), ax=axes.ravel().tolist(), location="bottom", aspect=60,
                     fraction=0.03, label="cosine of patch and text")  # fmt: skip
    return picture


def overlaid(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3], pale and grey, under a map [h, w] in [0, 1]: uint8 [H, W, 3]. Patches stay visible."""
    height, width = max(image.shape[0], 192), max(image.shape[1], 192)
    grey = np.asarray(Image.fromarray(image).convert("L").resize((width, height)), np.float64)[..., None]
    heat = np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST))
    colour = 255 * matplotlib.colormaps[HEAT](heat)[..., :3]
    return (0.65 * colour + 0.35 * grey).round().astype(np.uint8)
