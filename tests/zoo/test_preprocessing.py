"""Op strings from the files of Transformers and open_clip, against stored values of both (tests/parity makes them)."""

import json
import logging

import numpy as np
import pytest

from tests.support.paths import GOLDEN
from vlm_jax.data import ops
from vlm_jax.errors import UserError
from vlm_jax.zoo import op_strings, preprocessing

STORED = np.load(GOLDEN / "preprocessing.npz")
CONFIGS = {key.removesuffix("/config"): json.loads(str(STORED[key])) for key in STORED if key.endswith("/config")}
CLIP = {"image_processor_type": "CLIPImageProcessor"}


def read(config, folder, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(config))
    return preprocessing.from_transformers(folder)


def from_config(name, folder):
    return preprocessing.from_open_clip(CONFIGS[name]) if name.startswith("open_clip") else read(CONFIGS[name], folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_the_references(name, tmp_path):
    pipeline = ops.parse(from_config(name, tmp_path))
    for i in range(2):
        got = pipeline({"image": STORED[f"picture/{i}"]}, None)["image"]
        if isinstance(got, dict):
            np.testing.assert_array_equal(got["grid"], STORED[f"{name}/{i}/grid"])
            got = got["patches"]
        np.testing.assert_allclose(got, STORED[f"{name}/{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_reads_as_the_same_ops(name, tmp_path):
    string = from_config(name, tmp_path)
    if name.startswith("open_clip"):
        assert preprocessing.from_open_clip(json.loads(json.dumps(preprocessing.to_open_clip(string)))) == string
    else:
        assert read(preprocessing.to_transformers(string), tmp_path) == string


def test_released_files_give_these_strings(tmp_path):
    """Of openai/clip-vit-base-patch32 (2021), google/siglip-base-patch16-224, facebook/dinov2-base, SigLIP 2 NaFlex."""
    clip = dict(
        crop_size=224, do_center_crop=True, do_normalize=True, do_resize=True, size=224, resample=3,
        feature_extractor_type="CLIPFeatureExtractor", image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )  # fmt: skip
    crop = "decode | resize_shortest(224) | central_crop(224, rounding='down') | normalize('clip')"
    assert read(clip, tmp_path) == read(CLIP, tmp_path) == crop
    siglip = dict(
        do_normalize=True, do_rescale=True, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3,
        image_processor_type="SiglipImageProcessor", processor_class="SiglipProcessor",
        rescale_factor=0.00392156862745098, size={"height": 224, "width": 224},
    )  # fmt: skip
    assert read(siglip, tmp_path) == "decode | resize(224) | normalize"
    dino = dict(
        crop_size={"height": 224, "width": 224}, do_center_crop=True, do_convert_rgb=True, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_processor_type="BitImageProcessor", image_std=[0.229, 0.224, 0.225],
        size={"shortest_edge": 256},
    )  # fmt: skip
    expected = "decode | resize_shortest(256) | central_crop(224, rounding='down') | normalize('imagenet')"
    assert read(dino, tmp_path) == expected
    naflex = {"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16}
    packed = "decode | resize_to_patches(16, 256) | normalize | pack_patches(16, 256)"
    assert read(naflex, tmp_path) == packed


def test_the_processor_file_and_the_model_type_stand_in(tmp_path):
    nested = {"processor_class": "CLIPProcessor", "image_processor": CLIP | {"resample": 2}}
    assert "resize_shortest(224, method='bilinear')" in read(nested, tmp_path, "processor_config.json")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "processor_config.json").write_text('{"processor_class": "ViTProcessor"}')
    assert read({"size": 32}, tmp_path) == "decode | resize(32, method='bilinear') | normalize"


def test_a_nested_processor_counts_over_the_file_of_its_own(tmp_path):
    """As in Transformers 5, `image_processing_base.get_image_processor_dict`."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | {"resample": 3}))
    read({"image_processor": CLIP | {"resample": 2}}, tmp_path, "processor_config.json")
    assert "bilinear" in preprocessing.from_transformers(tmp_path)


def test_families():
    """Those that open_clip knows equal its settings; the others are written out."""
    for name in ("openai", "laion_half", "clipa", "mobileclip", "pe"):
        assert preprocessing.FAMILIES[name](24) == preprocessing.from_open_clip(CONFIGS[f"open_clip/{name}"])
    siglip = preprocessing.from_open_clip(CONFIGS["open_clip/siglip"])  # Transformers' has a white ground
    assert preprocessing.FAMILIES["siglip"](24) == siglip.replace("decode(alpha='drop')", "decode")
    expected = {
        "big_vision": "decode | resize(24, method='bilinear', antialias=False) | normalize",
        "imagenet": "decode | resize_shortest(27, method='bilinear') | central_crop(24) | normalize('imagenet')",
        "efficientnet_lite": "decode | resize_shortest(27) | central_crop(24) | normalize('efficientnet_lite')",
        "dinov2": "decode | resize_shortest(27) | central_crop(24) | normalize('imagenet')",
    }
    assert {name: preprocessing.FAMILIES[name](24) for name in expected} == expected
    assert preprocessing.FAMILIES["imagenet"](224).startswith("decode | resize_shortest(256, ")
    assert preprocessing.FAMILIES["siglip"]((32, 48)) == "decode | resize(32, 48) | normalize"
    assert preprocessing.FAMILIES["openai"]((32, 48)).startswith(
        "decode(alpha='drop') | resize_shortest((32, 48)) | central_crop(32, 48)"
    )
    image = STORED["picture/0"]
    for name, family in preprocessing.FAMILIES.items():
        out = ops.parse(family((20, 28)))({"image": image}, None)["image"]
        assert out.shape == (20, 28, 3) and out.dtype == np.float32, name
    lite = ops.parse(preprocessing.FAMILIES["efficientnet_lite"](24))(
        {"image": np.full((24, 24, 3), 255, np.uint8)}, None
    )
    np.testing.assert_allclose(lite["image"], 1.0, atol=1e-6)


def test_big_vision_resizes_without_antialiasing():
    """Against torch's interpolation, truncated; but where its value is a whole number up to rounding errors."""
    string = preprocessing.FAMILIES["big_vision"](24).removesuffix(" | normalize")
    for i in range(2):
        expected = STORED[f"big_vision/{i}"]
        got = ops.parse(string)({"image": STORED[f"picture/{i}"]}, None)["image"]
        sure = np.abs(expected - np.round(expected)) > 1e-3
        assert got.dtype == np.uint8 and sure.mean() > 0.8
        np.testing.assert_array_equal(got[sure], np.floor(expected[sure]))


def test_size_of_the_tower_counts_over_the_files():
    squashed = preprocessing.from_open_clip({"size": 224, "resize_mode": "squash"}, 336)
    assert squashed.startswith("decode(alpha='drop') | resize(336)")
    assert preprocessing.from_open_clip({"size": [224, 224]}) == preprocessing.from_open_clip({}, (224, 224))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "ConvNextImageProcessor"}, "is of class ConvNextImageProcessor; known are CLIP"),
        ({}, "is of class None"),
        (CLIP | {"crop_pct": 0.9}, "has crop_pct 0.9, which is not known here"),
        (CLIP | {"do_pad": True}, "has do_pad True"),
        (CLIP | {"rescale_factor": 1.0}, "multiplies pixels by 1.0 (rescale_factor); expected 1/255"),
        (CLIP | {"do_rescale": False}, "multiplies pixels by 1"),
        (CLIP | {"resample": 7}, "has resample 7"),
        (CLIP | {"size": {"longest_edge": 3}}, "has size {'longest_edge': 3}"),
        (CLIP | {"size": {"shortest_edge": "224"}}, "holds a wrong value: op `resize_shortest` was given size='224'"),
        (CLIP | {"do_center_crop": False}, "leaves pictures of different sizes"),
        (CLIP | {"image_mean": [0.5, 0.5]}, "are not numbers for three channels"),
        ({"image_processor_type": "Siglip2ImageProcessor", "do_resize": False}, "packed patches need it"),
        ([1], "does not hold the settings"),
    ],
)
def test_what_is_not_understood_says_so(config, message, tmp_path):
    with pytest.raises(UserError) as error:
        read(config, tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "preprocess=" in str(error.value) or "wrong value" in message


def test_missing_and_broken_files_say_so(tmp_path):
    with pytest.raises(UserError, match=r"has no preprocessor_config.json, .*; pass preprocess="):
        preprocessing.from_transformers(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        preprocessing.from_transformers(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"crop": 3}, "has the key `crop`"),
        ({"interpolation": "lanczos"}, "interpolation 'lanczos'; expected bicubic or bilinear"),
        ({"mode": "L"}, "has mode 'L'; expected RGB"),
        ({"resize_mode": "pad"}, "has resize_mode 'pad'"),
    ],
)
def test_open_clip_settings_that_are_not_understood_say_so(config, message):
    with pytest.raises(UserError) as error:
        preprocessing.from_open_clip(config)
    assert message in str(error.value) and "pass preprocess=" in str(error.value)


