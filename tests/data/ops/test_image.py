"""Decoding, and the numbers of a picture."""

import numpy as np
import pytest

from tests.support.records import encode, picture, run
from vlm_jax.data.ops.image import STATISTICS
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError


def test_decode_formats_and_transparency():
    image = picture(16, 16)
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True}):
        np.testing.assert_array_equal(run("decode", {"image": encode(image, **options)})["image"], image)
    grey = run("decode", {"image": encode(image[..., 0])})["image"]
    np.testing.assert_array_equal(grey, np.repeat(image[..., :1], 3, -1))
    alpha = np.zeros((16, 16, 1), np.uint8)
    alpha[4:8, 4:8] = 255
    encoded = encode(np.concatenate((image, alpha), -1))
    white = run("decode", {"image": encoded})["image"]
    np.testing.assert_array_equal(white, np.where(alpha > 0, image, 255))
    blue = run("decode(background=(0, 0, 255))", {"image": encoded})["image"]
    np.testing.assert_array_equal(blue[0, 0], (0, 0, 255))
    coloured = run("decode(background=None) | random_background", {"image": encoded})["image"]
    np.testing.assert_array_equal(coloured[4:8, 4:8], image[4:8, 4:8])
    assert len(np.unique(coloured[alpha[..., 0] == 0], axis=0)) == 1


def test_broken_images_are_bad_examples():
    jpeg = encode(picture(), "JPEG")
    for data, reason in (
        (jpeg[: len(jpeg) // 2], "(?i)truncated"),
        (b"no picture", "cannot identify"),
        (b"", "cannot id"),
    ):
        for string in ("decode", "decode | random_resized_crop(8)", "decode | resize(8) | normalize"):
            with pytest.raises(BadExample, match=reason):
                run(string, {"image": data})


def test_normalize():
    image = picture()
    record = {"image": image}
    np.testing.assert_allclose(run("normalize", record)["image"], image / 127.5 - 1, atol=1e-6)
    mean, std = STATISTICS["clip"]
    expected = (image / 255 - np.array(mean)) / np.array(std)
    for string in ("normalize('clip')", f"normalize({mean}, {std})"):
        np.testing.assert_allclose(run(string, record)["image"], expected, atol=1e-6)
    assert run("to_float", record)["image"].dtype == np.float32
    np.testing.assert_allclose(run("to_float", record)["image"], image / 255, atol=1e-7)
    with pytest.raises(UserError, match="was given an image of float32"):
        run("to_float | normalize", record)
