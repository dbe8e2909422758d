"""T5X checkpoints: a folder of zarr arrays and a msgpack file `checkpoint`.

T5 v1.1, mT5, UL2 and Flan-UL2 are released in this format.

Layers are separate arrays (`encoder/layers_0/...`, kernels of two axes) or, in `scalable_t5`, stacked on the second
axis (`encoder/encoder/...`, kernels with an axis for heads). Arrays that are not split over devices may lie in the
msgpack file itself. `write` makes separate arrays.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.zoo.key_map import Entry, expand
from vlm_jax.zoo.readers.stored import Tensor

ROOT = "target"  # of the parameters; `state` is the optimizer's
TOKENIZE = "tokenize(512, bos=False)"
HINTS = {"tokenizer": "T5X holds no tokenizer: pass tokenizer='sentencepiece:/path/spiece.model?extra_ids=100'"}
SHARED = (("decoder/token_embed", "token_embedder", "flax"), ("head", "decoder/logits_dense", "flax"))
PARTS = {  # (our name, their norm or attention) of a block, in each part
    "encoder": (("norm1", "pre_attention_layer_norm"), ("attn", "attention"), ("norm2", "pre_mlp_layer_norm")),
    "decoder": (
        ("norm1", "pre_self_attention_layer_norm"),
        ("attn", "self_attention"),
        ("cross_norm", "pre_cross_attention_layer_norm"),
        ("cross_attn", "encoder_decoder_attention"),
        ("norm2", "pre_mlp_layer_norm"),
    ),
}


def recognise(folder: Path) -> bool:
    """Whether the folder is a step of T5X."""
    return (folder / "checkpoint").is_file() and any(folder.glob(f"{ROOT}.*/.zarray"))


def open_arrays(folder: Path) -> dict[str, Tensor]:
    """Returns the parameters, '/'-joined name -> `Tensor`.

    Raises:
      UserError: the msgpack file or an array cannot be read, or the two do not name the same parameters.
    """
    try:
        state = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        tree = state["optimizer"][ROOT]
        is_place = lambda _, value: isinstance(value, Mapping) and "kvstore" in value
        flat = flax.traverse_util.flatten_dict(tree, sep="/", is_leaf=is_place)
    except Exception as error:  # msgpack raises many types
        raise UserError(f"{folder / 'checkpoint'} is not of T5X: {type(error).__name__} {error}") from error
    tensors = {}
    for name, leaf in flat.items():
        if isinstance(leaf, np.ndarray):
            tensors[name] = Tensor(leaf.shape, leaf.dtype, lambda index, leaf=leaf: leaf[index].copy())
        else:
            tensors[name] = _open_zarr(folder / ".".join((ROOT, *name.split("/"))))
    spare = {path.parent.name for path in folder.glob(f"{ROOT}.*/.zarray")}
    spare -= {".".join((ROOT, *name.split("/"))) for name in tensors}
    if spare:
        raise UserError(f"{folder} has {min(spare)}, which its file `checkpoint` does not name")
    return tensors


def _open_zarr(path: Path) -> Tensor:
    import tensorstore  # takes a while to import

    place = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path}{os.sep}"}}
    try:
        array = tensorstore.open(place, open=True, read=True).result()
    except Exception as error:
        raise UserError(f"{path} is no zarr array: {str(error).splitlines()[0]}; download it again") from error

    def load(index):
        try:
            return np.array(array[index].read().result())
        except Exception as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}; download it again") from error

    return Tensor(tuple(array.shape), array.dtype.numpy_dtype, load)


def describe(tensors: Mapping[str, Tensor], activation: str | None = None) -> tuple[dict[str, Any], list[Entry]]:
    """Returns (config section of our model, entries of its key table), from the arrays' shapes.

    Args:
      tensors: what `open_arrays` returned.
      activation: for gated MLPs, which shapes do not tell: "gelu_tanh" (T5 v1.1, mT5) or "silu" (UL2; the 20B model is
        known by its sizes).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    scanned = "encoder/encoder/mlp/wo/kernel" in shapes
    vocab_size, width = shapes["token_embedder/embedding"]
    at = "encoder/encoder" if scanned else "encoder/layers_0"
    heads, buckets = shapes["encoder/relpos_bias/rel_embedding"]
    kernel = shapes[f"{at}/attention/out/kernel"]  # [heads * head_dim, width], in three axes or two, and the layers'
    joined = len(kernel) - scanned == 2
    gated = f"{at}/mlp/wi_0/kernel" in shapes
    fields = dict(width=width, heads=heads, head_dim=kernel[0] // heads if joined else kernel[-2], gated=gated)
    fields |= dict(mlp_dim=shapes[f"{at}/mlp/wo/kernel"][0], relative_buckets=buckets, norm_eps=1e-6)
    depth = {side: _depth(shapes, side, scanned) for side in PARTS}
    if not gated:
        activation = "relu"
    elif activation is None:
        if (width, heads, depth["encoder"]) != (4096, 16, 32):
            known = "'gelu_tanh' (T5 v1.1, mT5) or 'silu' (UL2)"
            raise UserError(f"T5X does not tell the activation of gated MLPs; pass activation={known}")
        activation = "silu"
    parts = {side: fields | dict(depth=depth[side], activation=activation) for side in PARTS}
    tied = None if "decoder/logits_dense/kernel" in shapes else width**-0.5
    parts["decoder"] |= dict(vocab_size=vocab_size, length=512, tied_scale=tied)
    section = dict(name="encoder_decoder", **parts)
    return section, table(section, joined, scanned)


def _depth(shapes: Mapping[str, tuple], side: str, scanned: bool) -> int:
    if scanned:
        return shapes[f"{side}/{side}/mlp/wo/kernel"][1]
    return sum(name.startswith(f"{side}/layers_") and name.endswith("/mlp/wo/kernel") for name in shapes)


def table(section: Mapping[str, Any], joined: bool = True, scanned: bool = False) -> list[Entry]:
    """Returns the entries of the key table.

    Args:
      section: a model's section, with heads, depth and gated of encoder and decoder.
      joined: whether heads and their width are one axis.
      scanned: whether layers are stacked on the second axis.
    """
    entries = expand(SHARED)
    for side, names in PARTS.items():
        block = f"{side}*1" if scanned else "layers_{i}"
        rows = [("relative/table", "relpos_bias/rel_embedding", "matrix"), ("norm", f"{side}_norm", "flax")]
        for ours, theirs in names:
            if "norm" in ours:
                rows.append((f"blocks_{{i}}/{ours}", f"{block}/{theirs}", "flax"))
                continue
            for name in ("query", "key", "value", "out"):
                kind = "flax" if joined else "flax_out" if name == "out" else "flax_heads"
                rows.append((f"blocks_{{i}}/{ours}/{name}", f"{block}/{theirs}/{name}", kind))
        mlp = {"fc1": "wi", "fc2": "wo"}
        if section[side]["gated"]:
            mlp = {"gate": "wi_0", "fc1": "wi_1", "fc2": "wo"}
        rows += [(f"blocks_{{i}}/mlp/{ours}", f"{block}/mlp/{theirs}", "flax") for ours, theirs in mlp.items()]
        sizes = dict(depth=section[side]["depth"], heads=section[side]["heads"])
        entries += expand(rows, f"{side}/", f"{side}/", **sizes)
    return entries


def write(folder: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes parameters, '/'-joined name -> `Tensor`, as step 0 of a run without an optimizer's state."""
    import tensorstore

    places = {}
    for name, array in arrays.items():
        path = ".".join((ROOT, *name.split("/")))
        metadata = dict(shape=list(array.shape), chunks=list(array.shape), dtype="<f4", compressor={"id": "gzip"})
        store = {"driver": "file", "path": f"{folder / path}{os.sep}"}
        place = {"driver": "zarr", "kvstore": store, "metadata": metadata}
        tensorstore.open(place, create=True).result().write(array.read()).result()
        places[name] = {**place, "dtype": "float32", "kvstore": {**store, "path": path}}
    tree = flax.traverse_util.unflatten_dict(places, sep="/")
    state = {"version": 3, "optimizer": {"state": {"step": 0}, ROOT: tree}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