@pytest.mark.parametrize(
    ("string", "transformers", "open_clip"),
    [
        ("decode | resize(8, method='bilinear', antialias=False) | normalize", *["resize(antialias=False)"] * 2),
        ("decode | resize_longest(8) | pad(8) | normalize", "pad has no equivalent in Transformers", None),
        ("decode | resize(8) | flip | normalize", "flip has no", "flip has no"),
        ("decode | normalize | resize(8)", "the order of the ops", "the order of the ops"),
        ("decode(background=0) | resize(8) | normalize", *["decode(background=...)"] * 2),
        ("decode | resize_shortest((8, 9)) | central_crop(8, 9) | normalize", "resize_shortest has no", None),
        (
            "decode | resize_shortest(9) | central_crop(8) | normalize",
            None,
            "to another size than that of central_crop",
        ),
        ("decode | resize(8, method='lanczos') | normalize", None, "resize(method='lanczos')"),
        ("decode | central_crop(8) | normalize", None, "central_crop has no"),
        ("decode | resize_to_patches(4, 9) | normalize | pack_patches(4, 8)", "pack_patches has no", "pack_patches"),
        ("decode | resize_to_patches(4, 9) | normalize | pack_patches(4, 9)", None, "pack_patches"),
    ],
)
def test_ops_without_an_equivalent_say_so(string, transformers, open_clip):
    for write, message in ((preprocessing.to_transformers, transformers), (preprocessing.to_open_clip, open_clip)):
        if message is None:
            write(string)
            continue
        with pytest.raises(UserError) as error:
            write(string)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_crop_that_may_shift_by_a_pixel_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        settings = preprocessing.to_transformers(preprocessing.FAMILIES["openai"](224))
    assert settings["size"] == {"shortest_edge": 224} and settings["crop_size"] == {"height": 224, "width": 224}
    assert "rounds odd margins down" in caplog.text


