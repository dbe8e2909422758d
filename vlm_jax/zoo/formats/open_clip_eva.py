"""Image towers of timm's class Eva in open_clip: PE-Core, EVA01-CLIP and EVA02-CLIP.

timm's name alone decides positions, heads, epsilon and the place of norms; tensors tell the rest.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.zoo.formats.open_clip_timm import TIMM_IMAGE, TRUNK_HEAD

NAME = re.compile(
    r"(?P<family>vit_pe_core|eva02|eva)_(?P<size>[a-z]+)_patch(?P<patch>\d+)(?P<clip>_clip)?_(?P<side>\d+)"
)
# timm's towers: width, depth, heads, mlp_dim.
SIZES = {
    "vit_pe_core_tiny_patch16_384": (192, 12, 3, 768),
    "vit_pe_core_small_patch16_384": (384, 12, 6, 1536),
    "vit_pe_core_base_patch16_224": (768, 12, 12, 3072),
    "vit_pe_core_large_patch14_336": (1024, 24, 16, 4096),
    "vit_pe_core_gigantic_patch14_448": (1536, 50, 16, 8960),
    "eva_giant_patch14_224": (1408, 40, 16, 6144),
    "eva_giant_patch14_clip_224": (1408, 40, 16, 6144),
    "eva02_base_patch16_clip_224": (768, 12, 12, 2048),
    "eva02_large_patch14_clip_224": (1024, 24, 16, 2730),
    "eva02_large_patch14_clip_336": (1024, 24, 16, 2730),
    "eva02_enormous_patch14_clip_224": (1792, 64, 16, 15360),
}
EVA02_GRID = (16, 16)  # of the pretraining, at 224 px with patches of 14
POOL_HEADS, POOL_MLP = 8, 4  # of PE-Core, at any size

FUSED = tuple(row for row in TIMM_IMAGE if "attn.qkv" in row[1])
FUSED_BIASES_APART = (
    *((f"{ours}/kernel", theirs.replace("#", ".weight#"), "matrix") for ours, theirs, _ in FUSED),
    ("blocks_{i}/attn/query/bias", "trunk.blocks.{i}.attn.q_bias", "same"),
    ("blocks_{i}/attn/value/bias", "trunk.blocks.{i}.attn.v_bias", "same"),
)
SEPARATE = tuple(
    (f"blocks_{{i}}/attn/{k}", f"trunk.blocks.{{i}}.attn.{k[0]}_proj", "dense") for k in ("query", "key", "value")
)
GATED = (
    ("blocks_{i}/mlp/gate", "trunk.blocks.{i}.mlp.fc1_g", "dense"),
    ("blocks_{i}/mlp/fc1", "trunk.blocks.{i}.mlp.fc1_x", "dense"),
)
NORMS = tuple((f"blocks_{{i}}/{part}/norm", f"trunk.blocks.{{i}}.{part}.norm", "norm") for part in ("attn", "mlp"))


def recognise(names: Collection[str], cfg: Mapping[str, Any]) -> bool:
    """Whether `vision_cfg` names a tower of this module."""
    return cfg.get("timm_model_name") in SIZES


def image_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the image tower; arguments as for `open_clip.image_fields`."""
    name, trunk = NAME.fullmatch(cfg["timm_model_name"]), "visual.trunk."
    pe, eva02, large = name["family"] == "vit_pe_core", name["family"] == "eva02", SIZES[name[0]][2]
    own = {key.removeprefix(f"{trunk}blocks.0."): shape for key, shape in shapes.items() if f"{trunk}blocks.0." in key}
    gated = "mlp.fc1_g.weight" in own
    width, _, patch, _ = shapes[f"{trunk}patch_embed.proj.weight"]
    pool = cfg.get("timm_pool", "avg")
    if pool != ("map" if pe else "token"):
        raise UserError(f"vision_cfg.timm_pool of {name[0]} is {pool!r}; expected {'map' if pe else 'token'}")
    fields = dict(
        width=width,
        depth=len({key.split(".")[3] for key in shapes if key.startswith(f"{trunk}blocks.")}),
        heads=large if SIZES[name[0]][0] // large != 64 else width // 64,
        mlp_dim=own["mlp.fc1_x.weight" if gated else "mlp.fc1.weight"][0],
        patch=patch,
        image_size=cfg.get("image_size"),
        activation="silu" if gated else "gelu",
        gated=gated,
        norm_eps=1e-5 if pe else 1e-6,
        attn_norm="attn.norm.weight" in own,
        mlp_norm="mlp.norm.weight" in own,
        attn_bias=True if "attn.qkv.bias" in own else ("query", "value", "out"),
        post_norm="branch" if name["size"] == "enormous" else False,
        pool="map" if pe else "tok",
        cls=f"{trunk}cls_token" in shapes,
        cls_position=f"{trunk}cls_token" in shapes,
        pre_norm=pe,
        patch_bias=not pe,
    )
    if pe:
        side = int(name["side"]) // int(name["patch"])
        fields |= dict(pool_heads=POOL_HEADS, pool_mlp_dim=POOL_MLP * width)
        fields |= dict(rotary=dict(reference=(side, side), offset=1.0 * fields["cls"], columns_first=True))
    elif eva02 and name["size"] != "enormous":
        fields |= dict(rotary=dict(reference=EVA02_GRID))
    if "gamma_1" in own:
        fields["layer_scale"] = 1.0
    for head in ("visual.head.proj", f"{trunk}head"):
        if f"{head}.weight" in shapes:
            fields |= dict(out_dim=shapes[f"{head}.weight"][0], head_bias=f"{head}.bias" in shapes)
    return fields


def rows_of(names: Collection[str], image: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Returns the key table of a tower with these tensors and fields."""
    qkv = FUSED if image["attn_bias"] is True else SEPARATE if image["gated"] else FUSED_BIASES_APART
    rows = [row for row in TIMM_IMAGE[:-1] if row not in FUSED and not (image["gated"] and row[0].endswith("mlp/fc1"))]
    rows = [
        (ours, theirs.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"), kind)
        for ours, theirs, kind in rows
    ]
    return (
        *rows,
        *qkv,
        *(GATED if image["gated"] else ()),
        *NORMS,
        TIMM_IMAGE[-1] if "visual.head.proj.weight" in names else TRUNK_HEAD,
    )


def config(image: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the `vision_cfg` of an image tower, or None if no tower of this module has its sizes."""
    sizes = tuple(image.get(key) for key in ("width", "depth", "heads", "mlp_dim"))
    side = image.get("image_size")
    side = side[0] if isinstance(side, list | tuple) and len({*side}) == 1 else side
    pe = bool(image.get("pool_heads"))
    if pe != (image.get("attn_bias", True) is True):
        return None
    for name, own in SIZES.items():
        found = NAME.fullmatch(name)
        native = own, int(found["patch"]), int(found["side"]), found["family"] == "vit_pe_core"
        if native == (sizes, image.get("patch"), side, pe):
            named = dict(image_size=side, timm_model_name=name, timm_model_pretrained=False)
            return named | dict(timm_pool="map" if pe else "token", timm_proj=None)
    return None
