"""ConvNeXt as image tower of open_clip, which builds it by timm's name."""

from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.models.convnext import VARIANTS

TRUNK = "visual.trunk."
FIRST = f"{TRUNK}stages.0.blocks.0."


def recognise(names: Collection[str], cfg: Mapping[str, Any]) -> bool:
    """Whether tensors are of a tower of this module."""
    plain = {f"{FIRST}conv_dw.weight", f"{FIRST}gamma", f"{TRUNK}stem.0.weight", f"{TRUNK}head.norm.weight"}
    return plain <= {*names} and f"{FIRST}mlp.grn.weight" not in names


def image_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the image tower; arguments as for `open_clip.image_fields`."""
    blocks = [{n.split(".")[5] for n in shapes if n.startswith(f"{TRUNK}stages.{stage}.blocks.")} for stage in range(4)]
    widths = tuple(shapes[f"{TRUNK}stages.{stage}.blocks.0.gamma"][0] for stage in range(4))
    named, size = cfg.get("timm_model_name") or _name(tuple(map(len, blocks)), widths) or "", cfg.get("image_size")
    fields = dict(
        type="convnext",
        stages=tuple(map(len, blocks)),
        widths=widths,
        image_size=tuple(size) if isinstance(size, list) else size,
        norm_eps=1e-5 if named.startswith("convnext_xxlarge") else 1e-6,
        pool="gap",
        head_bias=any(f"visual.head.{head}.bias" in shapes for head in ("proj", "mlp.fc2")),
    )
    if "visual.head.mlp.fc1.weight" in shapes:
        return fields | dict(
            rep_dim=shapes["visual.head.mlp.fc1.weight"][0], out_dim=shapes["visual.head.mlp.fc2.weight"][0]
        )
    return fields | dict(out_dim=shapes["visual.head.proj.weight"][0] if "visual.head.proj.weight" in shapes else None)


def _name(stages, widths):
    return next((f"convnext_{name}" for name, own in VARIANTS.items() if own == (stages, widths)), None)


def rows_of(names: Collection[str], image: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Returns the key table of a tower with these fields."""
    rows, number = [("stem", "trunk.stem.0", "conv2d"), ("stem_norm", "trunk.stem.1", "norm")], 0
    for stage, count in enumerate(image["stages"]):
        for i in range(count):
            ours, theirs = f"blocks_{number}", f"trunk.stages.{stage}.blocks.{i}"
            if stage and not i:
                rows.append((f"{ours}/shrink_norm", f"trunk.stages.{stage}.downsample.0", "norm"))
                rows.append((f"{ours}/shrink", f"trunk.stages.{stage}.downsample.1", "conv2d"))
            rows.append((f"{ours}/depthwise", f"{theirs}.conv_dw", "conv2d"))
            rows.append((f"{ours}/norm", f"{theirs}.norm", "norm"))
            rows += [(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}", "dense") for name in ("fc1", "fc2")]
            rows.append((f"{ours}/layer_scale", f"{theirs}.gamma", "same"))
            number += 1
    rows.append(("norm", "trunk.head.norm", "norm"))
    if image.get("rep_dim"):
        return (*rows, ("rep", "head.mlp.fc1", "dense"), ("head", "head.mlp.fc2", "dense"))
    return (*rows, ("head", "head.proj", "dense"))


def config(image: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the `vision_cfg` of an image tower, or None if it is no ConvNeXt with a name in timm."""
    name = _name(image.get("stages"), image.get("widths"))
    if name is None or image["pool"] != "gap":
        return None
    proj = "mlp" if image["rep_dim"] else "linear" if image["out_dim"] else "none"
    named = dict(image_size=image["image_size"], timm_model_name=name, timm_model_pretrained=False)
    return named | dict(timm_pool="", timm_proj=proj, timm_proj_bias=bool(image["out_dim"] and image["head_bias"]))
