"""Bare weights whose model the spec names: `open_clip:ViT-B-32:weights.safetensors`."""

import json
import math
import re

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.zoo import hub, key_map, preprocessing, recognize
from vlm_jax.zoo.formats import open_clip
from vlm_jax.zoo.readers.tensors import write_safetensors
from vlm_jax.zoo.shapes import param_shapes

TEXT = dict(width=384, depth=12, heads=6, mlp_dim=1536, vocab_size=49_408, length=77, causal=True, pool="argmax")
IMAGE = dict(width=384, depth=12, heads=6, mlp_dim=1536, patch=32, image_size=224, pool="tok", cls=True)
IMAGE |= dict(cls_position=True, pre_norm=True, patch_bias=False)
SIZES = dict(image=IMAGE | dict(out_dim=384, head_bias=False), text=TEXT | dict(out_dim=384, head_bias=False))


def write(path, section=SIZES):
    """A file with the names and shapes of open_clip's tensors, and holes for values."""
    shapes = param_shapes(dict(name="two_tower", bias_init=None, **section))
    entries = open_clip._entries(section, open_clip.IMAGE, "")
    header, end = {}, 0
    for entry in entries:
        if (shape := key_map.array_shape(entry.ours, shapes)) is not None and entry.theirs not in header:
            begin, end = end, end + 2 * math.prod(entry.their_shape(shape))
            header[entry.theirs] = dict(dtype="F16", shape=entry.their_shape(shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("open_clip") / "epoch_3.safetensors"
    write(path)
    return path


def test_a_name_tells_what_the_tensors_do_not(weights):
    released = recognize.of_spec(f"open_clip:ViT-S-32:{weights}")
    released.match()
    assert released.model["image"]["activation"] == released.model["text"]["activation"] == "gelu"
    assert (released.tokenizer, released.tokenize) == ("clip", "tokenize(77)")
    model = models.build(released.model)
    assert (model.image.heads, model.text.heads, model.image.depth) == (6, 6, 12)
    loaded = vlm_jax.load(f"open_clip:ViT-S-32:{weights}")
    assert jax.tree.leaves(loaded.params) and loaded.preprocess is None
    with pytest.raises(
        UserError, match="a name of open_clip does not tell how pictures were prepared: pass preprocess="
    ):
        loaded.embed_images(b"")


def test_a_folder_with_the_weights_alone(weights):
    weights.with_name("open_clip_model.safetensors").symlink_to(weights)
    assert recognize.of_spec(f"open_clip:ViT-S-32:{weights.parent}").tokenizer == "clip"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("open_clip:ViT-S-16:{}", "the weights are no ViT-S-16: its vision_cfg.patch_size is 16, theirs 32"),
        ("open_clip:ViT-B-32:{}", "the weights are no ViT-B-32: its embed_dim is 512, theirs 384"),
        ("open_clip:ViT-S-33:{}", "no config of open_clip that loads has the name `ViT-S-33`; did you mean"),
        ("open_clip:ViTamin-S:{}", "that loads has the name `ViTamin-S`"),
        ("open_clip:{}", "expected open_clip:NAME:PATH, such as open_clip:ViT-B-32:weights.pt"),
        ("open_clip:ViT-S-32:/nowhere", "there is no file or folder /nowhere"),
        ("open_clip:ViT-S-32:/", "/ has no weights; looked for open_clip_model.safetensors"),
    ],
)
def test_wrong_names_say_so(weights, spec, expected):
    with pytest.raises(UserError, match=expected):
        recognize.of_spec(spec.format(weights))


def timm_shapes(width=48, cls=True, registers=0, norm="norm"):
    """Shapes of a Vision Transformer of timm with one block, for pictures of 32 px."""
    block = {"norm1": 1, "norm2": 1, "attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    shapes = {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, 4 + (cls and not registers), width)} | ({"cls_token": (1, 1, width)} if cls else {})
    shapes |= {"reg_token": (1, registers, width)} if registers else {}
    for name, size in block.items():
        wide = (width,) if size == 1 else tuple(width * n for n in size)
        shapes |= {f"blocks.0.{name}.weight": wide, f"blocks.0.{name}.bias": wide[:1]}
    return shapes | {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}


def timm_folder(folder, shapes, **config):
    write_safetensors(
        folder / "model.safetensors", {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TIMM = dict(input_size=[3, 32, 32], interpolation="bicubic", crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3)


def test_timm(tmp_path):
    folder = timm_folder(tmp_path, timm_shapes(), architecture="vit_tiny_patch16_224", pretrained_cfg=TIMM)
    loaded = vlm_jax.load(folder)
    assert loaded.preprocess.startswith("decode(alpha='drop') | resize_shortest(") and loaded.tokenizer is None
    tower = loaded.model.image
    assert (tower.heads, tower.pool, tower.activation, tower.norm_eps) == (3, "tok", "gelu", 1e-6)
    named = recognize.of_spec(f"timm:vit_tiny_patch16_224.augreg:{folder / 'model.safetensors'}")
    assert named.model["image"] == loaded.config["model"]["image"] and named.preprocess is None
    with pytest.raises(UserError, match=r"of a ViT of timm without its name, .* is timm:NAME:PATH"):
        (tmp_path / "alone").mkdir()
        vlm_jax.load((folder / "model.safetensors").rename(tmp_path / "alone" / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "shapes", "config", "expected"),
    [
        ("vit_tiny_patch32_224", {}, {}, "the weights are no vit_tiny_patch32_224: their patches have 16 px"),
        ("vit_base_patch16_rope_224", {}, {}, "timm's `vit_base_patch16_rope_224` is not read"),
        ("vit_giant_patch14_dinov2", {}, {}, "is not read; of timm, plain Vision Transformers are"),
        (
            "vit_tiny_patch16_224",
            {},
            dict(global_pool="avg"),
            "has global_pool 'avg'; vit_tiny_patch16_224 has another",
        ),
        ("vit_tiny_patch16_224", {}, dict(model_args=dict(qk_norm=True)), "only {} is supported"),
        ("vit_tiny_patch16_224", dict(norm="fc_norm"), {}, "fc_norm"),
    ],
)
def test_what_is_not_read_of_timm_says_so(name, shapes, config, expected, tmp_path):
    folder = timm_folder(tmp_path, timm_shapes(**shapes), architecture=name, pretrained_cfg=TIMM, **config)
    with pytest.raises(UserError, match=re.escape(expected)):
        recognize.understand(folder).match()


@pytest.mark.parametrize(
    "wrong", [dict(interpolation="random"), dict(crop_mode="border"), dict(crop_pct=0), dict(input_size=[1, 8, 8]),
              dict(crop_mode="squash"), dict(mean=["a"])]
)  # fmt: skip
def test_preprocessing_of_timm_that_is_not_known(wrong, tmp_path):
    with pytest.raises(UserError, match="pass preprocess="):
        preprocessing.from_timm(TIMM | wrong)


def test_a_path_may_be_any_other_spec():
    assert hub.local("open_clip:ViT-B-32:pkg:vlm_jax/zoo/clip_tiny").name == "clip_tiny"
    assert hub.name_of("hf:org/name") is hub.name_of("a/b.pt") is None
