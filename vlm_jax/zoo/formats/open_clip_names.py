"""open_clip's configs by name, of the models that load: open_clip_configs.json, from open_clip 3.3 (MIT licence)."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError, near

FILE = Path(__file__).with_name("open_clip_configs.json")


@functools.cache
def configs() -> dict[str, Any]:
    """Returns name -> `model_cfg`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def config(name: str) -> dict[str, Any]:
    """Returns the `model_cfg` of a name, such as "ViT-B-32"; raises a UserError if no such model loads."""
    if name not in configs():
        hint = near(name, configs(), "`vlm-jax models open_clip` lists the names")
        raise UserError(f"no config of open_clip that loads has the name `{name:.60}`; {hint}")
    return configs()[name]


def check(name: str, section: Mapping[str, Any]) -> None:
    """Raises a UserError if weights, read as `section`, have other sizes than the config of the name."""
    cfg = config(name)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    image, texts = section["image"], section.get("text") or {}
    sizes = {"embed_dim": (cfg.get("embed_dim"), image.get("out_dim"))}
    if image.get("type") is None:
        sizes |= {f"vision_cfg.{key}": (vision.get(key), image.get(ours)) for key, ours in IMAGE.items()}
    sizes |= {f"text_cfg.{key}": (text.get(key), texts.get(ours)) for key, ours in TEXT.items()}
    for key, (said, has) in sizes.items():
        if None not in (said, has) and said != has:
            raise UserError(f"the weights are no {name}: its {key} is {said}, theirs {has}")


IMAGE = {"width": "width", "layers": "depth", "patch_size": "patch"}
TEXT = {"width": "width", "layers": "depth", "vocab_size": "vocab_size", "context_length": "length"}
