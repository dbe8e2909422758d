"""Op strings against the image processors of Transformers and open_clip, live.

python -m tests.parity.test_preprocessing     # writes tests/golden/preprocessing.npz, which `make test` compares with
"""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.support.paths import GOLDEN
from vlm_jax.data import ops
from vlm_jax.data.ops.image import STATISTICS
from vlm_jax.zoo import preprocessing

HALF, IMAGENET = [0.5] * 3, [list(v) for v in STATISTICS["imagenet"]]
CLIP = [list(v) for v in STATISTICS["clip"]]
# What is in `preprocessor_config.json`: as written today, and in older spellings.
TRANSFORMERS = {
    "CLIP": dict(image_processor_type="CLIPImageProcessor", size={"shortest_edge": 24}, crop_size=24),
    "CLIP_old": dict(
        feature_extractor_type="CLIPFeatureExtractor", size=24, crop_size=24, do_resize=True, do_center_crop=True,
        do_normalize=True, image_mean=CLIP[0], image_std=CLIP[1], resample=3,
    ),
    "CLIP_nearest": dict(
        image_processor_type="CLIPImageProcessorFast", size={"shortest_edge": 29}, resample=0,
        crop_size={"height": 24, "width": 27}, rescale_factor=0.00392156862745098, do_rescale=True,
    ),
    "CLIP_larger_crop": dict(
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": 20}, crop_size=27, resample=4
    ),
    "Siglip": dict(
        image_processor_type="SiglipImageProcessor", size={"height": 24, "width": 24}, do_rescale=True, resample=3,
        processor_class="SiglipProcessor", image_mean=HALF, image_std=HALF, do_convert_rgb=None,
    ),
    "Siglip_old": dict(
        image_processor_type="SiglipImageProcessor", size={"height": 24, "width": 24}, do_normalize=False, resample=1
    ),
    "ViT": dict(image_processor_type="ViTImageProcessor", size=24),
    "ViT_hamming": dict(
        image_processor_type="ViTFeatureExtractor", size={"height": 24, "width": 30}, resample=5,
        image_std=[0.4, 0.5, 1],
    ),
    "Bit": dict(
        image_processor_type="BitImageProcessor", size={"shortest_edge": 27}, crop_size={"height": 24, "width": 24},
        image_mean=IMAGENET[0], image_std=IMAGENET[1], resample=3, do_center_crop=True,
    ),
    "Siglip2": dict(image_processor_type="Siglip2ImageProcessor", patch_size=4, max_num_patches=36),
}  # fmt: skip
OPEN_CLIP = {
    "openai": dict(size=24),
    "laion_half": dict(size=24, mean=HALF, std=HALF, interpolation="bicubic", resize_mode="shortest"),
    "siglip": dict(size=24, mean=HALF, std=HALF, resize_mode="squash"),
    "clipa": dict(size=24, mean=IMAGENET[0], std=IMAGENET[1], interpolation="bilinear", resize_mode="squash"),
    "mobileclip": dict(size=24, mean=[0, 0, 0], std=[1, 1, 1], interpolation="bilinear", resize_mode="shortest"),
    "pe": dict(size=24, mean=HALF, std=HALF, interpolation="bilinear", resize_mode="squash"),
    "longest": dict(size=24, interpolation="bicubic", resize_mode="longest", fill_color=127),
    "longest_high": dict(size=[30, 21], interpolation="bilinear", resize_mode="longest"),
    "wide": dict(size=[20, 30], interpolation="bilinear", resize_mode="shortest"),
    "wide_squash": dict(size=[20, 30], mean=0.25, std=0.75, resize_mode="squash"),
}


def pictures():
    """uint8 [37, 53, 3] and [64, 48, 3]: noise over gradients."""
    rng = np.random.default_rng(0)
    for height, width in ((37, 53), (64, 48)):
        small = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
        smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        yield np.clip(smooth + rng.integers(-40, 40, smooth.shape), 0, 255).astype(np.uint8)


def transformers_processor(config, backend="pil"):
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    name = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor") + ("Pil" if backend == "pil" else "")
    return getattr(transformers, name)(**{k: v for k, v in config.items() if not k.endswith("_type")})


def transformers_values(config, image, backend="pil"):
    """[H, W, 3], or dict(patches, grid)."""
    batch = transformers_processor(config, backend=backend)(Image.fromarray(image), return_tensors="np")
    if "spatial_shapes" in batch:
        return {"patches": np.asarray(batch["pixel_values"][0]), "grid": np.asarray(batch["spatial_shapes"][0])}
    return np.asarray(batch["pixel_values"][0]).transpose(1, 2, 0)


def open_clip_values(open_clip, config, image):
    size = tuple(config["size"]) if isinstance(config["size"], list) else config["size"]
    cfg = open_clip.transform.PreprocessCfg(**config | {"size": size})
    return (
        open_clip.transform.image_transform_v2(cfg, is_train=False)(Image.fromarray(image)).numpy().transpose(1, 2, 0)
    )


