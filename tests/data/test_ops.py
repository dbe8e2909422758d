"""Op strings and the ops themselves."""

import io

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import examples, image_ops, ops
from vlm_jax.data.registry import BadExample, op
from vlm_jax.errors import UserError


def picture(height=48, width=64, seed=0):
    """A smooth random uint8 picture [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(array, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def run(string, record, seed=0, tokenizer=None):
    return ops.parse(string, tokenizer)(record, np.random.default_rng(seed))


class CountingTokenizer:
    """Token = number of letters of each word."""

    def __call__(self, texts, length, bos=True, eos=True):
        ids = np.zeros((len(texts), length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            lengths = [*([98] if bos else []), *map(len, text.split()), *([99] if eos else [])][:length]
            row[: len(lengths)] = lengths
        return ids


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("decode | flipp", "there is no op `flipp`; did you mean `flip`?"),
        ("resize", "op `resize`: missing a required argument: 'height'; usage: resize(height"),
        ("resize(32, method='cubic')", "op `resize` was given method='cubic'"),
        ("resize('32')", "op `resize` was given height='32'"),
        ("resize(32, hight=3)", "got an unexpected keyword argument 'hight'"),
        ("random_resized_crop(32, scale=0.5)", "was given scale=0.5"),
        ("resize(os.name)", "not a literal"),
        ("resize(32) flip", "is not ops joined by `|`"),
        ("__import__('os').system('true')", "expected an op such as"),
        ("flip | cache", "op `flip` is random and stands before `cache`"),
        ("cache | cache", "has `cache` 2 times"),
        ("tokenize(8)", "needs a tokenizer"),
        ("normalize('clap')", "was given mean='clap'"),
    ],
)
def test_a_wrong_op_string_is_one_clear_line(string, message):
    with pytest.raises(UserError) as error:
        ops.parse(string)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos", "area", "hamming"])
def test_resize_equals_pil(method):
    image = picture()
    resampling = image_ops.METHODS[method]
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
    batch = examples.collate([{"image": packed, "label": 1}, {"image": packed, "label": 2}])
    assert batch["image"]["patches"].shape == (2, 8, 48) and batch["image"]["grid"].tolist() == [[2, 3]] * 2
    with pytest.raises(UserError, match="`patches` has shapes"):
        examples.collate([{"image": packed}, {"image": packed | {"patches": np.zeros((3, 48))}}])


def test_normalize():
    image = picture()
    record = {"image": image}
    np.testing.assert_allclose(run("normalize", record)["image"], image / 127.5 - 1, atol=1e-6)
    mean, std = image_ops.STATISTICS["clip"]
    expected = (image / 255 - np.array(mean)) / np.array(std)
    for string in ("normalize('clip')", f"normalize({mean}, {std})"):
        np.testing.assert_allclose(run(string, record)["image"], expected, atol=1e-6)
    assert run("to_float", record)["image"].dtype == np.float32
    np.testing.assert_allclose(run("to_float", record)["image"], image / 255, atol=1e-7)
    with pytest.raises(UserError, match="was given an image of float32"):
        run("to_float | normalize", record)


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
        left, top, right, bottom = image_ops._random_box(
            60, 80, np.random.default_rng(seed), (0.3, 1.0), (3 / 4, 4 / 3)
        )
        assert 0 <= left < right <= 80 and 0 <= top < bottom <= 60
        assert 0.29 <= (right - left) * (bottom - top) / 4800 <= 1.0
        assert 0.72 <= (right - left) / (bottom - top) <= 1.37
        expected = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        got = image_ops.random_resized_crop(image, rng, 24, scale=(0.3, 1.0))
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


def test_captions():
    record = {"name": {"en": " red apple "}, "keywords": {"en": ["fruit", "", "red"]}, "none": "  "}
    assert run('caption("name/en")', record)["text"] == "red apple"
    assert run('caption("keywords/en", join=", ")', record)["text"] == "fruit, red"
    drawn = {run('random_caption("name/en", "keywords/en")', record, seed)["text"] for seed in range(30)}
    assert drawn == {"red apple", "fruit", "red"}
    only = {run('random_caption("name/en", "keywords/en", weights=(1, 0))', record, seed)["text"] for seed in range(9)}
    assert only == {"red apple"}
    joined = {run('random_caption("keywords/en", join=" ")', record, seed)["text"] for seed in range(9)}
    assert joined == {"fruit red", "red fruit"}
    assert run('random_caption("none", "name/fr", "name/en")', record)["text"] == "red apple"
    with pytest.raises(BadExample, match="caption `none` is empty"):
        run('caption("none")', record)
    with pytest.raises(BadExample, match=r"has no field `name/fr` \(there: en\)"):
        run('caption("name/fr")', record)
    assert run("canonicalize", {"text": " A_photo:  of\tÉ-mail’s!"})["text"] == "aphoto of émail’s"
    assert run("canonicalize(lower=False)", {"text": "It's A."})["text"] == "Its A"
    text = run('caption("name/en") | template("A photo of a {}.") | lower', record)["text"]
    assert text == "a photo of a red apple."


def test_tokenize_keep_rename():
    record = {"text": "one three", "concept": 4, "name": {"en": "x"}, "image": picture()}
    tokenizer = CountingTokenizer()
    out = run(
        'tokenize(6) | keep("token_ids", "concept", "name/en") | rename("concept", "label")', record, 0, tokenizer
    )
    np.testing.assert_array_equal(out["token_ids"], [98, 3, 5, 99, 0, 0])
    assert {k: v for k, v in out.items() if k != "token_ids"} == {"label": 4, "en": "x"}
    bare = run("tokenize(3, bos=False, eos=False)", record, 0, tokenizer)
    np.testing.assert_array_equal(bare["token_ids"], [3, 5, 0])
    with pytest.raises(BadExample, match="is empty"):
        run("tokenize(3)", {"text": " "}, 0, tokenizer)


def test_cache_splits_the_pipeline_and_leaves_what_it_holds_alone():
    pipeline = ops.parse("decode | resize(8) | cache | flip(1.0) | normalize")
    prepared = pipeline.prepare({"image": encode(picture()), "label": 3})
    assert prepared["image"].dtype == np.uint8 and prepared["image"].shape == (8, 8, 3)
    before = prepared["image"].copy()
    out = pipeline.finish(prepared, np.random.default_rng(0))
    np.testing.assert_array_equal(prepared["image"], before)
    np.testing.assert_allclose(out["image"], before[:, ::-1] / 127.5 - 1, atol=1e-6)
    assert pipeline.paths is None
    assert ops.parse('caption("name/en") | keep("text", "concept")').paths >= {"name/en", "image", "concept"}


def test_an_op_of_ones_own():
    @op
    def invert(image: object, strength: int = 255) -> np.ndarray:
        return strength - image

    try:
        np.testing.assert_array_equal(run("invert", {"image": picture()})["image"], 255 - picture())
    finally:
        del ops.OPS["invert"]
    with pytest.raises(BadExample, match="has no field `image`, which `flip` needs"):
        run("flip", {"text": "x"})


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
