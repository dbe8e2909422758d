"""Pictures and texts in every form that people hold."""

import io
import logging
import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from vlm_jax.errors import UserError
from vlm_jax.evaluate import evaluate
from vlm_jax.pretrained import inputs

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
CLOSED = io.BytesIO()
CLOSED.close()


def encoded(image=PIXELS):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def pixels(picture):
    if isinstance(picture, bytes):
        picture = Image.open(io.BytesIO(picture))
    return np.asarray(picture)


@pytest.mark.parametrize(
    "given",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.int64),
        PIXELS / 255,
        np.float32(PIXELS) / 255,
        PIXELS.astype(float),
        jnp.asarray(PIXELS),
        PIXELS[None],
        [PIXELS],
        (x for x in (PIXELS,)),
        encoded(),
        bytearray(encoded()),
        io.BytesIO(encoded()),
        Image.fromarray(PIXELS),
    ],
)
def test_one_picture(given):
    (read,) = inputs.pictures(given)
    np.testing.assert_array_equal(pixels(read), PIXELS)


def test_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded())
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), "~/a.png"):
        np.testing.assert_array_equal(pixels(*inputs.pictures(path)), PIXELS)


def test_grey_and_transparent():
    assert np.all(inputs.pictures(jnp.ones((5, 7, 3), jnp.bfloat16))[0] == 255)
    grey, rgba = PIXELS[..., 0], np.concatenate([PIXELS, PIXELS[..., :1]], axis=2)
    for given in (grey, grey[..., None], grey[None]):
        (read,) = inputs.pictures(given)
        assert read.mode == "L" and np.array_equal(read, grey)
    (read,) = inputs.pictures(rgba)
    assert read.mode == "RGBA" and np.array_equal(read, rgba)
    (read,) = inputs.pictures(grey > 100)
    assert np.array_equal(read, 255 * (grey > 100))


def test_floats_of_one_call_have_one_scale(caplog):
    dark = np.full((5, 7, 3), 0.4)
    assert pixels(*inputs.pictures(dark))[0, 0, 0] == 102
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert [int(x[0, 0, 0]) for x in inputs.pictures([dark, dark * 100])] == [0, 40]
    assert "floats are taken to be from 0 to 255" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "the pictures are None; expected a PIL image, a path"),
        (3.5, r"the pictures are 3\.5; expected"),
        ({"image": PIXELS}, "the pictures are of type dict"),
        ([PIXELS, None], "picture 1 of 2 is None"),
        ([3], "picture 0 of 1 is 3; expected"),
        ("https://a.b/c.png", "is the URL https://a.b/c.png; download it first"),
        ("no.png", "picture 0 of 1 cannot be read: no.png: No such file"),
        ("a\0b", "cannot be read: a\0b: embedded null byte"),
        (os.path.dirname(__file__), "^picture 0 of 1 is no file"),
        ("", "^picture 0 of 1 is no file"),
        (CLOSED, "picture 0 of 1 is a file that cannot be read: .* closed file"),
        (io.StringIO("x"), "is a file opened as text; open it with mode 'rb'"),
        (
            np.float32(PIXELS) / 127.5 - 1,
            "has values from -1 to .*; give uint8, uint16 or floats from 0",
        ),
        (PIXELS.astype(int) * 300, "has values from 0 to [0-9]*; give uint8"),
        (np.full((5, 7, 3), np.nan), "has values that are not finite"),
        (np.zeros((3, 9, 3)), r"is an array \[3, 9, 3\], which may be \[H, W, C\] or \[C, H, W\]"),
        (np.zeros((5, 5, 7)), r"is an array \[5, 5, 7\]; expected 1, 3 or 4 channels, first or last"),
        (np.zeros((0, 5, 3)), r"is an array float64 \[0, 5, 3\]"),
        (np.zeros((2, 1, 5, 5, 3)), r"picture 0 of 2 is an array float64 \[1, 5, 5, 3\]"),
        (np.array([["a"]]), "is an array <U1"),
    ],
)
def test_no_picture(given, message):
    with pytest.raises(UserError, match=message) as error:
        inputs.pictures(given)
    assert "\n" not in str(error.value)


