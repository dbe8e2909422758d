"""Families of image and text towers in open_clip, small: the same embeddings, logits and gradients; exports load there.

timm decides sizes by a tower's name. Here its towers are made smaller; the name still decides everything else.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers as T
from safetensors.torch import load_file

pytest.importorskip(
    "open_clip", reason="pip install --no-deps open_clip_torch timm torchvision ftfy", exc_type=Exception
)

import open_clip.hf_model
import timm
from timm.models import vision_transformer_hybrid as hybrid

from tests.support import open_clip_models
from tests.support.open_clip_models import batch, save, theirs
from tests.support.released import by_their_names, loss_and_embeddings, read
from tests.support.torch_parity import close, gradients_like
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize
from vlm_jax.zoo import save as zoo_save
from vlm_jax.zoo.formats import open_clip_convnext, open_clip_eva, open_clip_mobileclip, open_clip_texts

TEXT = dict(context_length=12, vocab_size=32, width=64, heads=2, layers=2)
SMALL = dict(embed_dim=128, num_heads=2, depth=2, img_size=48)
LARGE_HEADS = dict(SMALL, num_heads=16)  # gigantic, enormous and giant towers have 16 at any width
TOWERS = {  # timm's name, its pool, sizes, the picture's side
    "pe": ("vit_pe_core_base_patch16_224", "map", SMALL),
    "pe_gigantic": ("vit_pe_core_gigantic_patch14_448", "map", dict(LARGE_HEADS, img_size=42)),
    "eva02": ("eva02_base_patch16_clip_224", "token", SMALL),
    "eva02_enormous": ("eva02_enormous_patch14_clip_224", "token", dict(LARGE_HEADS, img_size=42)),
    "no_biases": ("vit_medium_patch16_gap_256", "avg", dict(embed_dim=128, num_heads=2, depth=2, img_size=64)),
    "mobileclip_b": ("vit_base_mci_224", "token", dict(embed_dim=128, depth=2, img_size=64)),
    "eva01": ("eva_giant_patch14_224", "token", dict(LARGE_HEADS, img_size=42)),
}

BERT = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, vocab_size=32)
BERT |= dict(max_position_embeddings=20, layer_norm_eps=1e-5, type_vocab_size=1, pad_token_id=1)
MT5 = dict(d_model=96, d_kv=64, d_ff=80, num_layers=2, num_heads=2, vocab_size=32)
TEXTS = {  # the name, its config made smaller, open_clip's settings
    "roberta": ("roberta-base", T.RobertaConfig(**BERT), dict(hf_pooler_type="mean_pooler")),
    "xlm_roberta": ("xlm-roberta-base", T.XLMRobertaConfig(**BERT), dict(hf_proj_type="linear")),
    "xlm_cls": (
        "xlm-roberta-base",
        T.XLMRobertaConfig(**BERT),
        dict(hf_proj_type="linear", hf_pooler_type="cls_pooler"),
    ),
    "xlm_first": (
        "FacebookAI/xlm-roberta-large",
        T.XLMRobertaConfig(**BERT),
        dict(hf_pooler_type="cls_last_hidden_state_pooler"),
    ),
    "mt5": ("google/mt5-base", T.MT5Config(**MT5), dict(hf_pooler_type="mean_pooler")),
}
RESNETS = {
    "resnet": dict(image_size=64, layers=[2, 1, 1, 2], width=8, head_width=32, patch_size=None),
    "resnet_96": dict(image_size=96, layers=[1, 2, 1, 1], width=16, head_width=64, patch_size=None),
}
CONVNEXT = dict(depths=(2, 1, 2, 1), dims=(8, 12, 16, 24))
CONVNEXTS = {"convnext": ("convnext_base", "linear"), "convnext_mlp": ("convnext_large", "mlp")}
CONVNEXTS |= {"convnext_xxlarge": ("convnext_xxlarge", "linear")}
VISION = dict(image_size=8, patch_size=4, layers=2, width=64, head_width=32)


def small_mobileclip_b(embed_dim, depth, img_size, **more):
    """timm's function has its stem's widths as constants."""
    stem = hybrid.ConvStem(
        channels=(24, 32, embed_dim), stride=(4, 2, 2), kernel_size=(4, 2, 2), padding=0, act_layer=torch.nn.GELU
    )
    sizes = dict(embed_dim=embed_dim, depth=depth, num_heads=2, img_size=img_size, no_embed_class=True)
    return hybrid._create_vision_transformer_hybrid(
        "vit_base_mci_224", backbone=stem, embed_args=dict(proj=False), **sizes, **more
    )


def config_of(name):
    if name in CONVNEXTS:
        timm_name, proj = CONVNEXTS[name]
        vision = dict(image_size=64, timm_model_name=timm_name, timm_pool="", timm_proj=proj, timm_drop_path=0.1)
        return dict(embed_dim=20, vision_cfg=vision, text_cfg=TEXT)
    if name in RESNETS:
        return dict(embed_dim=24, quick_gelu=True, vision_cfg=RESNETS[name], text_cfg=TEXT)
    if name in TEXTS:
        hf_name, _, more = TEXTS[name]
        words = dict(hf_model_name=hf_name, hf_tokenizer_name=hf_name, hf_model_pretrained=False, **more)
        return dict(embed_dim=24, custom_text=True, quick_gelu=True, vision_cfg=VISION, text_cfg=words)
    timm_name, pool, sizes = TOWERS[name]
    vision = dict(image_size=sizes["img_size"], timm_model_name=timm_name, timm_model_pretrained=False, timm_pool=pool)
    return dict(embed_dim=24, custom_text=True, vision_cfg=vision | dict(timm_proj=None), text_cfg=TEXT)


@pytest.fixture
def new(monkeypatch):
    """A function: a randomised model of open_clip with a `model_cfg`, its tower of timm made smaller."""
    create = timm.create_model
    sizes = {timm_name: sizes for timm_name, _, sizes in TOWERS.values()}
    sizes |= {timm_name: CONVNEXT for timm_name, _ in CONVNEXTS.values()}

    def create_small(name, **more):
        if name == "vit_base_mci_224":
            return small_mobileclip_b(**more, **sizes[name])
        return create(name, **more, **sizes[name])

    monkeypatch.setattr(timm, "create_model", create_small)

    configs = {hf_name: config for hf_name, config, _ in TEXTS.values()}
    monkeypatch.setattr(open_clip.hf_model.AutoConfig, "from_pretrained", configs.__getitem__)
    return open_clip_models.new


@pytest.mark.parametrize("name", [*TOWERS, *RESNETS, *CONVNEXTS, *TEXTS])
def test_the_same_numbers_and_gradients(name, new, tmp_path):
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
def test_exports_of_convolutions_load_there(name, new, tmp_path, monkeypatch):
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
def test_exports_load_there(name, new, tmp_path, monkeypatch):
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
def test_exports_of_text_towers_load_there(name, new, tmp_path, monkeypatch):
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
