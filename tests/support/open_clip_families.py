"""Small models of open_clip's families of towers. timm decides sizes by a tower's name; here its towers are smaller.

The name still decides everything else.
"""

from unittest import mock

import open_clip
import open_clip.hf_model
import timm
import torch
import transformers as T
from timm.models import vision_transformer_hybrid as hybrid

from tests.support import open_clip_models

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


def _create_small(name, create=timm.create_model, **more):
    sizes = {timm_name: sizes for timm_name, _, sizes in TOWERS.values()}
    sizes |= {timm_name: CONVNEXT for timm_name, _ in CONVNEXTS.values()}
    if name == "vit_base_mci_224":
        return small_mobileclip_b(**more, **sizes[name])
    return create(name, **more, **sizes[name])


def new(config):
    """A randomised model of open_clip with a `model_cfg`, its tower of timm made smaller."""
    configs = {hf_name: config for hf_name, config, _ in TEXTS.values()}
    with (
        mock.patch.object(timm, "create_model", _create_small),
        mock.patch.object(open_clip.hf_model.AutoConfig, "from_pretrained", configs.__getitem__),
    ):
        return open_clip_models.new(config)
