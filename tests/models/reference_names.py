"""The names of the reference arrays (big_vision's) in ours: ordered (pattern, replacement), every match applied."""

import re

import flax
import numpy as np

RENAMES = (
    (r"^img/", "image/"),
    (r"^txt/", "text/"),
    (r"(^|/)(Transformer|Encoder_0)/", r"\1"),
    (r"encoderblock_(\d+)/", r"blocks_\1/"),
    (r"encoderblock/", "blocks/"),
    (r"MAPHead_0/LayerNorm_0/", "map_pool/norm/"),
    (r"MAPHead_0/", "map_pool/"),
    (r"LayerNorm_0/", "norm1/"),
    (r"LayerNorm_1/", "norm2/"),
    (r"MultiHeadDotProductAttention_0/", "attn/"),
    (r"MlpBlock_0/Dense_0/", "mlp/fc1/"),
    (r"MlpBlock_0/Dense_1/", "mlp/fc2/"),
    (r"encoder_norm/", "norm/"),
    (r"pre_logits/", "rep/"),
    (r"Embed_0/", "token_embed/"),
    (r"(^|/)embedding/", r"\1patch_embed/"),
    (r"pos_embedding$", "pos_embed"),
    (r"^t$", "logit_scale"),
    (r"^b$", "logit_bias"),
)


def to_params(arrays, like):
    """The arrays under `params/...` as a parameter tree of the shapes of `like`; nothing left over on either side."""
    wanted = flax.traverse_util.flatten_dict(like, sep="/")
    got = {}
    for key, value in arrays.items():
        if not key.startswith("params/"):
            continue
        name = key.removeprefix("params/")
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        got[name] = np.reshape(value, wanted[name].shape)  # projections: [D, heads, head_dim] and [heads, head_dim, D]
    assert sorted(got) == sorted(wanted)
    return flax.traverse_util.unflatten_dict(got, sep="/")
