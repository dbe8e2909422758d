"""The numbers that pictures state, and that each picture holds what it was given."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from vlm_jax import UserError
from vlm_jax.evaluators.metrics import calibration_bins
from vlm_jax.report import figures
from vlm_jax.report.figures.classes import confusion_counts
from vlm_jax.report.figures.patches import overlaid
from vlm_jax.report.figures.space import principal_plane
from vlm_jax.report.figures.style import pixel

NAMES = ["a cat", "$ and $", "an owl", "a fox"]
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 12, 16, 3), np.uint8)
SCORES = np.array([[0.9, 0.1, -0.001, 0.2], [0.3, 0.2, 0.1, 0.0], [0, 0, 1, 0], [0, 0, 0, 0.5]], np.float32)


def texts(picture):
    return [text.get_text() for text in picture.findobj(Text) if text.get_text()]


def test_calibration_error_by_hand():
    found = calibration_bins([0.1, 0.3, 0.25, 0.9, 1.0], [0, 1, 0, 1, 1], bins=4)
    assert found.counts.tolist() == [2, 1, 0, 2], "a bin holds its upper edge: 0.25 is in the first"
    np.testing.assert_allclose(found.accuracy, [0, 1, np.nan, 1])
    np.testing.assert_allclose(found.confidence, [0.175, 0.3, np.nan, 0.95])
    assert found.error == pytest.approx((2 * 0.175 + 1 * 0.7 + 2 * 0.05) / 5)
    assert calibration_bins([1.0, 1.0], [True, True]).error == 0
    assert calibration_bins([0.0], [True], bins=3).counts.tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="probabilities"):
        figures.calibration([1.5], [True])


def test_confusions_are_counted_between_the_classes_most_mixed_up():
    truth = np.array([0, 0, 0, 1, 1, 2, 3, 3, 4])
    predicted = np.array([0, 3, 3, 1, 0, 2, 3, 0, 4])
    shown, counts = confusion_counts(truth, predicted, most=2)
    assert shown.tolist() == [0, 3] and counts.tolist() == [[1, 2, 0], [1, 1, 0]]
    shown, counts = confusion_counts(truth, predicted, most=9)
    assert shown.tolist() == [0, 3, 1, 2, 4], "those without a mistake last"
    assert counts.sum() == len(truth) and counts[:, -1].sum() == 0
    shown, counts = confusion_counts(truth, predicted, most=1)
    assert (shown.tolist(), counts.tolist()) == ([0], [[1, 2]]), "two are any other"
    assert confusion_counts([1, 1, 0], [1, 1, 0], most=5)[0].tolist() == [1, 0], "no mistake at all"


def test_the_plane_of_a_gap():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(50, 8)) * [1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    image = text + np.array([0, 4, 0, 0, 0, 0, 0, 3])
    plane = principal_plane(image, text)
    assert plane.gap == pytest.approx(5)
    np.testing.assert_allclose(np.linalg.norm(plane.image - plane.text, axis=1), 5, rtol=1e-2)
    both = np.concatenate([image, text])
    eigenvalues = np.linalg.eigvalsh(np.cov(both.T))[::-1]
    np.testing.assert_allclose(plane.explained, eigenvalues[:2] / eigenvalues.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.concatenate([plane.image, plane.text]).var(0, ddof=1), eigenvalues[:2], rtol=1e-9)


def test_pixels_of_what_people_pass():
    clear = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert pixel(clear).tolist() == np.full((2, 3, 3), 255).tolist(), "transparent is white"
    assert pixel(Image.new("L", (3, 2), 7))[0, 0].tolist() == [7, 7, 7]
    np.testing.assert_array_equal(pixel(PICTURES[0]), PICTURES[0])
    with pytest.raises(UserError, match=r"uint8 \[H, W, 3\]; got float64 \[2, 2, 3\]"):
        pixel(np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match="at least one"):
        figures.maps([], np.zeros((0, 2, 2)))


def test_a_map_lies_on_its_picture_the_right_way_up():
    white = np.full((8, 8, 3), 255, np.uint8)
    laid = overlaid(white, np.array([[0.0, 1.0], [0.0, 0.0]])).astype(int)
    assert laid[10, -10].sum() > laid[10, 10].sum() and laid[10, -10].sum() > laid[-10, -10].sum()
    assert overlaid(white * 0, np.ones((1, 1))).mean() < overlaid(white, np.ones((1, 1))).mean()


def wrong(*parts):
    with pytest.raises(UserError, match="expected"):
        figures.similarity(*parts)


def test_shapes_are_checked():
    wrong(PICTURES, NAMES, SCORES[:2])
    with pytest.raises(UserError, match=r"maps \[4, h, w\]; got \[3, 2, 2\]"):
        figures.maps(PICTURES, np.zeros((3, 2, 2)))
    with pytest.raises(UserError, match="as many"):
        figures.gallery(PICTURES, [NAMES] * 4, SCORES, NAMES[:3])
    with pytest.raises(UserError, match="nothing to draw"):
        figures.curves({})


@pytest.mark.parametrize(
    ("picture", "written"),
    [
        (lambda: figures.curves({"loss": ([1, 2], [3, 1]), "new/top1": ([1, 2], [0, 1])}), ["loss", "top1", "new"]),
        (lambda: figures.gallery(PICTURES, [NAMES] * 4, SCORES, ["a cat", "cow", "a fox", "a fox"]),
         ["✓ a cat", "$ and $", "0.90", "0.00", "✗ cow"]),
        (lambda: figures.confusions([("a cat", "an owl", 3)], NAMES, PICTURES), ["a cat", "an owl", "×3", "→"]),
        (lambda: figures.confusion_matrix([0, 0, 1], [0, 1, 1], NAMES), ["a cat", "$ and $", "any other", "1"]),
        (lambda: figures.similarity(PICTURES, NAMES, SCORES), ["a cat", "0.90", "0.00", "1.00"]),
        (lambda: figures.retrieval(NAMES[:2], [PICTURES] * 2, SCORES[:2], SCORES[:2] > 0.5), ["$ and $", "✓ 0.90"]),
        (lambda: figures.retrieval(PICTURES[:1], [NAMES], SCORES[:1], SCORES[:1] > 0.5), ["an owl", "✓ 0.90"]),
        (lambda: figures.maps(PICTURES, SCORES.reshape(4, 2, 2), NAMES), ["$ and $", "its greatest"]),
        (lambda: figures.word_patch(PICTURES[0], NAMES, SCORES.reshape(4, 2, 2)), ["an owl", "cosine of patch"]),
        (lambda: figures.embedding_space(SCORES, -SCORES, NAMES), ["pictures", "a fox", "gap between the means 0.90"]),
        (lambda: figures.calibration([0.25, 0.75], [True, True]), ["expected calibration error 50.0 %"]),
    ],
)  # fmt: skip
def test_each_picture_shows_what_it_was_given(picture, written):
    picture = picture()
    found = "\n".join(texts(picture))
    assert all(text in found for text in written), found
    with Image.open(io.BytesIO(picture._repr_png_())) as image:
        assert 250 <= image.width <= 1300 and 120 <= image.height <= 1300
        assert np.asarray(image.convert("L")).std() > 5, "empty"


def test_saving_makes_the_folder_and_writes_what_notebooks_show(tmp_path):
    picture = figures.calibration([0.5], [True])
    path = picture.save(tmp_path / "new" / "calibration.png")
    assert path == tmp_path / "new" / "calibration.png"
    with Image.open(path) as saved, Image.open(io.BytesIO(picture._repr_png_())) as shown:
        assert saved.format == shown.format == "PNG" and saved.size == shown.size


def test_the_reader_s_style_changes_nothing():
    draw = lambda: np.asarray(Image.open(io.BytesIO(figures.calibration([0.5, 0.9], [True, False])._repr_png_())))
    expected = draw()
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "font.size": 20}):
        np.testing.assert_array_equal(draw(), expected)
        assert matplotlib.rcParams["font.size"] == 20, "and is left as it was"
