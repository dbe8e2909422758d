"""big_vision's npz files: LiT, SigLIP, SigLIP 2, Cap, CapPa and lone towers, with old and new names.

The arrays' shapes give sizes, heads, pool and head. File names tell tokenizer and preprocessing of released files.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.zoo.key_map import expand
from vlm_jax.zoo.released import NOTHING, Told

log = logging.getLogger(__name__)

ROOTS = ("params/", "opt/target/")  # of the parameters, in files that hold more
OLD_NAMES = (  # (pattern, today's name): submodules were numbered over all classes, positions lived elsewhere
    (r"/LayerNorm_2/", "/LayerNorm_1/"),
    (r"/MultiHeadDotProductAttention_1/", "/MultiHeadDotProductAttention_0/"),
    (r"/MlpBlock_3/", "/MlpBlock_0/"),
    (r"(Transformer/(posembed_input/)?|Encoder_0/)pos_embedding$", "pos_embedding"),
)


def _encoder(block: str) -> tuple[tuple[str, str, str], ...]:
    attn = f"{block}/MultiHeadDotProductAttention_0"
    return (
        ("blocks_{i}/norm1", f"{block}/LayerNorm_0", "flax"),
        ("blocks_{i}/attn/query", f"{attn}/query", "flax_heads"),
        ("blocks_{i}/attn/key", f"{attn}/key", "flax_heads"),
        ("blocks_{i}/attn/value", f"{attn}/value", "flax_heads"),
        ("blocks_{i}/attn/out", f"{attn}/out", "flax_out"),
        ("blocks_{i}/norm2", f"{block}/LayerNorm_1", "flax"),
        ("blocks_{i}/mlp/fc1", f"{block}/MlpBlock_0/Dense_0", "flax"),
        ("blocks_{i}/mlp/fc2", f"{block}/MlpBlock_0/Dense_1", "flax"),
    )


POOL_AND_HEAD = (
    ("pos_embed", "pos_embedding", "same"),
    ("map_pool/probe", "MAPHead_0/probe", "same"),
    ("map_pool/attn/query", "MAPHead_0/MultiHeadDotProductAttention_0/query", "flax_heads"),
    ("map_pool/attn/key", "MAPHead_0/MultiHeadDotProductAttention_0/key", "flax_heads"),
    ("map_pool/attn/value", "MAPHead_0/MultiHeadDotProductAttention_0/value", "flax_heads"),
    ("map_pool/attn/out", "MAPHead_0/MultiHeadDotProductAttention_0/out", "flax_out"),
    ("map_pool/norm", "MAPHead_0/LayerNorm_0", "flax"),
    ("map_pool/mlp/fc1", "MAPHead_0/MlpBlock_0/Dense_0", "flax"),
    ("map_pool/mlp/fc2", "MAPHead_0/MlpBlock_0/Dense_1", "flax"),
    ("rep", "pre_logits", "flax"),
    ("head", "head", "flax"),
)
IMAGE = (("patch_embed", "embedding", "flax_conv"), ("cls", "cls", "same"), *POOL_AND_HEAD)
PACKED_IMAGE = (
    ("patch_embed", "embedding", "flax"),
    ("pos_embed", "pos_embedding", "flax_grid"),
    *(row for row in POOL_AND_HEAD if row[0] != "pos_embed"),
)
TEXT = (("token_embed", "Embed_0", "flax"), *POOL_AND_HEAD)
BERT_BLOCK = "BertEncoder_0/encoder_block/layer_sequence/layers_{i}"
BERT = (
    ("token_embed", "BertEncoder_0/embedder/embedders_token_ids", "flax"),
    ("pos_embed", "BertEncoder_0/embedder/embedders_position_ids/embedding", "table"),
    ("token_type_embed", "BertEncoder_0/embedder/embedders_segment_ids/embedding", "same"),
    ("pre_norm", "BertEncoder_0/layer_norm", "flax"),
    ("blocks_{i}/attn/query", f"{BERT_BLOCK}/attention_block/attention_layer/query", "flax"),
    ("blocks_{i}/attn/key", f"{BERT_BLOCK}/attention_block/attention_layer/key", "flax"),
    ("blocks_{i}/attn/value", f"{BERT_BLOCK}/attention_block/attention_layer/value", "flax"),
    ("blocks_{i}/attn/out", f"{BERT_BLOCK}/attention_block/dense_layer", "flax"),
    ("blocks_{i}/norm1", f"{BERT_BLOCK}/attention_block/layer_norm", "flax"),
    ("blocks_{i}/mlp/fc1", f"{BERT_BLOCK}/mlp_block/mlp/dense_layer", "flax"),
    ("blocks_{i}/mlp/fc2", f"{BERT_BLOCK}/mlp_block/dense_layer", "flax"),
    ("blocks_{i}/norm2", f"{BERT_BLOCK}/mlp_block/layer_norm", "flax"),
    ("head", "head", "flax"),
)
DECODER_BLOCK = (  # {block}: "EncDecBlock{i}", or "EncDecBlock*1": stacked on the second axis
    ("blocks_{i}/norm1", "{block}/LayerNorm1", "flax"),
    ("blocks_{i}/cross_norm", "{block}/LayerNorm2", "flax"),
    ("blocks_{i}/norm2", "{block}/LayerNorm3", "flax"),
    *(
        (f"blocks_{{i}}/{ours}/{name}", f"{{block}}/{theirs}/{name}", "flax_out" if name == "out" else "flax_heads")
        for ours, theirs in (("attn", "SelfAttn"), ("cross_attn", "CrossAttn"))
        for name in ("query", "key", "value", "out")
    ),
    ("blocks_{i}/mlp/fc1", "{block}/MLP/Dense_0", "flax"),
    ("blocks_{i}/mlp/fc2", "{block}/MLP/Dense_1", "flax"),
)
DECODER = (("decoder/token_embed", "EmbedTargets", "flax"), ("decoder/norm", "LayerNorm", "flax"))
CAPTIONER = (("decoder/pos_embed", "pos_embedding_decoder", "same"),)
TEXT_POOLS = ("last", "first", "mean", "max")  # of text_transformer, that have no parameters
SCALES = (("logit_scale", "t", "one"), ("logit_bias", "b", "one"))


def of_today(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters among arrays: today's name, without a root -> array."""
    root = next((root for root in ROOTS if any(name.startswith(root) for name in tensors)), "")
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(root):
            name = name.removeprefix(root)
            for old, new in OLD_NAMES:
                name = re.sub(old, new, name)
            if name in renamed:
                raise UserError(f"the file has `{name}` twice, under an old and a new name")
            renamed[name] = tensor
    return renamed


