"""Plain Vision Transformers of timm, without a text tower: a folder of the hub, or bare weights with timm's name.

The name decides heads, activation and epsilon, as in timm; shapes give the other sizes.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.zoo.formats.open_clip_timm import TANH, TIMM_IMAGE
from vlm_jax.zoo.formats.settings import check, neutral
from vlm_jax.zoo.key_map import Entry, expand

NAME = re.compile(
    r"(?P<kind>vit|deit|deit3)_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)"
    r"_(?P<family>(clip_|clip_quickgelu_|siglip_|siglip_gap_|gap_)?\d+|(reg4_)?dinov2)"
)
HEADS = {"tiny": 3, "small": 6, "medium": 8, "base": 12, "large": 16, "huge": 16, "giant": 16, "giantopt": 16}
HEADS |= {"gigantic": 16, "so400m": 16}
ROWS = tuple((ours, theirs.removeprefix("trunk."), kind) for ours, theirs, kind in TIMM_IMAGE[:-1])
READ = {"architecture", "pretrained_cfg", "global_pool", "num_classes", "num_features"}
NEUTRAL = neutral("license label_names label_descriptions paper_ids origin_url", model_args=[{}])
POOLS = {"token": "tok", "avg": "gap", "map": "map"}


def describe(shapes: Mapping[str, tuple], name: str, settings: Mapping[str, Any] | None = None):
    """Returns (config section of our model, entries of its key table) of weights with timm's name.

    Args:
      shapes: tensor name -> shape.
      name: such as "vit_base_patch16_224" or "vit_base_patch16_224.augreg_in21k".
      settings: the config.json beside the weights, or None.

    Raises:
      UserError: the name is of no family that is read here, or the tensors have other sizes.
    """
    found = NAME.fullmatch(name.partition(".")[0])
    glu = "dinov2" in name and found is not None and found["size"] == "giant"
    if not found or found["size"] not in HEADS or glu or "blocks.0.attn.qkv.weight" not in shapes:
        raise UserError(
            f"timm's `{name:.60}` is not read; of timm, plain Vision Transformers are: vit_SIZE_patchN_SIDE, deit_..., "
            "deit3_..., ..._clip_..., ..._siglip_..., ..._dinov2"
        )
    check(settings or {}, READ, NEUTRAL, "config.json")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    if patch != int(found["patch"]):
        raise UserError(f"the weights are no {name:.60}: their patches have {patch} px")
    cls, apart = "cls_token" in shapes, found["kind"] == "deit3" or "reg_token" in shapes  # positions of patches alone
    side = math.isqrt(shapes["pos_embed"][1] - (cls and not apart))
    clip = found["family"].startswith("clip")
    fields = dict(
        width=width,
        depth=len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
        heads=16 if found["family"].startswith("gap") and found["size"] == "base" else HEADS[found["size"]],
        mlp_dim=shapes["blocks.0.mlp.fc1.weight"][0],
        patch=patch,
        image_size=side * patch,
        activation="quick_gelu" if "quickgelu" in name else "gelu_tanh" if re.match(TANH, found[0]) else "gelu",
        norm_eps=1e-5 if clip else 1e-6,
        pool="map" if "attn_pool.latent" in shapes else "tok" if cls else "gap",
        pre_norm=clip,
        patch_bias="patch_embed.proj.bias" in shapes,
        cls=cls,
        cls_position=cls and not apart,
        **({"layer_scale": 1.0} if "blocks.0.ls1.gamma" in shapes else {}),
        **({} if "blocks.0.attn.qkv.bias" in shapes else {"attn_bias": ("out",)}),
        **({"registers": shapes["reg_token"][1]} if "reg_token" in shapes else {}),
    )
    pool = (settings or {}).get("global_pool")
    if pool is not None and POOLS.get(pool) != fields["pool"]:
        raise UserError(f"config.json has global_pool {pool!r:.40}; {name:.60} has another here: {fields['pool']}")
    if "head.weight" in shapes:
        fields |= dict(out_dim=shapes["head.weight"][0], head_bias="head.bias" in shapes)
    entries: list[Entry] = expand([*ROWS, ("head", "head", "dense")], "image/", "", depth=fields["depth"], patch=patch)
    return {"name": "two_tower", "image": fields, "text": None}, entries
