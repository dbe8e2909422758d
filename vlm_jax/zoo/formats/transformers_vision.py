"""The image towers of Transformers, by model_type."""

import math

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.zoo.formats import transformers_tables as tables
from vlm_jax.zoo.formats.settings import neutral
from vlm_jax.zoo.formats.transformers_towers import (
    ACTIVATIONS,
    BACKBONE,
    CLIP_DEFAULTS,
    IMAGE,
    SIGLIP_DEFAULTS,
    Tower,
)


def _siglip_vision(section, config, names):
    return {"pool": "map" if config["vision_use_head"] else "none"}


def _siglip2_vision(section, config, names):
    side = math.isqrt(config["num_patches"]) * section["patch"]
    return {"pool": "map" if config["vision_use_head"] else "none", "image_size": side}


def _siglip2_vision_reverse(section):
    size = section["image_size"]  # an int for a square: their table has one number of patches
    patches = (size // section["patch"]) ** 2 if isinstance(size, int) else None
    return {"vision_use_head": section["pool"] == "map", "num_patches": patches}


def _vit(section, config, names):
    biases = _qkv_bias(config)
    if "pooler.dense.weight" not in names:
        return biases
    act = choose({"tanh": "tanh", **ACTIVATIONS}, config["pooler_act"], "pooler_act of config.json")
    return biases | {"rep_dim": config.get("pooler_output_size") or section["width"], "rep_activation": act}


def _qkv_bias(config):
    return {} if config["qkv_bias"] else {"attn_bias": ("out",)}


def _qkv_bias_reverse(section):
    return {"qkv_bias": section.get("attn_bias", True) is True}


def _vit_reverse(section):
    if not section.get("rep_dim"):
        return _qkv_bias_reverse(section)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    act = section.get("rep_activation", "tanh")
    pooler = {"pooler_output_size": section["rep_dim"], "pooler_act": names.get(act, act)}
    return _qkv_bias_reverse(section) | pooler


def _dinov2_rows(section):
    return tables.DINOV2_GATED if section.get("gated") else tables.DINOV2


def _dinov2(section, config, names):
    hidden, biases = int(section["width"] * config["mlp_ratio"]), _qkv_bias(config)
    if config["use_swiglu_ffn"]:
        return biases | {"gated": True, "activation": "silu", "mlp_dim": (int(hidden * 2 / 3) + 7) // 8 * 8}
    return biases | {"mlp_dim": hidden}


def _dinov2_reverse(section):
    return _qkv_bias_reverse(section) | {
        "use_swiglu_ffn": section.get("gated", False),
        "mlp_ratio": 4 if section.get("gated") else section["mlp_dim"] // section["width"],  # whole numbers only
        "hidden_act": "gelu",
    }


BIASES = {"query": "query_bias", "key": "key_bias", "value": "value_bias", "out": "proj_bias"}


def _dinov3(section, config, names):
    biased = tuple(name for name, key in BIASES.items() if config[key])
    theta = config["rope_theta"]
    if type(theta) not in (int, float) or theta <= 0:
        raise UserError(f"config.json has rope_theta {theta!r:.40}; expected a number above 0")
    rotary = dict(temperature=float(theta), centred=True, halves=True)
    return {"attn_bias": True if len(biased) == len(BIASES) else biased, "rotary": rotary}


def _dinov3_reverse(section):
    biased, rotary = section.get("attn_bias", True), section.get("rotary")
    biases = {key: biased if isinstance(biased, bool) else name in biased for name, key in BIASES.items()}
    return biases | {"rope_theta": rotary.temperature if rotary else 100.0}


VIT_DEFAULTS = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
VIT_DEFAULTS |= dict(hidden_act="gelu", layer_norm_eps=1e-12, image_size=224, patch_size=16, qkv_bias=True)
DINOV2 = dict(
    fields={**{k: v for k, v in IMAGE.items() if k != "mlp_dim"}, "layer_scale": "layerscale_value"},
    defaults={**VIT_DEFAULTS, "layer_norm_eps": 1e-6, "mlp_ratio": 4, "use_swiglu_ffn": False, "layerscale_value": 1.0},
    adapt=_dinov2,
    reverse=_dinov2_reverse,
    neutral=BACKBONE,
)
VISION = {
    "clip_vision_model": Tower(
        tables.CLIP_VISION,
        IMAGE,
        dict(pool="tok", cls_position=True, patch_bias=False, pre_norm=True, head_bias=False),
        dict(CLIP_DEFAULTS, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        | dict(image_size=224, patch_size=32),
    ),
    "siglip_vision_model": Tower(
        tables.SIGLIP_VISION,
        IMAGE,
        {},
        dict(SIGLIP_DEFAULTS, image_size=224, patch_size=16, vision_use_head=True),
        _siglip_vision,
        lambda section: {"vision_use_head": section["pool"] == "map"},
    ),
    "siglip2_vision_model": Tower(
        tables.SIGLIP2_VISION,
        {key: value for key, value in IMAGE.items() if key != "image_size"},
        {},
        dict(SIGLIP_DEFAULTS, num_patches=256, patch_size=16, vision_use_head=True),
        _siglip2_vision,
        _siglip2_vision_reverse,
    ),
    "vit": Tower(
        tables.VIT,
        IMAGE,
        dict(pool="tok", cls_position=True),
        dict(VIT_DEFAULTS, pooler_act="tanh"),
        _vit,
        _vit_reverse,
        neutral("encoder_stride pooler_output_size"),
    ),
    "dinov2": Tower(_dinov2_rows, fixed=dict(pool="tok", cls_position=True), **DINOV2),
    "dinov2_with_registers": Tower(
        _dinov2_rows,
        **DINOV2
        | dict(
            fixed=dict(pool="tok", cls_position=True),
            fields=dict(DINOV2["fields"], registers="num_register_tokens"),
            defaults=dict(DINOV2["defaults"], num_register_tokens=4),
        ),
    ),
    "dinov3_vit": Tower(
        lambda section: tables.DINOV3_GATED if section.get("gated") else tables.DINOV3,
        {**IMAGE, "layer_scale": "layerscale_value", "registers": "num_register_tokens", "gated": "use_gated_mlp"}
        | {"mlp_bias": "mlp_bias"},
        dict(pool="tok", cls=True, posemb="none"),
        dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, hidden_act="gelu")
        | dict(layer_norm_eps=1e-5, image_size=224, patch_size=16, rope_theta=100.0, query_bias=True, key_bias=False)
        | dict(value_bias=True, proj_bias=True, mlp_bias=True, layerscale_value=1.0, use_gated_mlp=False)
        | dict(num_register_tokens=0),
        _dinov3,
        _dinov3_reverse,
        BACKBONE | neutral("pos_embed_shift pos_embed_jitter pos_embed_rescale"),  # of training
    ),
}
for kind in ("metaclip_2", "chinese_clip", "altclip"):
    VISION[f"{kind}_vision_model"] = VISION["clip_vision_model"]
