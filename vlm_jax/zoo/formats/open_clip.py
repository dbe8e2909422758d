"""Checkpoints of open_clip (a folder with open_clip_config.json, or bare weights) and OpenAI's own CLIP files.

CLIP, CustomTextCLIP and SigLIP (a timm ViT as image tower, see `open_clip_timm`). Shapes give the sizes. `model_cfg`
gives heads, activation, pool and epsilon; bare weights take the values of OpenAI's models if they are as these.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.zoo import families
from vlm_jax.zoo.formats import (
    open_clip_convnext,
    open_clip_eva,
    open_clip_mobileclip,
    open_clip_resnet,
    open_clip_texts,
    open_clip_timm,
)
from vlm_jax.zoo.formats.head_counts import HEAD_WIDTH, heads_of
from vlm_jax.zoo.formats.settings import check, neutral
from vlm_jax.zoo.key_map import expand
from vlm_jax.zoo.released import NOTHING, Told

# Buffers, and what OpenAI's archives keep beside the weights.
IGNORED = ("*attn_mask", "*.num_batches_tracked", "*position_ids", "input_resolution", "context_length", "vocab_size")

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
TEXT = (
    ("token_embed", "token_embedding", "embedding"),
    ("pos_embed", "positional_embedding", "table"),
    *BLOCKS,
    ("norm", "ln_final", "norm"),
)
TEXT_HEAD = (("head/kernel", "text_projection", "same"),)
TEXT_HEAD_WITH_BIAS = (("head", "text_projection", "dense"),)
TEXT_POOLS = ("argmax", "last", "first", "eos")
TRANSFORMER = "visual.transformer.resblocks"
FAMILIES = (
    open_clip_convnext,
    open_clip_eva,
    open_clip_mobileclip,
    open_clip_resnet,
)  # of image towers besides open_clip's own and timm's plain ViT
SCALES = (("logit_scale", "logit_scale", "same"), ("logit_bias", "logit_bias", "same"))

# Settings of model_cfg that are read here, or that tensors tell; and all others of open_clip 3.3.
READ = {
    "model_cfg": {"vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "embed_dim", "custom_text"},
    "vision_cfg": {
        "width", "layers", "mlp_ratio", "patch_size", "image_size", "head_width", "act_kwargs", "norm_kwargs",
        "timm_model_name", "timm_pool", "pool_type", "final_ln_after_pool",
    },
    "text_cfg": {
        "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers",
        "mlp_ratio", "eos_id", "no_causal_mask", "pool_type", "act_kwargs", "norm_kwargs", "hf_model_name",
        "hf_pooler_type",
    },
    "act_kwargs": (),
    "norm_kwargs": {"eps"},
}  # fmt: skip
PLAIN_BLOCK = dict(block_type=["default"])
PLAIN_BLOCK |= {f"scale_{part}": [False] for part in ("heads", "attn_inner", "attn", "fc")}
PLAIN_BLOCK |= dict(qk_norm=[False], scaled_cosine_attn=[False])
NEUTRAL = {
    "model_cfg": neutral("init_logit_scale cast_dtype output_dict is_hf_model", nonscalar_logit_scale=[False]),
    "vision_cfg": neutral(
        "ls_init_value patch_dropout attn_pooler_queries attn_pooler_heads no_ln_pre output_tokens "
        "timm_model_pretrained timm_proj_bias timm_drop timm_drop_path",
        attentional_pool=[False], pos_embed_type=["learnable"], timm_proj=["linear", "mlp", "none", ""],
        **PLAIN_BLOCK,
    ),
    "text_cfg": neutral(
        "ls_init_value pad_id proj_bias output_tokens hf_model_pretrained hf_proj_type",
        embed_cls=[False], final_ln_after_pool=[False], proj_type=["linear", "none"], tokenizer_mode=[""],
        **PLAIN_BLOCK,
    ),
    "act_kwargs": neutral("inplace", approximate=["none", "tanh"]),
    "norm_kwargs": neutral("", elementwise_affine=[True], bias=[True]),
}  # fmt: skip


def recognise(names) -> bool:
    """Whether tensors of these names are open_clip's or OpenAI's."""
    return "visual.conv1.weight" in names or any(name.startswith("visual.trunk.") for name in names)


def describe(
    tensors: Mapping[str, Any], model_cfg: Mapping[str, Any] | None = None, told: Told = NOTHING
) -> tuple[dict, list, tuple[str, ...]]:
    """Returns the model of tensors and a `model_cfg`.

    Args:
      tensors: name -> `tensors.Tensor`.
      model_cfg: of open_clip_config.json; None for bare weights.
      told: for bare weights, whose shapes do not tell them: the activation, "quick_gelu" (OpenAI's weights and those
        tuned from them), "gelu" or "gelu_tanh"; pools and heads of towers that are not OpenAI's.

    Returns:
      (config section of our model, entries of its key table, patterns of tensors that are left out)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    cfg = dict(model_cfg or {})
    vision, text = dict(cfg.get("vision_cfg") or {}), dict(cfg.get("text_cfg") or {})
    family = next((family for family in FAMILIES if family.recognise(shapes, vision)), None)
    problem = None if family else families.image_of_open_clip(shapes, vision)
    named_text = open_clip_texts.recognise(shapes, text)
    if problem := problem or (None if named_text else families.text_of_open_clip(shapes, text)):
        raise UserError(problem)
    check_settings(cfg, vision, text)
    timm = any(name.startswith("visual.trunk.") for name in shapes)
    prefix = "text." if named_text or "text.token_embedding.weight" in shapes else ""
    bare = model_cfg is None
    if bare and None in (told.of("activation", "image"), told.of("activation", "text")):
        raise UserError(
            "bare CLIP weights do not tell their activation; pass activation='quick_gelu' (OpenAI's weights and those "
            "tuned from them) or activation='gelu' (most of open_clip's)"
        )
    plain = lambda side: told.of("activation", side) if bare else "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    if family:
        image = family.image_fields(shapes, vision)
    elif timm:
        image = open_clip_timm.image_fields(shapes, vision, told)
    else:
        image = image_fields(shapes, vision, plain("image"), told)
    as_openai = not timm and not prefix and image.get("pre_norm", family) and "logit_bias" not in shapes
    if bare and not timm and not image.get("pre_norm", family):
        why = "bare weights whose towers are not as OpenAI's do not tell the image tower's pool"
        image["pool"] = told.ask_pool("image", ("tok", "patches"), why)
    if bare and not as_openai:
        text["pool_type"] = told.ask_pool(
            "text", TEXT_POOLS, "bare weights whose towers are not as OpenAI's do not tell the text tower's pool"
        )
        text["no_causal_mask"] = text["pool_type"] in ("last", "first")
        text["eos_id"] = 2
    if named_text:
        texts = open_clip_texts.text_fields(shapes, text)
    else:
        texts = _text(shapes, prefix, text, plain("text"), told, bare)
    section = {"name": "two_tower", "image": image, "text": texts}
    section |= {"bias_init": -10.0 if "logit_bias" in shapes else None}
    rows = family.rows_of(shapes, image) if family else open_clip_timm.rows_of(shapes) if timm else IMAGE
    return section, _entries(section, rows, prefix), IGNORED