def test_texts():
    assert inputs.texts("a dog") == ["a dog"]
    assert inputs.texts(name for name in ("a", "b")) == inputs.texts(np.array(["a", "b"])) == ["a", "b"]
    for given, message in (
        (None, "the texts are None; expected a str or a list"),
        (["a", None], "text 1 of 2 is None; expected a str"),
        (b"a", "text 0 of 1 is of type bytes"),
        ({"a": 1}, "the texts are of type dict"),
    ):
        with pytest.raises(UserError, match=message):
            inputs.texts(given)


@pytest.mark.parametrize("given", ["a.png", ["a.png"], Image.fromarray(PIXELS), encoded(), None, 3, [PIXELS], []])
def test_methods_of_batches_name_those_of_pictures(given):
    clip = vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")
    for run, other in (
        (clip.embed_image_batch, "embed_images"),
        (clip.image_feature_batch, "image_features"),
        (lambda images: clip.class_logits(images, ["cat"]), "classify"),
        (lambda images: clip.class_logits(images=images), "classify"),
        (lambda images: clip.caption_logits(images, ["cat"]), "logits"),
        (lambda images: clip.caption_batch(images), "caption"),
        (lambda images: clip.score_batch(images, ["cat"]), "score"),
    ):
        with pytest.raises(UserError, match=rf"takes preprocessed arrays .* the pictures are .* go to `{other}`"):
            run(given)


def test_the_model_as_people_meet_it():
    """Three lines of repr, equality, names of labels."""
    spec = "pkg:vlm_jax/zoo/clip_tiny"
    large = vlm_jax.load(spec, image_size=64, resample="bicubic", dtype=jnp.bfloat16)
    assert large.preprocess == "decode(exif=True) | crop_to_content | resize(64) | normalize"
    assert large.model.image.dtype == "bfloat16"
    clip = vlm_jax.load(spec)
    about = repr(clip).splitlines()
    assert len(about) == 3 and about[0].startswith("Pretrained TwoTower, 1,283,969 parameters on one device")
    assert about[2] == "  can embed_images, embed_texts, logits, classify"
    assert clip == clip and len({clip, clip}) == 1
    np.testing.assert_array_equal(clip.classify(PIXELS, ["cat", "dog"], "{}"), clip.classify(PIXELS, ["cat", "dog"]))
    assert clip.classify(PIXELS, "cifar10").shape == (1, 10)
    assert clip.classify(PIXELS, ["cat", "dog"], "imagenet7").shape == (1, 2)
    for templates in ([3], []):
        with pytest.raises(UserError, match="template"):
            clip.classify(PIXELS, ["cat"], templates)
    with pytest.raises(UserError, match="layers should be numbers of blocks"):
        clip.features(PIXELS, layers=[0.5])
    for mistake, message in (
        (lambda: vlm_jax.load(None), "the model is None; expected a path, hf:org/name"),
        (lambda: vlm_jax.load(""), "the model is ''"),
        (lambda: vlm_jax.load("a", imagesize=64), r"`load`: .* `imagesize`; did you mean `image_size`\?"),
        (lambda: clip.classify(PIXELS, lables=["cat"]), r"`classify`: .* `lables`; did you mean `labels`\?"),
        (
            lambda: vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny", preprocess="opnai"),
            "preprocess= is none of openai, .* `opnai`",
        ),
        (lambda: vlm_jax.load_adapter(clip, "a.safetensors"), r"takes \(file, model\); got \(Pretrained, str\)"),
        (lambda: vlm_jax.save_pretrained("a", clip), r"takes \(model, path\); got \(str, Pretrained\)"),
        (lambda: vlm_jax.save_pretrained(clip, f"{__file__}/a"), r"test_inputs\.py/a cannot be written \(Not a dir"),
        (lambda: evaluate("runs/demo", "zeroshot", uri="a"), r"load it first: vlm_jax\.load\('runs/demo'\)"),
    ):
        with pytest.raises(UserError, match=message):
            mistake()
    with pytest.raises(UserError, match=r"labels is the str `cat`; give a list: \['cat', ...\]"):
        clip.classify(PIXELS, "cat")
    assert {"load", "load_adapter", "save_pretrained", "Pretrained"} <= {*dir(vlm_jax)}
    with pytest.raises(AttributeError, match="no attribute `laod`; did you mean `load`"):
        _ = vlm_jax.laod
    with pytest.raises(
        UserError, match="no file or folder openai/clip-vit; for the Hugging Face hub, write hf:openai/c"
    ):
        vlm_jax.load("openai/clip-vit")
