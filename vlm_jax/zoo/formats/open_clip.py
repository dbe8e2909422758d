"""Checkpoints of open_clip (a folder with open_clip_config.json, or bare weights) and OpenAI's own CLIP files.

CLIP, CustomTextCLIP and SigLIP (a timm ViT as image tower). Shapes give the sizes. `model_cfg` gives heads, activation,
pool and epsilon; bare weights take the values of OpenAI's models.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.variants import VARIANTS
from vlm_jax.zoo.key_map import expand

# Buffers, and what OpenAI's archives keep beside the weights.
IGNORED = ("*attn_mask", "input_resolution", "context_length", "vocab_size")

BLOCKS = (
    ("blocks_{i}/norm1", "transformer.resblocks.{i}.ln_1", "norm"),
    ("blocks_{i}/attn/query", "transformer.resblocks.{i}.attn.in_proj#0/3", "in_proj"),
    ("blocks_{i}/attn/key", "transformer.resblocks.{i}.attn.in_proj#1/3", "in_proj"),
    ("blocks_{i}/attn/value", "transformer.resblocks.{i}.attn.in_proj#2/3", "in_proj"),
    ("blocks_{i}/attn/out", "transformer.resblocks.{i}.attn.out_proj", "dense"),
    ("blocks_{i}/layer_scale1", "transformer.resblocks.{i}.ls_1.gamma", "same"),
    ("blocks_{i}/norm2", "transformer.resblocks.{i}.ln_2", "norm"),
    ("blocks_{i}/mlp/fc1", "transformer.resblocks.{i}.mlp.c_fc", "dense"),
    ("blocks_{i}/mlp/fc2", "transformer.resblocks.{i}.mlp.c_proj", "dense"),
    ("blocks_{i}/layer_scale2", "transformer.resblocks.{i}.ls_2.gamma", "same"),
)
IMAGE = (
    ("patch_embed", "conv1", "conv"),
    ("cls", "class_embedding", "vector"),
    ("pos_embed", "positional_embedding", "table"),
    ("pre_norm", "ln_pre", "norm"),
    *BLOCKS,
    ("norm", "ln_post", "norm"),
    ("head/kernel", "proj", "same"),
)
TIMM_IMAGE = (
    ("patch_embed", "trunk.patch_embed.proj", "conv"),
    ("cls", "trunk.cls_token", "same"),
    ("registers", "trunk.reg_token", "same"),
    ("pos_embed", "trunk.pos_embed", "same"),
    ("pre_norm", "trunk.norm_pre", "norm"),
    ("blocks_{i}/norm1", "trunk.blocks.{i}.norm1", "norm"),
    ("blocks_{i}/attn/query", "trunk.blocks.{i}.attn.qkv#0/3", "dense"),
    ("blocks_{i}/attn/key", "trunk.blocks.{i}.attn.qkv#1/3", "dense"),
    ("blocks_{i}/attn/value", "trunk.blocks.{i}.attn.qkv#2/3", "dense"),
    ("blocks_{i}/attn/out", "trunk.blocks.{i}.attn.proj", "dense"),
    ("blocks_{i}/layer_scale1", "trunk.blocks.{i}.ls1.gamma", "same"),
    ("blocks_{i}/norm2", "trunk.blocks.{i}.norm2", "norm"),
    ("blocks_{i}/mlp/fc1", "trunk.blocks.{i}.mlp.fc1", "dense"),
    ("blocks_{i}/mlp/fc2", "trunk.blocks.{i}.mlp.fc2", "dense"),
    ("blocks_{i}/layer_scale2", "trunk.blocks.{i}.ls2.gamma", "same"),
    ("norm", "trunk.norm", "norm"),
    ("map_pool/probe", "trunk.attn_pool.latent", "same"),
    ("map_pool/attn/query", "trunk.attn_pool.q", "dense"),
    ("map_pool/attn/key", "trunk.attn_pool.kv#0/2", "dense"),
    ("map_pool/attn/value", "trunk.attn_pool.kv#1/2", "dense"),
    ("map_pool/attn/out", "trunk.attn_pool.proj", "dense"),
    ("map_pool/norm", "trunk.attn_pool.norm", "norm"),
    ("map_pool/mlp/fc1", "trunk.attn_pool.mlp.fc1", "dense"),
    ("map_pool/mlp/fc2", "trunk.attn_pool.mlp.fc2", "dense"),
    ("head", "head.proj", "dense"),
)
TEXT = (
    ("token_embed", "token_embedding", "embedding"),
    ("pos_embed", "positional_embedding", "table"),
    *BLOCKS,
    ("norm", "ln_final", "norm"),
)
TEXT_HEAD = (("head/kernel", "text_projection", "same"),)
TEXT_HEAD_WITH_BIAS = (("head", "text_projection", "dense"),)
SCALES = (("logit_scale", "logit_scale", "same"), ("logit_bias", "logit_bias", "same"))

# Our variants in timm's names of the SigLIP image towers.
TIMM_NAMES = {"B": "base", "L": "large", "So400m": "so400m", "g-opt": "giantopt"}
# timm's towers with tanh GELU, by name; all others have exact GELU.
TIMM_TANH = r"vit_(giantopt_patch16|so400m_patch16|base_patch32)_siglip|vit_large_patch16_siglip(_gap)?_512"
# Fields of model_cfg that change the model's outputs, and the only supported value.
PLAIN_BLOCK = dict(block_type="default", qk_norm=False, scaled_cosine_attn=False, scale_heads=False)
PLAIN_BLOCK |= dict(scale_attn_inner=False, scale_attn=False, scale_fc=False, final_ln_after_pool=False)
PLAIN = {
    "vision_cfg": dict(PLAIN_BLOCK, attentional_pool=False, pool_type="tok", pos_embed_type="learnable"),
    "text_cfg": dict(PLAIN_BLOCK, embed_cls=False, hf_model_name=None),
}


def recognise(names) -> bool:
    """Whether tensors of these names are open_clip's or OpenAI's."""
    return "visual.conv1.weight" in names or any(name.startswith("visual.trunk.") for name in names)


def describe(
    tensors: Mapping[str, Any], model_cfg: Mapping[str, Any] | None = None, activation: str | None = None
) -> tuple[dict, list, tuple[str, ...]]:
    """Returns the model of tensors and a `model_cfg`.

    Args:
      tensors: name -> `tensors.Tensor`.
      model_cfg: of open_clip_config.json; None for bare weights.
      activation: for bare weights, whose shapes do not tell: "quick_gelu" (OpenAI's weights and those tuned from them)
        or "gelu".

    Returns:
      (config section of our model, entries of its key table, patterns of tensors that are left out)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if "visual.layer1.0.conv1.weight" in shapes:
        raise UserError("the image tower is a ResNet; only Vision Transformers can be loaded")
    cfg = dict(model_cfg or {})
    vision, text = dict(cfg.get("vision_cfg") or {}), dict(cfg.get("text_cfg") or {})
    for where, part in (("vision_cfg", vision), ("text_cfg", text)):
        for key, value in PLAIN[where].items():
            if part.get(key) not in (None, value):
                raise UserError(f"{where}.{key} is {part[key]!r}; only {value!r} is supported")
    timm = any(name.startswith("visual.trunk.") for name in shapes)
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    if model_cfg is None and activation is None:
        raise UserError(
            "bare CLIP weights do not tell their activation; pass activation='quick_gelu' (OpenAI's weights and those "
            "tuned from them) or activation='gelu' (most of open_clip's)"
        )
    plain = "quick_gelu" if cfg.get("quick_gelu") else activation or "gelu"
    section = {
        "name": "two_tower",
        "image": _timm_image(shapes, vision) if timm else image_fields(shapes, vision, plain),
    }
    section |= {"text": _text(shapes, prefix, text, plain), "bias_init": -10.0 if "logit_bias" in shapes else None}
    return section, _entries(section, timm, prefix), IGNORED


def _entries(section, timm, prefix):
    image, text = section["image"], section["text"]
    rows, texts = TIMM_IMAGE if timm else IMAGE, TEXT + (TEXT_HEAD_WITH_BIAS if text["head_bias"] else TEXT_HEAD)
    entries = expand(rows, "image/", "visual.", depth=image["depth"], heads=image["heads"], patch=image["patch"])
    entries += expand(texts, "text/", prefix, depth=text["depth"], heads=text["heads"])
    return entries + expand(SCALES)


def blocks(shapes, prefix):
    """Returns the number of blocks under a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def _activation(part, plain):
    approximate = (part.get("act_kwargs") or {}).get("approximate")
    return "gelu_tanh" if approximate == "tanh" and plain == "gelu" else plain


def _eps(part):
    return (part.get("norm_kwargs") or {}).get("eps", 1e-5)


def _layer_scale(shapes, name):
    return {"layer_scale": 1.0} if name in shapes else {}


def image_fields(shapes, cfg, plain):
    """Returns the fields of open_clip's own image tower."""
    width, _, patch, _ = shapes["visual.conv1.weight"]
    rows = shapes["visual.positional_embedding"][0] - 1
    side = math.isqrt(rows)
    size = cfg.get("image_size") or (side * patch if side * side == rows else None)
    return dict(
        width=width,
        depth=blocks(shapes, "visual.transformer.resblocks."),
        heads=width // cfg.get("head_width", 64),
        mlp_dim=shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        patch=patch,
        image_size=tuple(size) if isinstance(size, list) else size,
        activation=_activation(cfg, plain),
        norm_eps=_eps(cfg),
        pool="tok",
        cls_position=True,
        patch_bias=False,
        pre_norm="visual.ln_pre.weight" in shapes,
        out_dim=shapes["visual.proj"][1] if "visual.proj" in shapes else None,
        head_bias=False,
        **_layer_scale(shapes, "visual.transformer.resblocks.0.ls_1.gamma"),
    )


def _timm_image(shapes, cfg):
    trunk = "visual.trunk."
    width, _, patch, _ = shapes[f"{trunk}patch_embed.proj.weight"]
    depth, mlp_dim = blocks(shapes, f"{trunk}blocks."), shapes[f"{trunk}blocks.0.mlp.fc1.weight"][0]
    sizes = {(w, d, m): heads for w, d, m, heads in VARIANTS.values()}
    pool = cfg.get("timm_pool", "map" if f"{trunk}attn_pool.latent" in shapes else "avg")
    pools = {"map": "map", "token": "tok", "tok": "tok", "avg": "gap"}
    if pool not in pools:
        raise UserError(f"vision_cfg.timm_pool is `{pool}`; expected one of: {', '.join(pools)}")
    name, cls = cfg.get("timm_model_name") or "", f"{trunk}cls_token" in shapes
    size = cfg.get("image_size")
    fields = dict(
        width=width,
        depth=depth,
        heads=width // cfg["head_width"] if "head_width" in cfg else sizes.get((width, depth, mlp_dim), width // 64),
        mlp_dim=mlp_dim,
        patch=patch,
        image_size=tuple(size) if isinstance(size, list) else size,
        activation="gelu_tanh" if re.match(TIMM_TANH, name) else _activation(cfg, "gelu"),
        norm_eps=(cfg.get("norm_kwargs") or {}).get("eps", 1e-6),
        pool=pools[pool],
        **_layer_scale(shapes, f"{trunk}blocks.0.ls1.gamma"),
    )
    if cls:
        fields |= dict(cls=True, cls_position=True)
        if f"{trunk}reg_token" in shapes:
            fields["registers"] = shapes[f"{trunk}reg_token"][1]
    if "visual.head.proj.weight" in shapes:
        head = shapes["visual.head.proj.weight"][0]
        fields |= dict(out_dim=head, head_bias="visual.head.proj.bias" in shapes)
    return fields


def _text(shapes, prefix, cfg, plain):
    vocab_size, width = shapes[f"{prefix}token_embedding.weight"]
    pool = cfg.get("pool_type", "argmax")
    if pool not in ("argmax", "last", "first", "eos"):
        raise UserError(f"text_cfg.pool_type is `{pool}`; expected one of: argmax, last, first, eos")
    linear, plain_head = (shapes.get(f"{prefix}text_projection{end}") for end in (".weight", ""))
    head = linear or (plain_head and plain_head[::-1])
    return dict(
        width=width,
        depth=blocks(shapes, f"{prefix}transformer.resblocks."),
        heads=cfg.get("heads", width // 64),
        mlp_dim=shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        vocab_size=vocab_size,
        length=shapes[f"{prefix}positional_embedding"][0],
        activation=_activation(cfg, plain),
        norm_eps=_eps(cfg),
        causal=not cfg.get("no_causal_mask", False),
        pool=pool,
        **({"eos_id": cfg.get("eos_id", 2)} if pool == "eos" else {}),
        out_dim=head[0] if head else None,
        head_bias=linear is not None and f"{prefix}text_projection.bias" in shapes,
        **_layer_scale(shapes, f"{prefix}transformer.resblocks.0.ls_1.gamma"),
    )


def config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `model_cfg` of our section, as far as open_clip can express the model."""
    image, text = section["image"], section["text"]
    if not image or not text:
        raise UserError("open_clip's format is of two towers; this model has one")
    timm = image["pool"] != "tok" or not image.get("pre_norm")
    vision = dict(image_size=image.get("image_size"), width=image["width"], layers=image["depth"])
    vision |= dict(patch_size=image["patch"], head_width=image["width"] // image["heads"])
    if timm:
        size = image.get("image_size")
        sizes = image["width"], image["depth"], image["mlp_dim"]
        variant = next((name for name, known in VARIANTS.items() if known[:3] == sizes), "")
        name = TIMM_NAMES.get(variant, f"{image['width']}x{image['depth']}")
        vision |= dict(timm_model_name=f"vit_{name}_patch{image['patch']}_siglip_{size}", timm_model_pretrained=False)
        vision |= dict(timm_pool={"gap": "avg", "tok": "token"}.get(image["pool"], image["pool"]))
        vision |= dict(timm_proj="linear" if image.get("out_dim") else "none")
    else:
        vision |= dict(mlp_ratio=image["mlp_dim"] / image["width"])
    texts = dict(context_length=text["length"], vocab_size=text["vocab_size"], width=text["width"])
    texts |= dict(heads=text["heads"], layers=text["depth"], mlp_ratio=text["mlp_dim"] / text["width"])
    texts |= dict(no_causal_mask=not text.get("causal", False), pool_type=text["pool"])
    texts |= dict(proj_bias=text.get("head_bias", True)) | ({"eos_id": text["eos_id"]} if text.get("eos_id") else {})
    for part, fields in ((vision, image), (texts, text)):
        part["norm_kwargs"] = {"eps": fields.get("norm_eps", 1e-6)}
        if fields.get("activation", "gelu_tanh") == "gelu_tanh":
            part["act_kwargs"] = {"approximate": "tanh"}
    cfg = dict(embed_dim=text["out_dim"], vision_cfg=vision, text_cfg=texts)
    cfg["quick_gelu"] = image.get("activation") == "quick_gelu"
    if section.get("bias_init") is not None:
        cfg |= dict(custom_text=True, init_logit_bias=section["bias_init"])
    return cfg


def outline(section: Mapping[str, Any]) -> tuple[dict, list]:
    """Returns (`model_cfg`, entries) that write a model whose section has all fields."""
    cfg = config(section)
    prefix = "text." if cfg.get("custom_text") else ""
    return cfg, _entries(section, "timm_model_name" in cfg["vision_cfg"], prefix)
