"""Random image ops."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.support.records import encode, picture, run
from vlm_jax.data import ops
from vlm_jax.data.ops import augment
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError


def test_random_crops_are_windows_of_the_image():
    image = np.arange(20 * 30 * 3, dtype=np.uint16).reshape(20, 30, 3)
    corners = set()
    for seed in range(200):
        out = run("random_crop(18, 28)", {"image": image}, seed)["image"]
        top, left = divmod(int(out[0, 0, 0]) // 3, 30)
        np.testing.assert_array_equal(out, image[top : top + 18, left : left + 28])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(3) for left in range(3)}
    with pytest.raises(UserError, match="was given an image of 20x30"):
        run("random_crop(32)", {"image": image})


def test_random_resized_crop_resizes_its_box():
    image = picture(60, 80)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        left, top, right, bottom = augment._random_box(60, 80, np.random.default_rng(seed), (0.3, 1.0), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        assert 0.29 <= (right - left) * (bottom - top) / 4800 <= 1.0
        assert 0.72 <= (right - left) / (bottom - top) <= 1.37
        expected = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        got = augment.random_resized_crop(image, rng, 24, scale=(0.3, 1.0))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    whole = run("random_resized_crop(24, scale=(1.0, 1.0), ratio=(1.33333, 1.33334))", {"image": image})["image"]
    np.testing.assert_array_equal(whole, run("resize(24)", {"image": image})["image"])


def test_jpegs_are_decoded_at_a_smaller_scale_when_the_crop_allows():
    """Within 3 grey levels on average of the crop of the fully decoded picture: only antialiasing differs."""
    image = picture(400, 600)
    jpeg = encode(image, "JPEG", quality=95)
    decoded = run("decode", {"image": jpeg})["image"]
    for seed in range(5):
        fast = run("decode | random_resized_crop(32)", {"image": jpeg}, seed)["image"]
        exact = run("random_resized_crop(32)", {"image": decoded}, seed)["image"]
        assert np.abs(fast.astype(int) - exact).mean() < 3
    lazy = ops.parse("decode").finish({"image": jpeg}, None)["image"]
    np.testing.assert_array_equal(lazy, np.asarray(Image.open(io.BytesIO(jpeg))))


def test_flip_pad_grey():
    image = picture()
    outs = [run("flip", {"image": image}, seed)["image"] for seed in range(40)]
    flipped = [np.array_equal(out, image[:, ::-1]) for out in outs]
    assert all(f or np.array_equal(out, image) for f, out in zip(flipped, outs, strict=True))
    assert 10 < sum(flipped) < 30
    padded = run("pad(52, 64, value=3)", {"image": image})["image"]
    np.testing.assert_array_equal(padded, np.pad(image, ((2, 2), (0, 0), (0, 0)), constant_values=3))
    grey = run("random_grey(1.0)", {"image": image})["image"]
    np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(image).convert("L")))


def test_jitter_scales_brightness_contrast_and_saturation():
    """Against the three steps one after the other; clipping and rounding happen once."""
    image = (64 + picture() // 2).astype(np.uint8)
    b, c, s = 1 + np.array((0.1, 0.2, 0.3)) * (2 * np.random.default_rng(4).random(3) - 1)
    luma = np.array((0.299, 0.587, 0.114))
    x = image.astype(float)
    x = s * x + (1 - s) * (x @ luma)[..., None]
    x = c * x + (1 - c) * (x @ luma).mean()
    expected = np.clip(b * x, 0, 255)
    got = run("jitter(0.1, 0.2, 0.3)", {"image": image}, 4)["image"]
    assert np.abs(got - expected).max() <= 0.51
    np.testing.assert_array_equal(run("jitter(0.0, 0.0, 0.0)", {"image": image})["image"], image)


def test_random_affine():
    image = picture(32, 32)
    np.testing.assert_array_equal(run("random_affine()", {"image": image})["image"], image)
    u = 2 * np.random.default_rng(1).random(4) - 1
    moved = run("random_affine(translate=0.25)", {"image": image}, 1)["image"]
    zoomed = run("random_affine(scale=(2.0, 2.0))", {"image": image})["image"]
    # Twice as large about the centre: the inner half, enlarged.
    inner = np.asarray(Image.fromarray(image[8:24, 8:24]).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(zoomed[2:-2, 2:-2].astype(int) - inner[2:-2, 2:-2]).max() <= 3
    dx, dy = 8 * u[2], 8 * u[3]
    assert (moved[:, : int(dx) - 1] == 255).all() if dx > 1 else (moved[:, int(np.ceil(dx)) + 32 :] == 255).all()
    centre = moved[16 + round(dy), 16 + round(dx)].astype(int)
    assert np.abs(centre - image[16, 16]).max() < 40


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_views_are_crops_of_the_whole_picture_with_draws_of_their_own(format):
    """As the ops one after the other, by one generator; a view's small crop leaves the main view all pixels."""
    record = {"image": encode(picture(400, 600), format)}
    decoded = np.asarray(Image.open(io.BytesIO(record["image"])))
    main = "random_resized_crop(64, scale=(0.9, 1.0))"
    local = "random_resized_crop(16, scale=(0.05, 0.4)) | flip | normalize"
    rng = np.random.default_rng(3)
    expected = [ops.parse(local)({"image": decoded}, rng)["image"] for _ in range(6)]
    out = run(f"decode | views('local', 6, {local}) | {main}", record, 3)
    assert out["local"].shape == (6, 16, 16, 3) and out["local"].dtype == np.float32
    np.testing.assert_array_equal(out["local"], expected)
    np.testing.assert_array_equal(out["image"], ops.parse(main)({"image": decoded}, rng)["image"])
    assert len(np.unique(out["local"].reshape(6, -1), axis=0)) == 6


