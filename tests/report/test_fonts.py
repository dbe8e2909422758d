"""Texts of many scripts: glyphs, widths, and what a page embeds."""

import base64
import io
import re
import warnings

import numpy as np
import pytest
from fontTools.ttLib import TTFont

from vlm_jax.report import document, figures, fonts
from vlm_jax.report.figures.style import columns, short, wrapped

TEXTS = ["猫が座る", "고양이", "繁體简体", "बिल्ली", "แมวน้ำ", "বিড়াল", "பூனை", "పిల్లి", "قطة", "חָתוּל", "кот", "a 🐱 cat"]


def test_the_packaged_fonts_draw_every_script():
    assert [fonts.drawable(text) for text in TEXTS] == TEXTS
    assert fonts.drawable("a ឆ្មា, \x00b\U000e0041") == "a [khmer], b", "no box for what no font has"
    assert len(fonts.FILES) == 7 and sum(path.stat().st_size for path in fonts.FILES) < 4e6


def test_no_warning_and_no_box(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = [*TEXTS, "ឆ្មា"]
        picture = figures.similarity(np.zeros((1, 4, 4, 3), np.uint8), texts, np.zeros((1, len(texts))))
        page = document.document("猫", [document.figure(picture, "similarity", "a")])
        picture._repr_png_()
    assert not caplog.records
    labels = [label.get_text() for label in picture.axes[0].get_xticklabels()]
    assert labels == [*TEXTS, "[khmer]"]
    assert all(text in page for text in texts), "the browser draws every text itself"


def test_a_page_embeds_the_glyphs_that_it_needs():
    css = fonts.css("<p>cat, кот, 猫 แมวน้ำ</p>")
    assert css.count("@font-face") == 2 and len(css) < 20_000
    held = set()
    for data, covered in re.findall(r"base64,([^)]+)\); unicode-range: ([^;]+);", css):
        with TTFont(io.BytesIO(base64.b64decode(data))) as font:
            assert set(font.getBestCmap()) == {int(code[2:], 16) for code in covered.split(", ")}
            held |= set(font.getBestCmap())
    assert set(map(ord, "猫แมวน้ำ")) < held and 0x0E4D in held, "with the parts that shaping decomposes letters into"
    assert fonts.css("only Latin, Ελληνικά, عربي") == ""


def test_texts_are_cut_by_their_width():
    assert [columns(text) for text in ("cat", "猫が", "बिल्ली", "e\u0301")] == [3, 4, 5, 1]
    assert short("猫が座っている", 8) == "猫が座…" and short("a long name", 6) == "a lon…" and short("cat", 3) == "cat"
    assert short("बिल्ली", 2) == "…" and short("e\u0301e\u0301e\u0301", 2) == "e\u0301…", "marks stay with their letters"
    assert wrapped("猫が座っている", 8, 3) == "猫が座っ\nている"
    assert wrapped("a cat on a mat", 6, 2) == "a cat\non a…" and wrapped("a cat", 20, 2) == "a cat"


@pytest.mark.parametrize("text", ["", " ", "word"])
def test_short_texts_stay(text):
    assert short(text) == text and wrapped(text, 10, 2) == text.strip()
