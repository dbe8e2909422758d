"""OpenAI's ResNets as image towers, in open_clip's layout and OpenAI's own files."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.zoo.formats.head_counts import HEAD_WIDTH

STAGE = "visual.layer{}."


def conv_norm(ours: str, conv: str, norm: str) -> tuple[tuple[str, str, str], ...]:
    """Returns the rows of a `ConvNorm`."""
    statistics = ((f"{ours}/norm/{own}", f"{norm}.running_{own}", "same") for own in ("mean", "var"))
    return ((f"{ours}/conv", conv, "conv2d"), (f"{ours}/norm", norm, "norm"), *statistics)


def recognise(names: Collection[str], cfg: Mapping[str, Any]) -> bool:
    """Whether tensors are of a tower of this module."""
    return {"visual.layer1.0.conv1.weight", "visual.conv3.weight", "visual.attnpool.c_proj.weight"} <= {*names}


def image_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the image tower; arguments as for `open_clip.image_fields`."""
    stages = tuple(_blocks(shapes, STAGE.format(stage)) for stage in (1, 2, 3, 4))
    width, rows = shapes["visual.conv3.weight"][0], shapes["visual.attnpool.positional_embedding"][0] - 1
    out_dim = shapes["visual.attnpool.c_proj.weight"][0]
    size = cfg.get("image_size") or 32 * math.isqrt(rows)
    return dict(
        type="resnet",
        stages=stages,
        width=width,
        heads=32 * width // cfg.get("head_width", HEAD_WIDTH),
        image_size=tuple(size) if isinstance(size, list) else size,
        out_dim=out_dim,
    )


def _blocks(shapes, prefix):
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def rows_of(names: Collection[str], image: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Returns the key table of a tower with these fields."""
    rows = [row for i in range(3) for row in conv_norm(f"stem_{i}", f"conv{i + 1}", f"bn{i + 1}")]
    number = 0
    for stage, count in enumerate(image["stages"], 1):
        for i in range(count):
            ours, theirs = f"blocks_{number}", f"layer{stage}.{i}"
            for k in (1, 2, 3):
                rows += conv_norm(f"{ours}/conv{k}", f"{theirs}.conv{k}", f"{theirs}.bn{k}")
            if not i:
                rows += conv_norm(f"{ours}/shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
            number += 1
    rows += [(f"attn_pool/{name}", f"attnpool.{name[0]}_proj", "dense") for name in ("query", "key", "value")]
    return (*rows, ("pos_embed", "attnpool.positional_embedding", "table"), ("head", "attnpool.c_proj", "dense"))


def config(image: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the `vision_cfg` of an image tower, or None if it is no ResNet."""
    if image.get("pool") != "attention":
        return None
    vision = dict(image_size=image["image_size"], layers=list(image["stages"]), width=image["width"], patch_size=None)
    return vision | {"head_width": 32 * image["width"] // image["heads"]}