def check_settings(cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises a UserError for a setting of `model_cfg` that is neither read nor known to change nothing."""
    parts = {"model_cfg": cfg, "vision_cfg": vision, "text_cfg": text}
    for name, part in parts.items():
        check(part, READ[name], NEUTRAL[name], name)
        for key in ("act_kwargs", "norm_kwargs"):
            if key in part:
                check(part[key] or {}, READ[key], NEUTRAL[key], f"{name}.{key}")


def _entries(section, rows, prefix):
    image, text = section["image"], section["text"]
    if text.get("posemb", "learned") != "learned":
        texts = open_clip_texts.rows_of({"rep_dim": None, **text})
    else:
        texts = TEXT + (TEXT_HEAD_WITH_BIAS if text["head_bias"] else TEXT_HEAD)
    entries = expand(rows, "image/", "visual.", depth=image.get("depth", 0), patch=image.get("patch", 1))
    entries += expand(texts, "text/", prefix, depth=text["depth"])
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


def image_fields(shapes, cfg, plain, told):
    """Returns the fields of open_clip's own image tower."""
    width, _, patch, _ = shapes["visual.conv1.weight"]
    rows = shapes["visual.positional_embedding"][0] - 1
    side = math.isqrt(rows)
    size = cfg.get("image_size") or (side * patch if side * side == rows else None)
    pool = choose({"tok": "tok", "avg": "patches"}, cfg.get("pool_type", "tok"), "vision_cfg.pool_type")
    depth, mlp_dim = blocks(shapes, f"{TRANSFORMER}."), shapes[f"{TRANSFORMER}.0.mlp.c_fc.weight"][0]
    return dict(
        width=width,
        depth=depth,
        heads=width // cfg.get("head_width", 64) if cfg else heads_of(width, depth, mlp_dim, told),
        mlp_dim=mlp_dim,
        patch=patch,
        image_size=tuple(size) if isinstance(size, list) else size,
        activation=_activation(cfg, plain),
        norm_eps=_eps(cfg),
        pool=pool,
        cls=True,
        final_norm="pooled" if pool == "patches" and cfg.get("final_ln_after_pool") else "tokens",
        cls_position=True,
        patch_bias=False,
        pre_norm="visual.ln_pre.weight" in shapes,
        out_dim=shapes["visual.proj"][1] if "visual.proj" in shapes else None,
        head_bias=False,
        **_layer_scale(shapes, f"{TRANSFORMER}.0.ls_1.gamma"),
    )


def _text(shapes, prefix, cfg, plain, told, bare):
    vocab_size, width = shapes[f"{prefix}token_embedding.weight"]
    pool = cfg.get("pool_type", "argmax")
    if pool not in TEXT_POOLS:
        raise UserError(f"text_cfg.pool_type is `{pool}`; expected one of: {', '.join(TEXT_POOLS)}")
    linear, plain_head = (shapes.get(f"{prefix}text_projection{end}") for end in (".weight", ""))
    head = linear or (plain_head and plain_head[::-1])
    depth = blocks(shapes, f"{prefix}transformer.resblocks.")
    mlp_dim = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
    return dict(
        width=width,
        depth=depth,
        heads=text_heads(width, told) if bare else cfg.get("heads", 8),
        mlp_dim=mlp_dim,
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


def text_heads(width: int, told: Told) -> int:
    """Returns the heads of a bare file's text tower: width / 64 in all of OpenAI's and open_clip's."""
    given = told.of("heads", "text") if isinstance(told.heads, Mapping) else None
    if given is None and width % HEAD_WIDTH:
        raise UserError(
            f"the file does not tell the heads of the text tower (width {width}); pass heads=dict(text=...)"
        )
    return given or width // HEAD_WIDTH


def config(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `model_cfg` of our section.

    Raises:
      UserError: open_clip cannot express the model.
    """
    image, text = section["image"], section["text"]
    if not image or not text:
        raise UserError("open_clip's format is of two towers; this model has one")
    vision = next((vision for family in FAMILIES if (vision := family.config(image))), None)
    special = vision is not None
    if not special and "patch" not in image:
        raise UserError("open_clip has no such convolutional image tower")
    if not special:
        vision = _own_config(image) if image["pool"] in ("tok", "patches") else open_clip_timm.config(image)
    texts = open_clip_texts.config(text)
    hf_text = texts is not None
    if not hf_text:
        texts = _text_config(text)
    own = [(vision, image)] if not special and "timm_model_name" not in vision else []
    own += [] if hf_text else [(texts, text)]
    for part, fields in own:
        part["norm_kwargs"] = {"eps": fields.get("norm_eps", 1e-6)}
        if fields.get("activation", "gelu_tanh") == "gelu_tanh":
            part["act_kwargs"] = {"approximate": "tanh"}
        if fields.get("layer_scale") is not None:
            part["ls_init_value"] = fields["layer_scale"]
    cfg = dict(embed_dim=text["out_dim"] or text["width"], vision_cfg=vision, text_cfg=texts)
    cfg["quick_gelu"] = (image if hf_text else text).get("activation") == "quick_gelu"
    if section.get("bias_init") is not None:
        cfg["init_logit_bias"] = section["bias_init"]
    if hf_text or "init_logit_bias" in cfg:
        cfg["custom_text"] = True
    return cfg


def _text_config(text: Mapping[str, Any]) -> dict[str, Any]:
    texts = dict(context_length=text["length"], vocab_size=text["vocab_size"], width=text["width"])
    texts |= dict(heads=text["heads"], layers=text["depth"], mlp_ratio=text["mlp_dim"] / text["width"])
    texts |= dict(no_causal_mask=not text.get("causal", False), pool_type=text["pool"])
    texts |= {"eos_id": text["eos_id"]} if text.get("eos_id") else {}
    if text["out_dim"]:
        texts["proj_bias"] = text.get("head_bias", True)
    else:
        texts["proj_type"] = "none"
    return texts


def _own_config(image: Mapping[str, Any]) -> dict[str, Any]:
    lacks = [name for name in ("out_dim", "image_size") if not image.get(name)]
    if lacks:
        raise UserError(f"open_clip's image towers have {' and '.join(lacks)}; this one has none")
    vision = dict(image_size=image["image_size"], width=image["width"], layers=image["depth"])
    vision |= dict(patch_size=image["patch"], head_width=image["width"] // image["heads"])
    vision |= dict(mlp_ratio=image["mlp_dim"] / image["width"])
    vision |= {} if image.get("pre_norm") else {"no_ln_pre": True}
    if image["pool"] == "patches":
        vision |= dict(pool_type="avg", final_ln_after_pool=image["final_norm"] == "pooled")
    return vision


def outline(section: Mapping[str, Any]) -> tuple[dict, list]:
    """Returns (`model_cfg`, entries) that write a model whose section has all fields."""
    cfg = config(section)
    prefix = "text." if cfg.get("custom_text") else ""
    rows = open_clip_timm.TIMM_IMAGE if "timm_model_name" in cfg["vision_cfg"] else IMAGE
    if family := next((family for family in FAMILIES if family.config(section["image"])), None):
        rows = family.rows_of((), section["image"])
    return cfg, _entries(section, rows, prefix)
