"""The image tower of MobileCLIP-B in open_clip: a ViT behind a stem of convolutions (timm's `vit_base_mci_224`)."""

from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.models.variants import VARIANTS
from vlm_jax.zoo.formats.open_clip_resnet import conv_norm
from vlm_jax.zoo.formats.open_clip_timm import TIMM_IMAGE, TRUNK_HEAD
from vlm_jax.zoo.formats.open_clip_timm import image_fields as plain_fields
from vlm_jax.zoo.released import NOTHING

NAME, SIDE = "vit_base_mci_224", 224
STEM = "visual.trunk.patch_embed.backbone."


def recognise(names: Collection[str], cfg: Mapping[str, Any]) -> bool:
    """Whether tensors are of a tower of this module."""
    return {f"{STEM}0.bn.weight", f"{STEM}1.bn.weight", f"{STEM}2.conv.bias", "visual.trunk.cls_token"} <= {*names}


def image_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the image tower; arguments as for `open_clip.image_fields`."""
    first, second, last = (shapes[f"{STEM}{i}.conv.weight"] for i in range(3))
    patch = first[-1] * second[-1] * last[-1]
    plain = {**shapes, "visual.trunk.patch_embed.proj.weight": (last[0], 3, patch, patch)}
    fields = plain_fields(plain, {"timm_pool": "token", **cfg}, NOTHING)
    return fields | dict(stem=(first[0], second[0]), cls_position=False)


def rows_of(names: Collection[str], image: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Returns the key table of a tower with these fields."""
    backbone = "trunk.patch_embed.backbone"
    stem = [row for i in range(2) for row in conv_norm(f"stem_{i}", f"{backbone}.{i}.conv", f"{backbone}.{i}.bn")]
    return (*stem, ("patch_embed", f"{backbone}.2.conv", "conv2d"), *TIMM_IMAGE[1:-1], TRUNK_HEAD)


def config(image: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the `vision_cfg` of an image tower, or None if it has no such stem."""
    sizes = tuple(image.get(key) for key in ("width", "depth", "mlp_dim", "heads"))
    if not image.get("stem") or sizes != VARIANTS["B"] or image["image_size"] not in (SIDE, (SIDE, SIDE)):
        return None
    return dict(
        image_size=SIDE, timm_model_name=NAME, timm_model_pretrained=False, timm_pool="token", timm_proj=None
    )  # fmt: skip