def recognise(names) -> bool:
    """Whether arrays of these names are big_vision's."""
    return any(re.search(r"(^|/)(Transformer/encoder|Encoder_0/encoder|BertEncoder_0/)", name) for name in names)


def describe(tensors: Mapping[str, Any], told: Told = NOTHING) -> tuple[dict, list]:
    """Returns the model of these arrays, from shapes.

    Args:
      tensors: what `of_today` returned, name -> `tensors.Tensor`.
      told: the pools that shapes do not tell; big_vision's "0", the first patch, is "first".

    Returns:
      (config section of our model, entries of its key table)
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if any(name.startswith("decoder/") for name in shapes):
        return _captioner(shapes)
    # SigLIP's, which has a bias beside the scale: its texts pool their last token.
    told = told.with_pool("text", "last") if "b" in shapes else told
    two = any(name.startswith(("img/", "txt/")) for name in shapes)
    section, entries = {"name": "two_tower", "image": None, "text": None}, []
    for side, prefix in (("image", "img/"), ("text", "txt/")):
        prefix = prefix if two else ""
        below = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        is_text = "Embed_0/embedding" in below or any(name.startswith("BertEncoder_0/") for name in below)
        is_image = "embedding/kernel" in below
        if (side == "image" and not is_image) or (side == "text" and not is_text):
            continue
        if side == "image":
            section[side], rows = _image(below, told), PACKED_IMAGE if len(below["embedding/kernel"]) == 2 else IMAGE
        elif "Embed_0/embedding" in below:
            section[side], rows = _text(below, told), TEXT
        else:
            section[side], rows = _bert(below), BERT
        entries += tower_entries(rows, side, prefix, section[side], stacked="encoderblock" in _blocks(below))
    if not section["image"] and not section["text"]:
        raise UserError("no array has the names of a big_vision tower; expected img/..., txt/... or embedding/kernel")
    if section["image"] and section["text"]:
        section["bias_init"] = -10.0 if "b" in shapes else None
        entries += expand(SCALES)
    return section, entries


def tower_entries(rows, side: str, prefix: str, fields: Mapping[str, Any], stacked: bool) -> list:
    """Returns the entries of a tower; `stacked`: blocks are one array, with a leading layer axis."""
    if rows is not BERT:
        root = "Encoder_0/" if side == "text" else "Transformer/"
        block = f"{root}encoderblock*0" if stacked else f"{root}encoderblock_{{i}}"
        rows = (*rows, *_encoder(block), ("norm", f"{root}encoder_norm", "flax"))
    size, patch = fields.get("image_size") or 0, fields.get("patch", 1)
    grid = (size if isinstance(size, int) else size[0]) // patch
    return expand(rows, f"{side}/", prefix, depth=fields["depth"], heads=fields["heads"], patch=patch, grid=grid)


def captioner_entries(image: Mapping, decoder: Mapping, stacked_image: bool, stacked_decoder: bool) -> list:
    """Returns the entries of a captioner; `stacked_...`: the blocks of a part are one array."""
    block = "EncDecBlock*1" if stacked_decoder else "EncDecBlock{i}"
    rows = [(ours, theirs.replace("{block}", block), kind) for ours, theirs, kind in DECODER_BLOCK]
    return [
        *tower_entries(IMAGE, "image", "encoder/", image, stacked_image),
        *expand(rows, "decoder/", "decoder/", depth=decoder["depth"], heads=decoder["heads"]),
        *expand((*DECODER, ("head", "LogitsDense", "flax")), "", "decoder/"),
        *expand(CAPTIONER),
    ]


def _captioner(shapes: Mapping[str, tuple]) -> tuple[dict, list]:
    below = {name.removeprefix("encoder/"): shape for name, shape in shapes.items() if name.startswith("encoder/")}
    image = _image(below, Told(pool="gap")) | {"pool": "none"}
    stacked = "decoder/EncDecBlock/LayerNorm1/scale" in shapes
    first = f"decoder/EncDecBlock{'' if stacked else 0}"
    blocks = {match[1] for name in shapes if (match := re.match(r"decoder/EncDecBlock(\d+)/", name))}
    layer = (1,) if stacked else ()
    query = shapes[f"{first}/SelfAttn/query/kernel"]
    fc1 = shapes[f"{first}/MLP/Dense_0/kernel"]
    inputs, width = shapes["decoder/EmbedTargets/embedding"]
    vocab_size = shapes["decoder/LogitsDense/kernel"][1]
    decoder = dict(
        width=width,
        depth=query[1] if stacked else len(blocks),
        heads=query[1 + len(layer)],
        mlp_dim=fc1[-1],
        vocab_size=vocab_size,
        length=shapes["pos_embedding_decoder"][1],
        mask_token=inputs == vocab_size + 1,
        norm_bias=f"{first}/LayerNorm1/bias" in shapes,
        attn_bias=f"{first}/SelfAttn/query/bias" in shapes,
        mlp_bias=f"{first}/MLP/Dense_0/bias" in shapes,
        logits_bias="decoder/LogitsDense/bias" in shapes,
    )
    section = {"name": "captioner", "image": image, "decoder": decoder}
    return section, captioner_entries(image, decoder, "encoderblock" in _blocks(below), stacked)


def _blocks(shapes):
    return {match[1] for name in shapes if (match := re.search(r"/(encoderblock(?:_\d+)?|layers_\d+)/", name))}


def _encoder_fields(shapes, root):
    blocks = _blocks(shapes)
    stacked = "encoderblock" in blocks
    first = f"{root}{'encoderblock' if stacked else 'encoderblock_0'}/"
    kernel = shapes[f"{first}MultiHeadDotProductAttention_0/query/kernel"]
    fields = dict(
        width=kernel[-3],
        depth=kernel[0] if stacked else len(blocks),
        heads=kernel[-2],
        mlp_dim=shapes[f"{first}MlpBlock_0/Dense_0/kernel"][-1],
    )
    if "pre_logits/kernel" in shapes:
        fields["rep_dim"] = shapes["pre_logits/kernel"][-1]
    return fields | _head(shapes)


def _head(shapes):
    if "head/kernel" not in shapes:
        return {}
    return dict(out_dim=shapes["head/kernel"][-1], head_bias="head/bias" in shapes)


def _image(shapes, told):
    fields = _encoder_fields(shapes, "Transformer/")
    kernel, table = shapes["embedding/kernel"], shapes.get("pos_embedding")
    if len(kernel) == 2:  # NaFlex: patches come flat, the table is a grid
        patch = math.isqrt(kernel[0] // 3)
        fields |= dict(patch=patch, image_size=(table[0] * patch, table[1] * patch))
    else:
        fields |= dict(patch=kernel[0], posemb="sincos2d" if table is None else "learned")
    if "MAPHead_0/probe" in shapes:
        fields["pool"] = "map"
    elif "cls" in shapes:
        # A table of g * g + 1 rows has the cls token's first; otherwise the token has no position.
        covers = table is not None and math.isqrt(table[1] - 1) ** 2 == table[1] - 1
        fields |= dict(pool="tok", cls_position=covers)
    else:
        fields["pool"] = told.ask_pool("image", ("gap", "first"), "the arrays do not tell the image tower's pool")
    return fields


def _text(shapes, told):
    vocab_size, _ = shapes["Embed_0/embedding"]
    mapped = "MAPHead_0/probe" in shapes
    pool = "map" if mapped else told.ask_pool("text", TEXT_POOLS, "the arrays do not tell the text tower's pool")
    fields = dict(vocab_size=vocab_size, length=shapes["pos_embedding"][1], pool=pool)
    return _encoder_fields(shapes, "Encoder_0/") | fields


def _bert(shapes):
    width = shapes["BertEncoder_0/layer_norm/scale"][0]
    vocab_size, _ = shapes["BertEncoder_0/embedder/embedders_token_ids/embedding"]
    block = "BertEncoder_0/encoder_block/layer_sequence/layers_0/"
    return dict(
        width=width,
        depth=len(_blocks(shapes)),
        heads=max(width // 64, 1),  # BERT's base and large; 2-D projections do not tell
        mlp_dim=shapes[f"{block}mlp_block/mlp/dense_layer/kernel"][1],
        norm_eps=1e-12,
        vocab_size=vocab_size,
        length=shapes["BertEncoder_0/embedder/embedders_position_ids/embedding"][0],
        token_types=shapes["BertEncoder_0/embedder/embedders_segment_ids/embedding"][0],
        post_norm=True,
        pre_norm=True,
        pad_mask=True,
        pool="first",
        **_head(shapes),
    )


def outline(section: Mapping[str, Any]) -> list:
    """Returns the entries that write a model whose section has all fields; each layer has its own arrays."""
    image, text = section["image"], section["text"]
    if section["decoder"]:
        return captioner_entries(image, section["decoder"], stacked_image=False, stacked_decoder=False)
    entries = []
    if image:
        entries += tower_entries(IMAGE, "image", "img/" if text else "", image, stacked=False)
    if text:
        rows = BERT if text["post_norm"] else TEXT
        entries += tower_entries(rows, "text", "txt/" if image else "", text, stacked=False)
    return entries + (expand(SCALES) if image and text else [])


def pools(section: Mapping[str, Any]) -> Told:
    """The towers' pools, which an npz does not hold; logs those that its reader has to be told."""
    found = {side: section[side]["pool"] for side in ("image", "text") if section[side]}
    for side, pool in found.items():
        if pool not in ("map", "tok", "none"):
            log.info(
                "an npz does not hold the %s tower's pool; `load` needs pool=%r, unless its name tells", side, pool
            )
    return Told(pool=found)
