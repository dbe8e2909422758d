"""Low-rank updates in PEFT's files: a round trip, bit for bit; what has no place there, and what is not read here."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.params.table import map_with_name
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.readers.safetensors_files import write_safetensors
from vlm_jax.zoo.readers.tensors import open_tensors

GIVEN = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 6), np.int32)


@pytest.fixture(scope="module")
def base():
    """A CLIP that Transformers has, blocks in a scan."""
    sizes = dict(width=8, depth=2, heads=2, mlp_dim=12, out_dim=8, scan=True, activation="quick_gelu", head_bias=False)
    image = dict(sizes, patch=4, image_size=8, pool="tok", pre_norm=True, patch_bias=False, cls_position=True)
    text = dict(sizes, vocab_size=20, length=6, causal=True, pool="argmax")
    section = dict(name="two_tower", image=image, text=text)
    model = models.build(section)
    params = jax.jit(model.init)(jax.random.key(0), *GIVEN)["params"]
    return Pretrained(model, params, None, "normalize", None, {"model": section})


def adapted(base, *insertions):
    model = insertion.inserted(base.model, *insertions)
    begun = insertion.begin(jax.random.key(1), model, base.params, *GIVEN)
    draw = lambda name, leaf: leaf + np.float32(0.1) if "inserted_" in name else leaf
    return dataclasses.replace(base, model=model, params=map_with_name(draw, begun))


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """(the model, its folder)."""
    folder = tmp_path_factory.mktemp("peft") / "lora"
    model = adapted(base, LowRank(r".*/attn/(query|value)", rank=2, alpha=3))
    vlm_jax.save_pretrained(model, folder, format="peft")
    return model, folder


def test_a_round_trip(base, saved):
    """The same parameters; the names of the folder's tensors are those of Transformers' modules."""
    model, folder = saved
    again = vlm_jax.load_adapter(folder, base)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (one,) = again.model.insertions
    assert (one.rank, one.factor) == (2, 1.5)
    tensors = open_tensors(folder / "adapter_model.safetensors").tensors
    assert len(tensors) == 2 * 2 * 2 * 2
    name = "base_model.model.text_model.encoder.layers.1.self_attn.v_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (2, 8)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 3.0, {})
    assert len(config["target_modules"]) == 8


def test_what_has_no_place_there_is_named(base, saved, tmp_path):
    low_rank = LowRank("image/.*/query", rank=2)
    for one, message in (
        (
            adapted(base, low_rank, Adapter(width=2)),
            "this model has Adapter; it can be written as native",
        ),
        (base, "of LowRank alone; this model has no insertion"),
        (dataclasses.replace(saved[0], head=lambda x: x), "this model has a head"),
        (adapted(base, low_rank, LowRank("text/.*/query", magnitude=True)), "one `use_rslora` and one `use_dora`"),
        (adapted(base, LowRank("image/patch_embed")), "no place for image/patch_embed"),
    ):
        with pytest.raises(UserError, match=message):
            vlm_jax.save_pretrained(one, tmp_path / "none", format="peft")
        assert not list(tmp_path.iterdir())


CHANGED = {
    "ADALORA": (dict(peft_type="ADALORA"), "has the peft_type 'ADALORA'; only LORA is read"),
    "bias": (dict(bias="all"), "has bias='all', which is not supported"),
    "alpha": (dict(lora_alpha=None), r"is no adapter of this model, or damaged \(float\(\) argument"),
    "regex": (dict(alpha_pattern={"(a+)+": 1}), "a regex in alpha_pattern that may run for hours"),
    "magnitude": (dict(use_dora=True), r"damaged \(lacks '.*lora_magnitude_vector'\)"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_what_is_not_read_is_named(kind, base, saved, tmp_path):
    changes, message = CHANGED[kind]
    folder = shutil.copytree(saved[1], tmp_path / "lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        vlm_jax.load_adapter(folder, base)


def test_tensors_of_another_model_are_named(base, saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "lora")
    tensors = {name: t.read() for name, t in open_tensors(folder / "adapter_model.safetensors").tensors.items()}
    wider = {name: np.pad(x, ((0, 0), (0, 1))) for name, x in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", wider, {})
    with pytest.raises(UserError, match=r"has factors \(9, 2\) and \(3, 8\) of a kernel \(8, 8\)"):
        vlm_jax.load_adapter(folder, base)
    write_safetensors(folder / "adapter_model.safetensors", {}, {})
    with pytest.raises(UserError, match="has no low-rank update of a layer of this model"):
        vlm_jax.load_adapter(folder, base)
    for name in [name for name in tensors if "layers.1." in name]:
        tensors[name.replace("layers.1.", "layers.2.")] = tensors.pop(name)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {})
    with pytest.raises(UserError, match=r"that no layer of this model takes: .*layers.2"):
        vlm_jax.load_adapter(folder, base)
