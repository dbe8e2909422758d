"""Image towers of timm in open_clip: plain Vision Transformers, as SigLIP and CLIP have them.

open_clip builds the tower by timm's name alone: it decides patch, picture size, heads, activation and epsilon. The
config's `act_kwargs`, `norm_kwargs` and `head_width` have no effect. Exports of version 0.1 have names without such a
meaning; for these, the config's values are read.
"""

import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.variants import VARIANTS
from vlm_jax.zoo.formats.head_counts import heads_of
from vlm_jax.zoo.released import Told

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
    ("head", "head.proj", "dense"),  # `timm_proj`
)
TRUNK_HEAD = ("head", "trunk.head", "dense")  # without it
POOLS = {"map": "map", "token": "tok", "tok": "tok", "avg": "gap"}
NAME = re.compile(
    r"vit_(?P<size>[a-z0-9]+)_patch(?P<patch>\d+)_(?P<family>clip|siglip|gap)(?P<more>(_[a-z]+)*)_(?P<side>\d+)"
)
SIZES = {"base": "B", "large": "L", "huge": "H", "so400m": "So400m", "giant": "g", "giantopt": "g-opt", "gigantic": "G"}
TANH = r"vit_(giantopt_patch16|so400m_patch16|base_patch32)_siglip|vit_large_patch16_siglip(_gap)?_512"
# timm's SigLIP towers: size and patch -> sides of pictures, for pools "map" and "gap".
SIGLIP = {
    ("base", 16): ((224, 256, 384, 512), (224, 256, 384, 512)),
    ("base", 32): ((256,), (256,)),
    ("large", 16): ((256, 384, 512), (256, 384, 512)),
    ("so400m", 14): ((224, 378, 384), (224, 378, 384, 448, 896)),
    ("so400m", 16): ((256, 384, 512), (256, 384, 512)),
    ("giantopt", 16): ((256, 384), (256, 384)),
}


def image_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any], told: Told) -> dict[str, Any]:
    """Returns the fields of the image tower; arguments as for `open_clip.image_fields`."""
    trunk = "visual.trunk."
    width, _, patch, _ = shapes[f"{trunk}patch_embed.proj.weight"]
    depth = len({name.split(".")[3] for name in shapes if name.startswith(f"{trunk}blocks.")})
    mlp_dim, cls = shapes[f"{trunk}blocks.0.mlp.fc1.weight"][0], f"{trunk}cls_token" in shapes
    name = NAME.fullmatch(cfg.get("timm_model_name") or "")
    size = cfg.get("image_size")
    fields = dict(
        width=width,
        depth=depth,
        heads=_heads(name, cfg, (width, depth, mlp_dim), told),
        mlp_dim=mlp_dim,
        patch=patch,
        image_size=tuple(size) if isinstance(size, list) else size,
        activation=_activation(name, cfg, told),
        norm_eps=1e-5 if name and name["family"] == "clip" else (cfg.get("norm_kwargs") or {}).get("eps", 1e-6),
        pool=_pool(cfg, name, f"{trunk}attn_pool.latent" in shapes, cls, told),
        **({"layer_scale": 1.0} if f"{trunk}blocks.0.ls1.gamma" in shapes else {}),
        **({} if f"{trunk}blocks.0.attn.qkv.bias" in shapes else {"attn_bias": ("out",)}),
    )
    if cls:
        fields |= dict(cls=True, cls_position=True)
    if f"{trunk}reg_token" in shapes:
        fields["registers"] = shapes[f"{trunk}reg_token"][1]
    if f"{trunk}norm_pre.weight" in shapes:
        fields["pre_norm"] = True
        fields["patch_bias"] = f"{trunk}patch_embed.proj.bias" in shapes
    for head in ("visual.head.proj", f"{trunk}head"):
        if f"{head}.weight" in shapes:
            fields |= dict(out_dim=shapes[f"{head}.weight"][0], head_bias=f"{head}.bias" in shapes)
    return fields


def rows_of(shapes: Mapping[str, tuple]) -> tuple[tuple[str, str, str], ...]:
    """Returns the rows of the key table for the tower's head."""
    return (*TIMM_IMAGE[:-1], TRUNK_HEAD) if "visual.trunk.head.weight" in shapes else TIMM_IMAGE


def _pool(cfg: Mapping[str, Any], name: re.Match | None, attends: bool, cls: bool, told: Told) -> str:
    if attends:
        return "map"
    if not cfg and cls:
        return told.ask_pool(
            "image", ("tok", "patches"), "bare weights with a cls token do not tell their image tower's pool"
        )
    pool = cfg.get("timm_pool", "avg")
    if pool == "" and name:  # the model's own
        pool = {"clip": "token", "gap": "avg"}.get(name["family"], pool)
    if pool not in POOLS:
        raise UserError(f"vision_cfg.timm_pool is `{pool}`; expected one of: {', '.join(POOLS)}")
    return "patches" if POOLS[pool] == "gap" and cls else POOLS[pool]


def _heads(name: re.Match | None, cfg: Mapping[str, Any], sizes: tuple[int, int, int], told: Told) -> int:
    if name and name[0] == "vit_base_patch16_gap_224":
        return 16
    if name and SIZES.get(name["size"]) in VARIANTS:
        return VARIANTS[SIZES[name["size"]]][3]
    if name and sizes[0] % 64 == 0:  # timm's other sizes
        return sizes[0] // 64
    return sizes[0] // cfg["head_width"] if "head_width" in cfg else heads_of(*sizes, told)


def _activation(name: re.Match | None, cfg: Mapping[str, Any], told: Told) -> str:
    if name:
        return "quick_gelu" if "quickgelu" in name[0] else "gelu_tanh" if re.match(TANH, name[0]) else "gelu"
    if not cfg:
        return told.of("activation", "image")
    return "gelu_tanh" if (cfg.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def config(image: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `vision_cfg` of an image tower.

    Raises:
      UserError: timm has no name for such a tower.
    """
    if extra := [name for name in ("cls", "registers", "pre_norm", "layer_scale") if image.get(name)]:
        raise UserError(f"timm's SigLIP towers, which open_clip's format needs, have no {', '.join(extra)}")
    if image.get("attn_bias", True) is not True:
        raise UserError("timm's SigLIP towers, which open_clip's format needs, have biases of query, key and value")
    side, sizes = image.get("image_size"), (image["width"], image["depth"], image["mlp_dim"], image["heads"])
    side = side[0] if isinstance(side, list | tuple) and len({*side}) == 1 else side
    size = next((theirs for theirs, ours in SIZES.items() if VARIANTS[ours] == sizes), None)
    pools = dict(zip(("map", "gap"), SIGLIP.get((size, image["patch"]), ((), ())), strict=True))
    name = f"vit_{size}_patch{image['patch']}_siglip{'_gap' if image['pool'] == 'gap' else ''}_{side}"
    if side not in pools.get(image["pool"], ()):
        shape = (
            f"width {sizes[0]}, depth {sizes[1]}, {sizes[3]} heads, patches of {image['patch']} px, image_size {side}"
        )
        raise UserError(f"timm has no image tower of {shape}, pool `{image['pool']}`, which open_clip's format needs")
    return dict(
        image_size=side,
        timm_model_name=name,
        timm_model_pretrained=False,
        timm_pool={"gap": "avg"}.get(image["pool"], image["pool"]),
        timm_proj="linear" if image.get("out_dim") else "none",
        timm_proj_bias=bool(image.get("out_dim") and image.get("head_bias")),
    )
