"""The style of all figures: ink on white; marks, hatches and line styles repeat the meaning of colours."""

import contextlib
import io
import os
import pathlib
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlm_jax.data.files import naming
from vlm_jax.errors import UserError
from vlm_jax.report import fonts

RC = {
    "font.family": fonts.FAMILIES,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 110,
    "text.parse_math": False,  # a class may be called "$"
}
INK, GREY, BAR, BLUE = "#1a1a1a", "#666666", "#dcdcdc", "#b9cfe4"
JOINER = "\u200d"
SHARES, HEAT = "Blues", "cividis"  # both monotone in luminance: dark is high in "Blues", low in "cividis"


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """A context in which matplotlib draws in this style, whatever the user's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        yield


class Picture(Figure):
    """A figure that shows itself in a notebook."""

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes a PNG and returns its path; the folder is made."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming(path):
            path.write_bytes(self._repr_png_())
        return path

    @styled()
    def _repr_png_(self) -> bytes:
        for axes in self.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = [label.get_text() for label in axis.get_ticklabels()]
                if (drawable := list(map(fonts.drawable, labels))) != labels:
                    axis.set_ticklabels(drawable)
        for text in self.findobj(Text):
            text.set_text(fonts.drawable(text.get_text()))
        data = io.BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def grid(count: int, columns: int) -> tuple[int, int]:
    """Rows and columns for `count` panels; at most `columns` columns."""
    columns = min(columns, count)
    return -(-count // columns), columns


def pixels(images: Sequence[Any]) -> list[np.ndarray]:
    """Pictures as uint8 [H, W, 3] each."""
    if not len(images):
        raise UserError("a figure of pictures needs at least one; got none")
    return [pixel(image) for image in images]


def pixel(image: Any) -> np.ndarray:
    """A picture (any input of `Pretrained.embed_images`) as uint8 [H, W, 3]; transparent pixels stand on white."""
    if isinstance(image, str | os.PathLike | bytes):
        image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
    if isinstance(image, Image.Image):
        image = image.convert("RGBA")
        image = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        seen = f"{image.dtype} {list(image.shape)}"
        raise UserError(f"a picture should be a PIL image, a path, encoded bytes or uint8 [H, W, 3]; got {seen}")
    return image


def show(axes: Any, image: np.ndarray) -> None:
    """Draws a picture without axes."""
    axes.imshow(image)
    axes.axis("off")


def short(text: str, width: int = 29) -> str:
    """Cuts a text to at most `width` columns, see `columns`."""
    if columns(text) <= width:
        return text
    kept = ""
    for cluster in _clusters(text):
        if columns(kept + cluster) > width - 1:
            break
        kept += cluster
    return kept.rstrip() + "…"


def wrapped(text: str, width: int, lines: int) -> str:
    """Wraps a text into at most `lines` lines of `width` columns; breaks between ideographs, and in long words."""
    rows = [""]
    for word in text.split():
        breaks = columns(word) > width or any(_column(letter) == 2 for letter in word)
        for i, part in enumerate(_clusters(word) if breaks else [word]):
            longer = f"{rows[-1]} {part}" if i == 0 and rows[-1] else rows[-1] + part
            if columns(longer) <= width or not rows[-1]:
                rows[-1] = longer
            else:
                rows.append(part)
    if len(rows) > lines:
        rows[lines - 1 :] = [short(" ".join(rows[lines - 1 :]), width)]
    return "\n".join(rows)


def columns(text: str) -> int:
    """Returns the width of a text: 2 for a Chinese, Japanese or Korean letter or an emoji, 0 for a combining mark."""
    return len(text) if text.isascii() else sum(map(_column, text))


def _column(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _clusters(text: str) -> list[str]:
    """Splits a text into letters with the marks that belong to them."""
    found: list[str] = []
    for letter in text:
        if found and (unicodedata.category(letter)[0] == "M" or JOINER in (letter, found[-1][-1])):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def ink_on(shade: float) -> str:
    """The colour of text on `SHARES` at a shade in [0, 1]."""
    return "white" if shade > 0.7 else INK


def check(condition: bool, expected: str, *arrays: Any) -> None:
    """Raises a UserError with the expected and the given shapes unless the condition holds."""
    if not condition:
        raise UserError(f"expected {expected}; got {', '.join(str(list(np.shape(array))) for array in arrays)}")
