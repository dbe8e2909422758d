"""PEFT loads our files, and we load PEFT's: LoRA, rsLoRA and DoRA, on a CLIP of Transformers."""

import dataclasses

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import CLIPModel

import vlm_jax
from tests.support.torch_parity import close
from tests.support.transformers_models import PAIRS, batch, save_and_load, to_torch
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.params.table import map_with_name
from vlm_jax.pretrained import Pretrained

IMAGES, TOKEN_IDS = batch(np.random.default_rng(0))
KINDS = {"lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True)}
OURS = {"lora": {}, "rslora": dict(stabilised=True), "dora": dict(magnitude=True)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of the model there, the model here)."""
    folder = tmp_path_factory.mktemp("clip")
    _, model, params, released = save_and_load(PAIRS["clip_eos"], folder)
    return folder, Pretrained(model, params, None, "normalize", None, {"model": released.model})


def theirs(model):
    with torch.no_grad():
        found = model.eval()(**to_torch(IMAGES, TOKEN_IDS))
    return found["image_embeds"].numpy(), found["text_embeds"].numpy()


def ours(adapted):
    found = adapted.model.apply({"params": adapted.params}, IMAGES, TOKEN_IDS)
    return found.image, found.text


@pytest.mark.parametrize("kind", KINDS)
def test_their_files_here(kind, base, tmp_path):
    folder, plain = base
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], init_lora_weights=False, rank_pattern={"fc1": 2},
        alpha_pattern={r"vision_model.*fc1": 5}, **KINDS[kind],
    )  # fmt: skip
    torch.manual_seed(1)
    model = peft.get_peft_model(CLIPModel.from_pretrained(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora")
    adapted = vlm_jax.load_adapter(tmp_path / "lora", plain)
    for got, want, before in zip(ours(adapted), theirs(model), ours(plain), strict=True):
        close(got, want)
        assert np.abs(want - before).max() > 1e-3
    vlm_jax.save_pretrained(adapted, tmp_path / "again", format="peft")
    again = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path / "again")
    for got, want in zip(theirs(again), theirs(model), strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", OURS)
def test_our_files_there(kind, base, tmp_path):
    """Of blocks in a scan; weights of the terms are folded in, terms that are 0 are left out."""
    folder, plain = base
    one = LowRank(r"(image|text)/.*/(value|out)", rank=3, alpha=2, weights="importance", **OURS[kind])
    model = insertion.inserted(plain.model, one, LowRank("text/.*/fc2", rank=2, **OURS[kind]))
    rng = np.random.default_rng(2)
    moved = lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
    begun = insertion.begin(jax.random.key(0), model, plain.params, IMAGES, TOKEN_IDS)
    params = map_with_name(lambda name, leaf: moved(leaf) if "inserted" in name else leaf, begun)
    out = params["image"]["blocks"]["attn"]["out"]
    out["inserted_b"] = out["inserted_b"].at[1, 1:].set(0)
    adapted = dataclasses.replace(plain, model=model, params=params)
    vlm_jax.save_pretrained(adapted, tmp_path / "lora", format="peft")
    found = peft.PeftModel.from_pretrained(CLIPModel.from_pretrained(folder), tmp_path / "lora")
    ranks = found.peft_config["default"].rank_pattern
    assert sorted(ranks.values()) == [1, 2, 2]
    for got, want in zip(theirs(found), ours(adapted), strict=True):
        close(got, np.asarray(want))
    again = vlm_jax.load_adapter(tmp_path / "lora", plain)
    for got, want in zip(ours(again), ours(adapted), strict=True):
        close(got, np.asarray(want))
