"""Plain Vision Transformers of timm at random init, small: the same outputs, from a folder and from bare weights."""

import importlib
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vlm_jax
from tests.support.make_references import randomised
from tests.support.torch_parity import close
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize

SMALL = {  # timm's name: width, side
    "vit_tiny_patch16_224": (48, 32),
    "vit_base_patch16_clip_quickgelu_224": (96, 48),
    "vit_so400m_patch14_siglip_224": (64, 42),
    "vit_base_patch16_siglip_gap_224": (96, 32),
    "vit_medium_patch16_gap_240": (64, 32),
    "vit_small_patch14_dinov2": (48, 42),
    "vit_small_patch14_reg4_dinov2": (48, 42),
    "deit_small_patch16_224": (48, 32),
    "deit3_small_patch16_224": (48, 32),
}


@pytest.fixture(scope="module")
def timm(torchvision):
    return importlib.import_module("timm")


@pytest.mark.parametrize("name", SMALL)
def test_the_same_outputs(name, timm, tmp_path):
    width, side = SMALL[name]
    model = timm.create_model(name, img_size=side, embed_dim=width, depth=2).eval()
    model = randomised(model).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = dict(architecture=name, num_classes=model.num_classes, num_features=width, global_pool=model.global_pool)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(pretrained_cfg=model.pretrained_cfg)))
    released = recognize.understand(tmp_path)
    assert (
        f"central_crop({model.pretrained_cfg['input_size'][1]}" in released.preprocess
        or "resize(" in released.preprocess
    )
    images = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        tokens, pooled = model.forward_features(pixels).numpy(), model(pixels).numpy()
    for spec in (tmp_path, f"timm:{name}.some_tag:{tmp_path / 'model.safetensors'}"):
        ours = vlm_jax.load(spec)
        out = jax.jit(ours.model.image.apply)({"params": ours.params["image"]}, images)
        close(out.pooled, pooled)
        close(out.tokens, tokens)
    assert ours.preprocess is None


@pytest.mark.parametrize("name", ["vit_base_patch16_rpn_224", "vit_giant_patch14_dinov2", "vit_base_patch16_rope_224"])
def test_what_is_not_read_is_named(name, timm, tmp_path):
    model = timm.create_model(name, img_size=28 if "patch14" in name else 32, embed_dim=96, depth=1)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"timm's `{name}` is not read|fc_norm"):
        vlm_jax.load(f"timm:{name}:{tmp_path / 'a.safetensors'}")


def test_preprocessing_is_theirs(timm, tmp_path):
    """Of pictures, by timm's own evaluation transform."""
    from PIL import Image

    from vlm_jax.data import ops
    from vlm_jax.zoo import preprocessing

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 83, 3), np.uint8)).resize((166, 114))
    for cfg in (
        dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3),
        dict(input_size=(3, 32, 48), interpolation="bilinear", crop_pct=0.875, mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
        dict(
            input_size=(3, 32, 32),
            interpolation="bicubic",
            crop_pct=1.0,
            crop_mode="squash",
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        ),
    ):
        theirs = timm.data.create_transform(**{"crop_mode": "center"} | cfg, is_training=False)(picture)
        string = preprocessing.from_timm(json.loads(json.dumps(cfg)))
        ours = ops.parse(string, None)({"image": picture}, np.random.default_rng(0))["image"]
        assert np.abs(ours - theirs.permute(1, 2, 0).numpy()).max() < 2 / 255 / min(cfg["std"]), string
