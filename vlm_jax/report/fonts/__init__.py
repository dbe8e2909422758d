"""Packaged fonts for Chinese, Japanese, Korean, Indian and Thai texts and emoji; see NOTICE for their licences.

matplotlib brings a font for Latin, Greek, Cyrillic, Arabic and Hebrew. `FAMILIES` are the fonts of figures, in the
order in which they are asked for a character. A page embeds the glyphs that its text needs, see `css`.
"""

import base64
import dataclasses
import functools
import io
import logging
import unicodedata
from itertools import groupby
from pathlib import Path

from matplotlib import font_manager

FILES = sorted(Path(__file__).parent.glob("*.ttf"))
OTHERS = (  # fonts of systems, for what the packaged fonts lack
    "Noto Sans CJK JP", "Source Han Sans", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic",
    "Noto Sans Symbols", "Noto Sans Symbols2", "Noto Sans Khmer", "Noto Sans Ethiopic", "Noto Sans Myanmar",
    "Noto Sans Sinhala", "Noto Sans Gujarati", "Noto Sans Gurmukhi", "Noto Sans Kannada", "Noto Sans Malayalam",
    "Nirmala UI", "Arial Unicode MS",
)  # fmt: skip

PAGE = "Page"


def _register() -> list[str]:
    """Makes the packaged fonts known to matplotlib and returns the families of figures."""
    fonts, names = font_manager.fontManager, ["DejaVu Sans"]
    for path in FILES:
        fonts.addfont(path)
        regular = fonts.ttflist[-1]
        fonts.ttflist.append(dataclasses.replace(regular, weight=700))  # otherwise matplotlib logs that bold is missing
        names.append(regular.name)
    return names + [name for name in OTHERS if name in fonts.get_font_names()]


FAMILIES = _register()


@functools.cache
def _drawn() -> frozenset[int]:
    """The characters that a font of `FAMILIES` has."""
    paths = (font_manager.findfont(name) for name in FAMILIES)
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def drawable(text: str) -> str:
    """Returns the text for a figure without a browser: letters that no font has become the name of their script.

    "cat ឆ្មា" -> "cat [khmer]". Other signs that no font has become "?"; marks that nobody sees are left out.
    """
    if text.isascii():
        return text
    kinds = groupby(text, _kind)
    return "".join("".join(run) if kind is None else kind for kind, run in kinds)


def _kind(character: str) -> str | None:
    """None for a character that is drawn as it is, otherwise what stands for a run of such characters."""
    category = unicodedata.category(character)
    if character == "\n" or (category != "Cc" and ord(character) in _drawn()):
        return None
    if category in ("Cc", "Cf", "Cs"):
        return ""
    return f"[{unicodedata.name(character, '?').split()[0].lower()}]" if category[0] in "LM" else "?"


def css(text: str) -> str:
    """Returns the rules of a page's font `PAGE`: of each packaged font the glyphs of the text's characters.

    The font stands first in the page's list and is asked for these characters only: browsers draw them anew once the
    font is there.
    """
    from fontTools import subset

    parts = {character for letter in set(text) for character in letter + unicodedata.normalize("NFKD", letter)}
    wanted, rules = {ord(character) for character in parts if ord(character) > 0x24F}, []
    for path in FILES:
        here = wanted & font_manager.get_font(path).get_charmap().keys()
        wanted -= here
        if not here:
            continue
        logging.getLogger("fontTools").setLevel(logging.WARNING)
        options = subset.Options(flavor="woff", layout_features=["*"], notdef_outline=True)
        cutter, data = subset.Subsetter(options), io.BytesIO()
        with subset.load_font(path, options) as font:
            cutter.populate(unicodes=here)
            cutter.subset(font)
            subset.save_font(font, data, options)
        encoded = base64.b64encode(data.getvalue()).decode()
        covered = ", ".join(f"U+{code:x}" for code in sorted(here))
        source = f"url(data:font/woff;base64,{encoded})"
        rules.append(f'@font-face {{ font-family: "{PAGE}"; src: {source}; unicode-range: {covered}; }}')
    return "\n".join(rules)
