"""What `save` writes, Transformers loads without a missing or unused tensor, and computes the same."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers

from tests.support.torch_parity import close
from tests.support.transformers_models import IMAGES, PAIRS, TEXTS, batch, padded, save_and_load, to_torch
from vlm_jax.errors import UserError
from vlm_jax.zoo import save as zoo_save

MODELS = {**PAIRS, **{f"image_{name}": make for name, make in IMAGES.items()}}
MODELS |= {f"text_{name}": make for name, make in TEXTS.items()}
REFUSED = {"image_clip_classifier", "image_siglip_classifier"}  # nothing but their own classes pools so
REFUSED |= {"text_altclip"}  # Transformers names its blocks otherwise than in the pair


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_class_there_computes_is_refused(name, tmp_path):
    released = save_and_load(MODELS[name], tmp_path / "theirs")[-1]
    content = dataclasses.replace(zoo_save.content_of(released), preprocess=None, tokenizer=None)
    with pytest.raises(UserError, match="Transformers has no such model"):
        zoo_save.write(content, tmp_path / "ours", "hf")


@pytest.mark.parametrize("name", sorted(MODELS.keys() - REFUSED))
def test_exports_load_there(name, tmp_path):
    theirs, model, _, released = save_and_load(MODELS[name], tmp_path / "theirs")
    content = zoo_save.content_of(released)
    zoo_save.write(dataclasses.replace(content, preprocess=None, tokenizer=None), tmp_path / "ours", "hf")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    kind = getattr(transformers, written["architectures"][0])
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    lost = {key for problem in report.values() for key in problem if "mask_token" not in key and "lm_head" not in key}
    assert not lost, (name, report)
    images, token_ids = batch(np.random.default_rng(0), side=model.image.image_size if model.image else 32)
    inputs = to_torch(images, padded(model, token_ids) if model.text else token_ids)
    if model.text and model.text.pad_mask:
        inputs["attention_mask"] = (inputs["input_ids"] != model.text.pad_id).long()
    if not model.text:
        del inputs["input_ids"]
    if not model.image:
        del inputs["pixel_values"]
    if not model.text or name == "siglip":
        del inputs["attention_mask"]
    with torch.no_grad():
        got, want = again.eval()(**inputs), theirs(**inputs)
    for key in ("image_embeds", "text_embeds", "logits", "pooler_output"):
        if key in want:
            close(got[key].numpy(), want[key])