@pytest.mark.parametrize("family", preprocessing.FAMILIES)
@pytest.mark.parametrize("size", [336, (256, 128)])
def test_another_size(family, size):
    """The op string of a family at one size becomes that of the family at another."""
    assert op_strings.resized(preprocessing.FAMILIES[family](224), size) == preprocessing.FAMILIES[family](size)


def test_sizes_in_other_strings():
    assert op_strings.resized("decode | resize(32) | cache | flip | normalize", 64) == (
        "decode | resize(64) | cache | flip | normalize"
    )
    given = "decode(exif=True) | crop_to_content | random_resized_crop(32) | normalize('clip')"
    assert op_strings.resized(given, 64) == given.replace("32", "64")
    for first in ("decode(exif=True)", "decode(max_pixels=9)", "decode(0, max_pixels=9)"):
        assert op_strings.resized(f"{first} | resize(32, antialias=False)", 64) == (
            f"{first} | resize(64, antialias=False)"
        )
    for string in ("decode | normalize", "decode | resize_to_patches(16, 256) | normalize | pack_patches(16, 256)"):
        assert op_strings.augmented(string) == string
        with pytest.raises(UserError, match=r"has no size that can follow image_size=64; pass preprocess= as well"):
            op_strings.resized(string, 64)
    clip = preprocessing.FAMILIES["openai"](224)
    assert op_strings.augmented(clip) == "decode(alpha='drop') | random_resized_crop(224) | normalize('clip')"
