"""Resizing, cropping, padding and patches, against PIL's and other projects' rules."""

import numpy as np
import pytest
from PIL import Image

from tests.support.records import encode, picture, run
from vlm_jax.data.ops.geometry import METHODS
from vlm_jax.data.rows import collate
from vlm_jax.errors import UserError


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos", "area", "hamming"])
def test_resize_equals_pil(method):
    image = picture()
    resampling = METHODS[method]
    expected = np.asarray(Image.fromarray(image).resize((20, 30), resampling))
    np.testing.assert_array_equal(run(f"resize(30, 20, '{method}')", {"image": image})["image"], expected)


def test_evaluation_preprocessing_equals_torchvisions_steps():
    """Resize(24, bicubic) and CenterCrop(24), as torchvision does them with PIL (sizes truncated, offsets rounded)."""
    for height, width in ((48, 65), (65, 48), (24, 24)):
        image = picture(height, width)
        w, h = (24, int(24 * height / width)) if width <= height else (int(24 * width / height), 24)
        top, left = round((h - 24) / 2), round((w - 24) / 2)
        resized = Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[top : top + 24, left : left + 24]
        got = run("decode | resize_shortest(24) | central_crop(24)", {"image": encode(image)})["image"]
        np.testing.assert_array_equal(got, expected)


def test_central_crop_pads_small_images_with_black():
    image = picture(4, 6)
    out = run("central_crop(8)", {"image": image})["image"]
    np.testing.assert_array_equal(out, np.pad(image, ((2, 2), (1, 1), (0, 0))))


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(5, 8, 2, 0), (6, 9, 2, -1), (12, 4, -1, 2), (8, 2, 0, 2)]
)
def test_central_crop_rounds_odd_margins(height, width, top, left):
    """9 x 7 pictures: to even as torchvision (whose padding is the smaller first), or down as Transformers."""
    image = picture(9, 7)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    for rounding, (y, x) in {"even": (top, left), "down": ((9 - height) // 2, (7 - width) // 2)}.items():
        expected = padded[4 + y : 4 + y + height, 4 + x : 4 + x + width]
        got = run(f"central_crop({height}, {width}, rounding='{rounding}')", {"image": image})["image"]
        np.testing.assert_array_equal(got, expected)


def test_resize_without_antialiasing_takes_two_neighbours():
    ramp = np.repeat(np.arange(0, 80, 10, dtype=np.uint8)[None, :, None], 3, -1)
    record = {"image": np.repeat(ramp, 4, 0)}
    half = run("resize(2, 4, method='bilinear', antialias=False)", record)["image"]
    np.testing.assert_array_equal(half[0, :, 0], [5, 25, 45, 65])
    third = run("resize(4, 3, method='bilinear', antialias=False)", record)["image"]
    np.testing.assert_array_equal(third[0, :, 0], [8, 35, 61])  # 8.33, 35, 61.67: truncated, not rounded
    double = run("resize(4, 16, method='bilinear', antialias=False)", record)["image"]
    np.testing.assert_array_equal(double[0, :5, 0], [0, 2, 7, 12, 17])
    with pytest.raises(UserError, match="antialias=False, method='bicubic'; expected method='bilinear'"):
        run("resize(4, antialias=False)", record)


def test_resize_to_cover_or_to_fit_a_size():
    sizes = {
        "resize_shortest((20, 30))": (22, 30),
        "resize_shortest((30, 20))": (30, 40),
        "resize_longest(24)": (18, 24),
        "resize_longest((10, 30))": (10, 13),
    }
    for string, size in sizes.items():
        got = run(string, {"image": picture()})["image"]
        np.testing.assert_array_equal(got, run(f"resize{size}", {"image": picture()})["image"])


def test_packed_patches():
    """Grids are those of Transformers' get_image_size_for_max_num_patches; patches run row by row."""
    for (height, width), (rows, columns) in {
        (48, 64): (5, 7),
        (64, 48): (7, 5),
        (8, 300): (1, 36),
        (9, 9): (6, 6),
    }.items():
        resized = run("resize_to_patches(4, 36)", {"image": picture(height, width)})["image"]
        assert resized.shape == (4 * rows, 4 * columns, 3)
    image = np.arange(8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)
    packed = run("to_float | pack_patches(4, 8)", {"image": image})["image"]
    assert packed["patches"].dtype == np.float32 and packed["grid"].dtype == np.int32
    np.testing.assert_array_equal(packed["grid"], (2, 3))
    expected = [image[y : y + 4, x : x + 4].reshape(-1) / 255 for y in (0, 4) for x in (0, 4, 8)]
    np.testing.assert_allclose(packed["patches"], [*expected, *[np.zeros(48)] * 2], atol=1e-7)
    for string in ("to_float | pack_patches(4, 5)", "to_float | pack_patches(5, 99)"):
        with pytest.raises(UserError, match="was given an image of 8x12; put `resize_to_patches"):
            run(string, {"image": image})
    batch = collate([{"image": packed, "label": 1}, {"image": packed, "label": 2}])
    assert batch["image"]["patches"].shape == (2, 8, 48) and batch["image"]["grid"].tolist() == [[2, 3]] * 2
    with pytest.raises(UserError, match="`patches` has shapes"):
        collate([{"image": packed}, {"image": packed | {"patches": np.zeros((3, 48))}}])


def test_crop_to_content():
    canvas = np.full((30, 40, 3), 250, np.uint8)
    canvas[10:20, 5:9] = 7
    np.testing.assert_array_equal(run("crop_to_content(square=False)", {"image": canvas})["image"], canvas[10:20, 5:9])
    square = run("crop_to_content", {"image": canvas})["image"]
    assert square.shape == (10, 10, 3)
    np.testing.assert_array_equal(square[:, 3:7], canvas[10:20, 5:9])
    assert (square[:, :3] == 250).all()
    with_margin = run("crop_to_content(margin=0.2, square=False)", {"image": canvas})["image"]
    np.testing.assert_array_equal(with_margin, canvas[8:22, 3:11])
    blank = np.full((8, 9, 3), 9, np.uint8)
    np.testing.assert_array_equal(run("crop_to_content", {"image": blank})["image"], blank)
