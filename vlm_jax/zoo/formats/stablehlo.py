"""Towers as StableHLO programs, which run without this project: image.stablehlo and text.stablehlo of `jax.export`.

    tower = export.deserialize(Path("clip/image.stablehlo").read_bytes())
    params = safetensors.numpy.load_file("clip/params.safetensors")
    embeddings = tower.call(params, images)  # float32 [n, H, W, 3] -> [n, D] of norm 1, any n

The programs take the parameters as they are in the file, and run on CPUs, GPUs and TPUs.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax import export
from PIL import Image

from vlm_jax import models
from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def check(content: Any) -> None:
    """Raises a UserError unless the model of a `read_back.Content` embeds and its input shapes are known."""
    try:
        import flatbuffers  # noqa: F401 (for `serialize`)
    except ImportError:
        raise UserError("stablehlo needs flatbuffers; pip install 'vlm_jax[export]'") from None
    if "embed" not in models.build(content.section).can:
        raise UserError("stablehlo holds towers that embed pictures and texts; this model has none")
    for side in _sides(content):
        _example(side, content)


def _sides(content: Any) -> list[str]:
    return [side for side in ("image", "text") if content.section.get(side)]


def write(folder: Path, content: Any, dtype: Any) -> None:
    """Writes a program for each tower; `dtype` is that of the parameters in the file."""
    params = {name: jax.ShapeDtypeStruct(tuple(leaf.shape), dtype) for name, leaf in content.shapes.items()}
    plain = {side: dict(content.section[side], implementation="xla") for side in _sides(content)}
    model = models.build(dict(content.section) | plain)  # kernels are of one platform
    (n,) = export.symbolic_shape("n")
    for side in plain:

        def tower(params, x, side=side):
            tree = unflatten_dict({name: value.astype(jnp.float32) for name, value in params.items()}, sep="/")
            return getattr(model.apply({"params": tree}, *((x, None) if side == "image" else (None, x))), side)

        row = _example(side, content)
        shape = jax.ShapeDtypeStruct((n, *row.shape), row.dtype)
        program = export.export(jax.jit(tower), platforms=PLATFORMS)(params, shape)
        (folder / f"{side}.stablehlo").write_bytes(program.serialize())


def _example(side: str, content: Any) -> np.ndarray:
    """One row of a tower's input, made as the model's own are."""
    needed = dict(image=("preprocess",), text=("tokenizer", "tokenize"))[side]
    if lacking := [name for name in needed if not getattr(content, name)]:
        raise UserError(f"stablehlo: the shape of the {side} tower's input is not known; pass {lacking[0]}=")
    if side == "image":
        example = ops.parse(content.preprocess)({"image": Image.new("RGB", (256, 256))}, np.random.default_rng(0))
        if "image" not in example or np.ndim(example["image"]) != 3:
            raise UserError("stablehlo takes whole pictures; this model's are packed patches of any shape")
        return np.asarray(example["image"])
    tokenizer = tokenizers.build(content.tokenizer)
    return ops.parse(content.tokenize, tokenizer)({"text": "a"}, np.random.default_rng(0))["token_ids"]
