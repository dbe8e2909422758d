"""Families of models that are known by name only: errors name the family, and the nearest that loads."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

VIT = "a CLIP with a Vision Transformer"
FOLDER = "its whole folder: put config.json beside the file"
OPEN_CLIP_FOLDER = "its whole folder, with open_clip_config.json"
FASTVIT = r"stages\.\d\.blocks\.0\.token_mixer\.|patch_embed\.0\.(rbr|reparam|conv_kxk)|network\.0\.0\."
# (regex of tensor names of an image tower or a lone model, family, nearest family that loads)
IMAGE = (
    (r"layer1\.0\.conv1\.weight", "a ResNet (not of a CLIP)", "a CLIP with a ResNet"),
    (r"stages\.0\.blocks\.0\.conv_dw\.weight", "ConvNeXt (not of a CLIP)", "a CLIP with a ConvNeXt"),
    (FASTVIT, "FastViT (MobileCLIP)", VIT),
    (r"patch_embed\.backbone\.stem\.|patch_embed\.backbone\.stages\.", "ViTamin", VIT),
    (r"patch_embed\.backbone\.", "a hybrid of convolutions and a ViT", "MobileCLIP-B"),
    (r"blocks\.0\.(attn\.q_proj\.weight|mlp\.(fc1_x|w1)\.weight)", "EVA02", OPEN_CLIP_FOLDER),
    (r"blocks\.0\.attn\.q_bias", "EVA01", OPEN_CLIP_FOLDER),
    (r"layers\.0\.blocks\.0\.attn\.relative_position_bias_table", "Swin", VIT),
    (r"blocks\.0\.attn\.rel_pos", "a ViT with relative positions", VIT),
    (r"(res)?blocks\.0\.attn\.(ln_[qk]|[qk]_norm)\.", "a ViT with normalised queries and keys", VIT),
)  # fmt: skip
# timm's names, of towers whose tensors have the names of a plain ViT.
TIMM = (
    (r"eva02", "EVA02 (not of a CLIP)", "EVA02-CLIP"),
    (r"eva", "EVA01 (not of a CLIP)", "EVA01-CLIP"),
    (r"vitamin", "ViTamin", VIT),
    (r"vit_\w*(rope|dinov3|pe_)", "a ViT with rotary positions", "PE-Core"),
)
# (regex of tensor names of a whole file, family, nearest)
WHOLE = (
    (r"(^|\.)visual_encoder\.blocks\.0\.", "BLIP", "CoCa of open_clip"),
    (r"^(image_encoder\.model\.|image_encoder\..*(rbr|reparam|token_mixer))", "MobileCLIP (Apple's own file)", VIT),
    (r"^(vision_tower|language_model|multi_modal_projector)\.", "LLaVA or the like", "its image tower alone"),
    (r"^visual\.blocks\.0\.(attn\.q_proj|attn\.q_bias|attn\.qkv)", "EVA-CLIP (its own repository)", VIT),
    (r"^(unet|model\.diffusion_model|first_stage_model)\.", "a diffusion model", "a folder of CLIP"),
    (r"^blocks\.0\.ls1\.gamma$", "DINOv2 (its own file)", "DINOv2 of Transformers"),
    (r"^blocks\.0\.attn\.qkv\.weight$", "a ViT of timm without its name", "timm:NAME:PATH"),
    (r"^(vision_model|text_model|vit|bert|encoder\.layer|embeddings)\.", "Transformers, bare", FOLDER),
)  # fmt: skip
TEXT_TOWER = re.compile(r"^text\.transformer\.(embeddings|encoder|shared|layers)\.")


def sentence(what: str, family: str, nearest: str) -> str:
    """Returns the error's text for a family that is not read here."""
    return f"{what} is {family}, which is not supported; the nearest that loads is {nearest}"


def image_of_open_clip(names: Collection[str], vision: Mapping[str, Any]) -> str | None:
    """Returns the error's text if the image tower of a model of open_clip is known by name only, else None."""
    for pattern, family, nearest in TIMM:
        if re.match(pattern, vision.get("timm_model_name") or ""):
            return sentence("the image tower", family, nearest)
    if {"visual.trunk.norm_pre.weight", "visual.trunk.attn_pool.latent"} <= {*names}:
        return f"the image tower is PE-Core or alike, whose positions bare weights do not tell; load {OPEN_CLIP_FOLDER}"
    if any(name.startswith(("visual.trunk.", "visual.layer1.")) for name in names):
        for pattern, family, nearest in IMAGE:
            if any(re.match(rf"visual\.(trunk\.)?({pattern})", name) for name in names):
                return sentence("the image tower", family, nearest)
        if "visual.trunk.patch_embed.proj.weight" not in names:
            named = vision.get("timm_model_name") or "of an unknown family"
            return sentence("the image tower", named, VIT)
    return None


def text_of_open_clip(names: Collection[str], text: Mapping[str, Any]) -> str | None:
    """As `image_of_open_clip`, of the text tower."""
    if text.get("hf_model_name") or any(TEXT_TOWER.match(name) for name in names):
        named = text.get("hf_model_name") or "a model of Transformers"
        return sentence("the text tower", named, "open_clip's own text transformer, RoBERTa or XLM-R")
    return None


def unknown(names: Collection[str]) -> str:
    """Returns what follows "holds n tensors" in the error for a file of no known format."""
    for pattern, family, nearest in WHOLE:
        if any(re.search(pattern, name) for name in names):
            return f"of {family}, which is not supported; the nearest that loads is {nearest}"
    for pattern, family, nearest in IMAGE:
        if any(re.match(pattern, name) for name in names):
            return f"of {family}, which is not supported; the nearest that loads is {nearest}"
    shown, heads = ", ".join(list(names)[:4]), {name.partition(".")[0] for name in names if "." in name}
    prefix = (
        f"; all names begin with `{min(heads)}.`: save them without it" if len(heads) == 1 and len(names) > 1 else ""
    )
    return f"({shown}, ...), which are of no format that is known{prefix}"


# model_type of Transformers that differs in name from the nearest that loads
NEAREST = {
    "deit": "vit", "beit": "vit", "data2vec-vision": "vit", "vit_mae": "vit", "vit_msn": "vit", "ijepa": "vit",
    "aimv2": "clip", "align": "clip", "clipseg": "clip", "owlvit": "clip", "blip": "clip", "blip-2": "clip",
    "flava": "clip", "convnext": "dinov2", "convnextv2": "dinov2", "swin": "dinov2", "resnet": "dinov2",
    "distilbert": "bert", "mpnet": "bert", "modernbert": "bert", "electra": "bert",
    "umt5": "mt5", "bart": "t5", "gemma3": "siglip", "paligemma": "siglip",
}  # fmt: skip


def nearest_type(kind: str, known: Collection[str]) -> str:
    """Returns the supported model_type of Transformers that is nearest to another."""
    alike = difflib.get_close_matches(kind, known, 1, cutoff=0.5)
    return NEAREST.get(kind) or (alike[0] if alike else "clip")
