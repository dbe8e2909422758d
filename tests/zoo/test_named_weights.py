"""Bare weights whose model the spec names: `open_clip:ViT-B-32:weights.safetensors`."""

import json
import math

import jax
import pytest

import vlm_jax
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.zoo import hub, key_map, recognize
from vlm_jax.zoo.formats import open_clip
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


def test_a_path_may_be_any_other_spec():
    assert hub.local("open_clip:ViT-B-32:pkg:vlm_jax/zoo/clip_tiny").name == "clip_tiny"
    assert hub.name_of("hf:org/name") is hub.name_of("a/b.pt") is None
