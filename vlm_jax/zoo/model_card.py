"""Model cards: what a saved folder holds and how it is used, as the Hugging Face hub reads it (README.md)."""

import json
import math
from collections.abc import Mapping
from typing import Any

PARTS = {"image": "image tower", "text": "text tower", "encoder": "encoder", "decoder": "decoder"}
LIBRARIES = {"native": "vlm_jax", "hf": "transformers", "open_clip": "open_clip", "stablehlo": "vlm_jax"}


def text(content: Any, format: str) -> str:
    """Returns the model card of a `read_back.Content` in the format, a key of `LIBRARIES`.

    What nobody has told, training data and results, the card says is not stated; whoever publishes the model adds it.
    """
    model, shapes = content.section, content.shapes
    inputs = {key: getattr(content, key) for key in ("preprocess", "tokenizer", "tokenize")}
    sides = [side for side in PARTS if model.get(side)]
    front = dict(license=content.licence, library_name=LIBRARIES[format], pipeline_tag=_task(sides), tags=["vlm_jax"])
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items() if value),
        "---",
    ]
    count = lambda side: sum(math.prod(leaf.shape) for name, leaf in shapes.items() if name.startswith(f"{side}/"))
    total = sum(math.prod(leaf.shape) for leaf in shapes.values())
    lines += ["", f"# {' and '.join(PARTS[side] for side in sides).capitalize()}", ""]
    lines += [f"{total:,} parameters.", "", "| part | parameters | sizes |", "|---|---|---|"]
    lines += [f"| {PARTS[side]} | {count(side):,} | {_sizes(model[side])} |" for side in sides]
    lines += ["", *(f"- {name}: `{value}`" for name, value in inputs.items() if value)]
    lines += ["", "```python", "import vlm_jax", "", 'model = vlm_jax.load("this folder")', "```", ""]
    lines += ["Training data, results: not stated.", ""]
    return "\n".join(lines)


def _task(sides: list[str]) -> str:
    if "decoder" in sides:
        return "image-to-text" if "image" in sides else "text-generation"
    return "zero-shot-image-classification" if len(sides) > 1 else f"{'image-' * ('image' in sides)}feature-extraction"


def _sizes(section: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(section.items()) if value is not None)
