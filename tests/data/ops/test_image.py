"""Decoding, and the numbers of a picture."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.support.records import encode, picture, run
from vlm_jax.data.ops.image import STATISTICS
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError


def test_decode_formats_and_transparency():
    image = picture(16, 16)
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True}):
        np.testing.assert_array_equal(run("decode", {"image": encode(image, **options)})["image"], image)
    single = run("decode", {"image": encode(image[..., 0])})["image"]
    np.testing.assert_array_equal(single, np.repeat(image[..., :1], 3, -1))
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
    with pytest.raises(UserError, match=r"needs a picture with alpha; decode\(background=None\) keeps it"):
        run("decode | random_background", {"image": encoded})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "CMYK", "RGB"])
def test_alpha_can_be_dropped_as_openai_does(mode):
    """The colours are those of `PIL.Image.convert("RGB")`, in which no alpha has a part."""
    alpha = np.full((16, 16, 1), 7, np.uint8)
    image = Image.fromarray(np.concatenate((picture(16, 16), alpha), -1))
    image = image.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK") else image.convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    want = np.asarray(Image.open(out).convert("RGB"))
    np.testing.assert_array_equal(run("decode(alpha='drop')", {"image": out.getvalue()})["image"], want)


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


def grey(values, mode="I;16", format="PNG"):
    buffer = io.BytesIO()
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.asarray(values, dtype)).save(buffer, format)
    return buffer.getvalue()


def test_16_bits_are_scaled():
    values = np.array([[0, 128, 129, 257, 32768, 65534, 65535]])
    for format in ("PNG", "TIFF"):
        image = run("decode", {"image": grey(values, format=format)})["image"]
        np.testing.assert_array_equal(image[..., 0], np.round(values / 257))
        assert image.shape == (1, 7, 3) and (image == image[..., :1]).all()
    for mode, what in (("F", "floats"), ("I", "integers of 32 bits")):
        with pytest.raises(BadExample, match=f"has {what}, whose range is unknown"):
            run("decode", {"image": grey(values, mode, "TIFF")})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["JPEG", "PNG"])
def test_the_cameras_orientation(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = picture(8, 16)
    data = encode(upright, mode, exif=exif)
    plain = run("decode", {"image": data})["image"]
    np.testing.assert_array_equal(plain, run("decode", {"image": encode(upright, mode)})["image"])
    turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (turned.shape == (16, 8, 3)) == (orientation >= 5)
    for string in ("decode(exif=True)", "decode | decode(exif=True)", "decode(exif=True) | decode(exif=True)"):
        np.testing.assert_array_equal(run(string, {"image": data})["image"], turned)


def test_pictures_of_a_stranger(monkeypatch):
    def png(width, height):
        chunk = lambda kind, body: (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
        start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    for width, height in ((20_000, 10_000), (1, 80_000_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(BadExample, match=r"more (pixels )?than decode\(max_pixels=67108864\)"):
            run("decode", {"image": png(width, height)})
    with pytest.raises(BadExample, match=r"has 9 x 8 pixels, more than decode\(max_pixels=71\)"):
        run("decode(max_pixels=71)", {"image": encode(picture(8, 9))})
    assert run("decode(max_pixels=72)", {"image": encode(picture(8, 9))})["image"].shape == (8, 9, 3)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):  # beyond Pillow's limit, of which the double is an error
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        with warnings.catch_warnings(action="error"):
            image = run("decode(max_pixels=72) | central_crop(8)", {"image": encode(picture(8, 9), format)})["image"]
        assert image.shape == (8, 8, 3) and Image.MAX_IMAGE_PIXELS == 72
    monkeypatch.undo()
    line = {"image": encode(picture(1, 30_000))}
    for string in ("resize_shortest(256)", "resize_shortest((256, 256))", "crop_to_content"):
        with pytest.raises(BadExample, match=r"image would have .* pixels, more than 67,108,864"):
            run(f"decode | {string}", line)
    assert run("decode | resize_longest(32)", line)["image"].shape == (1, 32, 3)
    with pytest.raises(BadExample, match="image would have"):
        run("decode | views('v', 1024, resize(512))", line)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for value, reason in (
        (postscript, "cannot identify"),
        (None, "image is null"),
        ("a.png", "image is a str"),
        (7, "is a int"),
    ):
        with pytest.raises(BadExample, match=reason) as error:
            run("decode | resize(8)", {"image": value})
        assert error.value.kind == "picture"
