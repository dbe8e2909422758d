"""Maps over the patches of pictures, laid on the pictures."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from PIL import Image

from vlm_jax.report.figures import style
from vlm_jax.report.figures.style import HEAT, Picture


@style.styled()
def maps(images: Sequence[Any], maps: Any, titles: Sequence[str] | None = None) -> Picture:
    """Draws each picture without and with its map.

    Each map is scaled from its own minimum to its own maximum.

    Args:
      images: n pictures, cropped as the model sees them (`attention_maps.seen`).
      maps: float [n, h, w], for instance of `attention_maps.attention`.
      titles: n texts, or None.
    """
    images, maps = style.pixels(images), np.asarray(maps, np.float64)
    style.check(maps.ndim == 3 and len(maps) == len(images), f"maps [{len(images)}, h, w]", maps)
    titles = [""] * len(images) if titles is None else [style.short(title, 40) for title in titles]
    style.check(len(titles) == len(images), f"{len(images)} titles", titles)
    rows, columns = style.grid(len(images), 3)
    picture, place = _panels(rows, columns, 3.5, 1.6, 0.26 if any(titles) else 0.0)
    for i, image in enumerate(images):
        heat = (maps[i] - maps[i].min()) / max(np.ptp(maps[i]), 1e-12)
        for left, panel in ((0.0, image), (1.7, overlaid(image, heat))):
            axes = place(*divmod(i, columns), left, 1.6)
            style.show(axes, panel)
            axes.set_anchor("W")
            if not left:
                axes.set_title(titles[i], fontsize=9)
    bar = _bar(picture, ScalarMappable(cmap=HEAT))
    bar.set_ticks([0, 1], labels=["the picture's least", "its greatest"])
    return picture


@style.styled()
def word_patch(image: Any, words: Sequence[str], maps: Any) -> Picture:
    """Draws a picture, then the picture under the map of each word; all maps have one scale.

    Args:
      image: a picture, cropped as the model sees it (`attention_maps.seen`).
      words: m words or texts.
      maps: float [m, h, w], such as `attention_maps.word_patch(model, [image], words)[0]`.
    """
    image, maps = style.pixel(image), np.asarray(maps, np.float64)
    style.check(maps.ndim == 3 and len(maps) == len(words) > 0, f"maps [{len(words)}, h, w]", maps)
    rows, columns = style.grid(len(words) + 1, 5)
    picture, place = _panels(rows, columns, 2.1, 2.0, 0.38)
    scale = Normalize(maps.min(), max(maps.max(), maps.min() + 1e-12))
    panels = [image, *(overlaid(image, scale(values).data) for values in maps)]
    for i, (panel, word) in enumerate(zip(panels, ["", *words], strict=True)):
        axes = place(*divmod(i, columns), 0.0, 2.0)
        style.show(axes, panel)
        axes.set_title(style.wrapped(word, 26, 2), fontsize=9)
    _bar(picture, ScalarMappable(scale, HEAT)).set_label("cosine of patch and text")
    return picture


def _panels(rows: int, columns: int, width: float, height: float, title: float) -> tuple[Picture, Callable]:
    """An empty figure with room for a colour bar below, and a function that adds axes (row, column, left, width).

    Args: rows and columns of panels, and in inches a panel's width, height, and room for a title above it.
    """
    total, margin = rows * (height + title + 0.14) + 0.7, 0.06
    picture = Picture(figsize=(max(columns * width, 3.5) + margin, total))

    def place(row, column, left, side):
        bottom = total - (row + 1) * (height + title + 0.14) + 0.06
        inches = (margin + column * width + left, bottom, side, height)
        return picture.add_axes(np.divide(inches, np.tile(picture.get_size_inches(), 2)))

    return picture, place


def _bar(picture: Picture, values: ScalarMappable) -> Any:
    width, height = picture.get_size_inches()
    long = min(width - 1.5, 5.0)
    axes = picture.add_axes(((width - long) / 2 / width, 0.46 / height, long / width, 0.13 / height))
    bar = picture.colorbar(values, cax=axes, orientation="horizontal")
    bar.outline.set_linewidth(0.6)
    return bar


def overlaid(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A picture [H, W, 3] under a map [h, w] in [0, 1], uint8 [H, W, 3].

    The map's colours are darkened where the picture is dark; white pixels keep the colour of the bar. The edges of
    patches stay sharp.
    """
    height, width = max(image.shape[0], 192), max(image.shape[1], 192)
    grey = np.asarray(Image.fromarray(image).convert("L").resize((width, height)), np.float64)[..., None] / 255
    heat = np.asarray(Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.NEAREST))
    colour = 255 * matplotlib.colormaps[HEAT](heat)[..., :3]
    return (colour * (0.5 + 0.5 * grey)).round().astype(np.uint8)
