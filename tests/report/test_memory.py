"""What a run takes of a device's memory, drawn."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax.errors import UserError
from vlm_jax.report import figures
from vlm_jax.report.figures.style import pixel

GIB = 2**30


def test_bars_follow_each_other():
    plans = {
        "small": dict(parameters=1 * GIB, temporaries=2 * GIB),
        "large": dict(parameters=4 * GIB, optimizer=8 * GIB, temporaries=6 * GIB),
    }
    axes = figures.memory(plans, 16 * GIB).axes[0]
    bars = [(bar.get_y() + bar.get_height() / 2, bar.get_x(), bar.get_width()) for bar in axes.patches]
    expected = [(0, 0, 1), (1, 0, 4), (0, 1, 2), (1, 4, 6), (0, 3, 0), (1, 10, 8)]  # in the order of the parts
    np.testing.assert_allclose(bars, expected, atol=1e-9)
    assert [text.get_text() for text in axes.texts] == ["3.0", "18.0"]
    assert axes.get_xlim()[1] > 18  # what does not fit is there


def test_errors():
    with pytest.raises(UserError, match="plans of 1 to 4 parts"):
        figures.memory({"too many": dict.fromkeys("abcde", 1)}, GIB)
    with pytest.raises(UserError, match="plans of 1 to 4 parts"):
        figures.memory({}, GIB)


def test_pictures_are_those_that_a_model_takes(tmp_path):
    expected = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image, data = Image.fromarray(expected), io.BytesIO()
    image.save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    for picture in (image, expected, data.getvalue(), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(pixel(picture), expected)
