"""Families of towers in open_clip, small: the same embeddings, logits and gradients; exports load there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip(
    "open_clip", reason="pip install --no-deps open_clip_torch timm torchvision ftfy", exc_type=Exception
)

from tests.support.open_clip_families import CONVNEXT, CONVNEXTS, RESNETS, TEXTS, TOWERS, config_of, new
from tests.support.open_clip_models import batch, save, theirs
from tests.support.released import by_their_names, loss_and_embeddings, read
from tests.support.torch_parity import close, gradients_like
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize
from vlm_jax.zoo import save as zoo_save
from vlm_jax.zoo.formats import open_clip_convnext, open_clip_eva, open_clip_mobileclip, open_clip_texts


@pytest.mark.parametrize("name", [*TOWERS, *RESNETS, *CONVNEXTS, *TEXTS])
def test_the_same_numbers_and_gradients(name, tmp_path):
    model = new(config_of(name))
    save(model, config_of(name), tmp_path)
    released, ours, params = read(tmp_path)
    inputs = batch(model)
    if ours.text.pad_mask:
        inputs = inputs[0], np.where(inputs[1] == 0, ours.text.pad_id, inputs[1])
    image, text, logits = theirs(model, *inputs)
    gradients_like(model, logits, False)
    loss = lambda params: loss_and_embeddings(ours, params, *inputs, False)
    grads, (out, our_logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(out.image, image)
    close(out.text, text)
    close(our_logits, logits)
    gradients = by_their_names(released, grads)
    assert {key for key in gradients if ".running_" not in key} == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        close(gradients[key], parameter.grad)
    if name in TOWERS:
        close(out.image_tokens, model.visual.trunk.forward_features(torch.tensor(inputs[0]).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("name", [*RESNETS, *CONVNEXTS])
def test_exports_of_convolutions_load_there(name, tmp_path, monkeypatch):
    if name in CONVNEXTS:
        size = CONVNEXTS[name][0].removeprefix("convnext_")
        monkeypatch.setattr(open_clip_convnext, "VARIANTS", {size: tuple(CONVNEXT.values())})
    model, config = new(config_of(name)), config_of(name)
    (tmp_path / "theirs").mkdir()
    save(model, config, tmp_path / "theirs")
    content = zoo_save.content_of(recognize.understand(tmp_path / "theirs"))
    zoo_save.write(dataclasses.replace(content, preprocess=None), tmp_path / "ours", "open_clip")
    again = new(json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"])
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    inputs = batch(model, 2)
    with torch.no_grad():
        for got, want in zip(theirs(again, *inputs), theirs(model, *inputs), strict=True):
            close(got.numpy(), want)
    for format in ("hf", "big_vision"):
        with pytest.raises(UserError, match="it can be written as native, open_clip"):
            zoo_save.write(dataclasses.replace(content, preprocess=None), tmp_path / format, format)


@pytest.mark.parametrize("name", sorted(TOWERS.keys() - {"no_biases"}))
def test_exports_load_there(name, tmp_path, monkeypatch):
    """At the native size of pictures, which the name tells."""
    config, timm_name = config_of(name), TOWERS[name][0]
    side = int(timm_name.rpartition("_")[2])
    monkeypatch.setitem(TOWERS[name][2], "img_size", side)
    config["vision_cfg"]["image_size"] = side
    model = new(config)
    (tmp_path / "theirs").mkdir()
    save(model, config, tmp_path / "theirs")
    content = zoo_save.content_of(recognize.understand(tmp_path / "theirs"))
    sizes = tuple(content.section["image"][key] for key in ("width", "depth", "heads", "mlp_dim"))
    if name == "mobileclip_b":
        monkeypatch.setattr(open_clip_mobileclip, "VARIANTS", {"B": (*sizes[:2], sizes[3], sizes[2])})
    else:
        monkeypatch.setattr(open_clip_eva, "SIZES", {timm_name: sizes})
    zoo_save.write(dataclasses.replace(content, preprocess=None), tmp_path / "ours", "open_clip")
    again = new(json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"])
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    inputs = batch(model, 2)
    with torch.no_grad():
        for got, want in zip(theirs(again, *inputs), theirs(model, *inputs), strict=True):
            close(got.numpy(), want)


@pytest.mark.parametrize("name", TEXTS)
def test_exports_of_text_towers_load_there(name, tmp_path, monkeypatch):
    model, config = new(config_of(name)), config_of(name)
    (tmp_path / "theirs").mkdir()
    save(model, config, tmp_path / "theirs")
    content = zoo_save.content_of(recognize.understand(tmp_path / "theirs"))
    text = content.section["text"]
    sizes = tuple(text[key] for key in ("width", "depth", "mlp_dim", "vocab_size"))
    monkeypatch.setattr(open_clip_texts, "NAMES", {"mt5" if name == "mt5" else "roberta": {TEXTS[name][0]: sizes}})
    zoo_save.write(dataclasses.replace(content, preprocess=None, tokenizer=None), tmp_path / "ours", "open_clip")
    again = new(json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"])
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    images, token_ids = batch(model, 2)
    inputs = images, np.where(token_ids == 0, text["pad_id"], token_ids)
    with torch.no_grad():
        for got, want in zip(theirs(again, *inputs), theirs(model, *inputs), strict=True):
            close(got.numpy(), want)