def op_string(config, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return preprocessing.from_transformers(folder)


def run(string, image):
    return ops.parse(string)({"image": image}, None)["image"]


def compare(got, expected, atol=1e-6):
    if isinstance(expected, dict):
        np.testing.assert_array_equal(got["grid"], expected["grid"])
        got, expected = got["patches"], expected["patches"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def grid_of_sizes():
    """Odd and even margins, portrait and landscape, smaller than the model's input and larger."""
    rng = np.random.default_rng(1)
    for height, width in ((37, 53), (53, 38), (24, 24), (25, 24), (9, 31), (100, 41), (1, 70), (64, 64), (63, 95)):
        yield rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_pixels_are_those_of_transformers(name, tmp_path):
    string = op_string(TRANSFORMERS[name], tmp_path)
    for image in (*pictures(), *grid_of_sizes()):
        compare(run(string, image), transformers_values(TRANSFORMERS[name], image))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_reads_what_is_written(name, tmp_path):
    """What we write, what Transformers reads of it and writes again, all give the same op string and pixels."""
    string = op_string(TRANSFORMERS[name], tmp_path)
    written = preprocessing.to_transformers(string)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    assert preprocessing.from_transformers(tmp_path) == string
    read = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    read.save_pretrained(tmp_path / "again")
    assert preprocessing.from_transformers(tmp_path / "again") == string
    for image in pictures():
        compare(run(string, image), transformers_values(written, image))


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "ViT", "Bit", "Siglip2"])
def test_torchvision_classes_differ_by_two_levels_at_most(torchvision, name, tmp_path):
    config = TRANSFORMERS[name] | {"do_normalize": False}
    string = op_string(config, tmp_path)
    for image in pictures():
        got, expected = run(string, image), transformers_values(config, image, "torchvision")
        if isinstance(got, dict):
            got, expected = got["patches"], expected["patches"]
        levels = 255 * np.abs(got - expected)
        assert levels.max() < 2.01 and levels.mean() < 0.2


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_pixels_are_those_of_open_clip(open_clip, name):
    string = preprocessing.from_open_clip(OPEN_CLIP[name])
    for image in (*pictures(), *grid_of_sizes()):
        if name.startswith("longest") and image.shape[0] == 1:
            continue  # open_clip fails on a side that rounds to 0; here it is 1
        compare(run(string, image), open_clip_values(open_clip, OPEN_CLIP[name], image))
    written = preprocessing.to_open_clip(string)
    assert preprocessing.from_open_clip(json.loads(json.dumps(written))) == string
    compare(run(string, image), open_clip_values(open_clip, written, image))
    if name in preprocessing.FAMILIES:
        family = preprocessing.FAMILIES[name](24)
        assert family == string.replace("decode(alpha='drop')", "decode") if name == "siglip" else family == string


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb_as_in_transformers(mode, tmp_path):
    image = next(pictures())
    if mode in ("RGBA", "LA"):
        picture = Image.fromarray(np.concatenate((image, image[::-1, ::-1, :1]), -1)).convert(mode)
    else:
        picture = Image.fromarray(image).convert(mode)
    config = TRANSFORMERS["CLIP"]
    expected = transformers_processor(config)(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    compare(run(op_string(config, tmp_path), picture), expected)


def test_sixteen_bits_are_scaled_to_what_transformers_makes_of_eight(tmp_path):
    """Transformers itself clips them at 255: most pictures are white."""
    grey = next(pictures())[..., 0]
    config = TRANSFORMERS["CLIP"]
    processor = transformers_processor(config)
    expected = processor(Image.fromarray(grey), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    compare(run(op_string(config, tmp_path), Image.fromarray(grey.astype(np.uint16) * 257)), expected)


def test_bilinear_without_antialiasing_is_torchs():
    """Equal after truncation, but where torch's value is a whole number up to rounding errors."""
    for image in (*pictures(), *grid_of_sizes()):
        for size in ((24, 24), (80, 33), (7, 120)):
            x = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None]
            expected = torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False, antialias=False)
            expected = expected[0].numpy().transpose(1, 2, 0)
            got = run(f"resize({size[0]}, {size[1]}, method='bilinear', antialias=False)", image)
            sure = np.abs(expected - np.round(expected)) > 1e-3
            np.testing.assert_array_equal(got[sure], expected.astype(np.uint8)[sure])
            assert np.abs(got - expected).max() < 1.001


def golden(open_clip):
    """What tests/golden/preprocessing.npz holds: pictures, configs as JSON, values of the reference."""
    images = list(pictures())
    arrays = {f"picture/{i}": image for i, image in enumerate(images)}
    open_clips = functools.partial(open_clip_values, open_clip)
    kinds = {"transformers": (TRANSFORMERS, transformers_values), "open_clip": (OPEN_CLIP, open_clips)}
    for kind, (configs, values) in kinds.items():
        for name, config in configs.items():
            arrays[f"{kind}/{name}/config"] = np.array(json.dumps(config))
            for i, image in enumerate(images):
                result = values(config, image)
                if isinstance(result, dict):
                    arrays[f"{kind}/{name}/{i}/grid"] = result["grid"].astype(np.int32)
                    result = result["patches"]
                arrays[f"{kind}/{name}/{i}"] = result.astype(np.float32)
    for i, image in enumerate(images):
        x = torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32))[None]
        x = torch.nn.functional.interpolate(x, (24, 24), mode="bilinear", align_corners=False, antialias=False)
        arrays[f"big_vision/{i}"] = x[0].numpy().transpose(1, 2, 0)
    return arrays


def test_golden_file_is_what_the_references_give(open_clip):
    stored, made = np.load(GOLDEN / "preprocessing.npz"), golden(open_clip)
    assert set(stored) == set(made)
    for key, value in made.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(stored[key], value, rtol=0, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(stored[key], value, err_msg=key)


if __name__ == "__main__":
    import open_clip.transform

    np.savez_compressed(GOLDEN / "preprocessing.npz", **golden(open_clip))
    print(f"{(GOLDEN / 'preprocessing.npz').stat().st_size} bytes")