def test_a_view_is_one_of_views():
    local = "random_resized_crop(16, scale=(0.05, 0.4)) | flip | normalize"
    record = {"image": picture(40, 60)}
    several = run(f"views('local', 2, {local})", record, 3)["local"]
    one = run(f"view('local', {local})", record, 3)
    np.testing.assert_array_equal(one["local"], several[0])
    np.testing.assert_array_equal(one["image"], record["image"])
    with pytest.raises(UserError, match=r"random_crop\(48, 48\) was given an image of 40x60"):
        run("view('local', random_crop(48))", record)


def test_random_blur_blurs_some():
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 255
    outs = [np.asarray(run("random_blur(0.5, (1.0, 2.0))", {"image": image}, seed)["image"]) for seed in range(40)]
    blurred = [out for out in outs if np.any(out != image)]
    assert 10 < len(blurred) < 30 and len({out[4, 4, 0] for out in blurred}) > 5
    for out in blurred:
        assert out[4, 4, 0] == out.max() < 100 and np.array_equal(out, out[::-1, ::-1])


def test_views_of_what_they_cannot_show():
    with pytest.raises(UserError, match="put `decode` first"):
        run("views('local', 2, flip)", {"image": encode(picture())})
    with pytest.raises(UserError, match="op `views` was given n=0"):
        run("decode | views('local', 0, flip)", {"image": encode(picture())})
    with pytest.raises(BadExample, match="has no field `image`"):
        run("views('local', 2, flip)", {"text": "x"})


def test_texts_that_show_nothing_have_one_null_image():
    shown, *null = (
        run("null_image('visual')", {"image": picture(8, 9, seed), "visual": seed == 0}) for seed in range(3)
    )
    np.testing.assert_array_equal(shown["image"], picture(8, 9, 0))
    assert shown["visual"] is True and null[0]["visual"] is False
    np.testing.assert_array_equal(null[0]["image"], null[1]["image"])
    assert null[0]["image"].shape == (8, 9, 3) and null[0]["image"].std() > 60
    with pytest.raises(BadExample, match="has no field `visual`"):
        run("null_image('visual')", {"image": picture(8, 9)})
