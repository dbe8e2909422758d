"""`vlm_jax.load`: a released checkpoint, or a workdir of ours, as a model that is ready to use."""

import dataclasses
import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import flax
import jax
import numpy as np
from jax.sharding import Mesh

from vlm_jax import models
from vlm_jax.config import checked
from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.positions import RESAMPLING, of_length, resample_posemb
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.pretrained.inputs import Lacks
from vlm_jax.zoo import adapters, hub, key_map, op_strings, preprocessing, recognize
from vlm_jax.zoo.released import of_texts

THREADS = 2  # threads that copy tensors


@checked
def load(
    spec: str | os.PathLike,
    *,
    preprocess: str | None = None,
    tokenizer: str | None = None,
    tokenize: str | None = None,
    activation: str | Mapping[str, str] | None = None,
    pool: str | Mapping[str, str] | None = None,
    heads: int | Mapping[str, int] | None = None,
    weights: str | None = None,
    image_size: int | Sequence[int] | None = None,
    resample: str | None = None,
    text_length: int | None = None,
    mesh: Mesh | None = None,
    partition: Sequence = sharding.RULES,
    dtype: jax.typing.DTypeLike | None = None,
    adapter: str | os.PathLike | None = None,
) -> Pretrained:
    """Loads a model, without torch and without running code from the file.

    Args:
      spec: "hf:org/name" (or "hf:org/name@revision"), a folder of Transformers, open_clip, T5X or ours, a file
        (safetensors, npz, .pt, .pth), a workdir of `vlm_jax.train`, or "pkg:name/path", one of these in a package.
        "open_clip:ViT-B-32:PATH" and "timm:vit_base_patch16_224:PATH" say what bare weights are.
      preprocess: op string that prepares pictures, or a key of `zoo.preprocessing.FAMILIES` ("openai", "siglip", ...);
        defaults to the files' own. Without either, the model takes preprocessed arrays, and raises for pictures.
      tokenizer: a tokenizer spec (see `vlm_jax.data.tokenizers`); defaults to the files' own. Without either, the model
        takes token ids, and raises for texts.
      tokenize: op string from text to tokens, such as "lower | tokenize(64, bos=False)"; defaults likewise.
      activation: for bare CLIP weights, "quick_gelu", "gelu" or "gelu_tanh"; for T5X, "gelu_tanh" or "silu".
      pool: for bare files whose tensors do not tell it, such as "gap" or "first", see `models.ViT` and
        `models.TextTransformer`.
      heads: for bare files whose tensors do not tell it, the number of attention heads. `activation`, `pool` and
        `heads` are of both towers, or a dict: `pool=dict(image="gap", text="last")`.
      weights: "ema" reads the averaged weights of a training checkpoint; None reads the trained ones, of a workdir of
        ours the averages if it keeps any.
      image_size: (height, width) or one int, in pixels; overrides the checkpoint's size. Learned positions of another
        grid need `resample`. The files' own `preprocess` follows, see `op_strings.resized`; an op string that is
        given does not.
      resample: resampling of learned positions: "linear" (big_vision), "bicubic" (open_clip) or
        "bicubic_sharp" (DINOv2).
      text_length: number of tokens of texts; learned positions are cut, or stretched behind the first 20 as in
        Long-CLIP (`positions.of_length`). The files' own `tokenize` follows.
      mesh: devices for the parameters, each read straight into its shards; None is one device.
      partition: partition rules of the parameters on the mesh.
      dtype: compute dtype (parameters are float32); defaults to a run's own, and to float32 for released weights.
      adapter: file of an adapted model, see `adapters.load_adapter`; defaults to the one that a saved folder holds.

    Raises:
      UserError: `spec` does not exist or has no known format; a tensor is left over, missing or of another shape; or a
        setting of the model is neither in the files nor given.
    """
    path = hub.local(spec)
    dtype = dtype if dtype is None or isinstance(dtype, str) else np.dtype(dtype).name  # jnp.bfloat16
    told = dict(activation=activation, pool=pool, heads=heads, weights=weights)
    released = recognize.run_of(path, weights) if (path / "checkpoints").is_dir() else recognize.of_spec(spec, **told)
    section = dict(released.model) if dtype is None else dict(released.model, dtype=dtype)
    size = _sides(image_size) if image_size is not None else None
    settings, lacks = _settings(released, section, preprocess, tokenizer, tokenize, size)
    place = None if mesh is None else lambda params: sharding.param_shardings(partition, params, mesh)
    with ThreadPoolExecutor(1) as pool:  # a vocabulary takes as long to build as a tower to read
        tokenizer = pool.submit(tokenizers.build, settings["tokenizer"]) if settings["tokenizer"] else None
        if released.run is not None:
            from vlm_jax.run import checkpoint  # orbax takes a while to import

            params = named_leaves(checkpoint.load_params(path, place))
        else:
            plan, shapes = released.match(), released.shapes
            params = read_params(plan, shapes, released.tensors, place and named_leaves(place(_tree(shapes))))
    pretrained = Pretrained(
        model=models.build(section),
        params=_tree(params),
        tokenizer=tokenizer.result() if tokenizer else None,
        preprocess=settings["preprocess"],
        tokenize=settings["tokenize"],
        config={**(released.run or {}), "model": section, **settings},
        mesh=mesh,
        lacks=lacks,
    )
    if adapter := adapter or adapters.of_folder(path):
        pretrained = adapters.load_adapter(adapter, pretrained)
    pretrained = pretrained if size is None else _resized(pretrained, size, resample)
    return pretrained if text_length is None else _of_length(pretrained, text_length, tokenize is None)


def read_params(
    plan: Mapping[str, Sequence[key_map.Entry]],
    shapes: Mapping[str, Any],
    tensors: Mapping[str, Any],
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
    """Reads parameters, each from its tensors to its place; the host holds one shard at a time.

    Args:
      plan: parameter name -> its entries, from `key_map.match`.
      shapes: parameter name -> anything with a shape.
      tensors: tensor name -> `tensors.Tensor`.
      shardings: parameter name -> sharding; None is the default device.

    Returns:
      parameter name -> float32 array.
    """

    def read(name, index):
        return key_map.read(name, plan[name], tensors, shapes[name].shape, index)

    if shardings is not None:
        return {name: _sharded(partial(read, name), leaf.shape, shardings[name]) for name, leaf in shapes.items()}
    whole = lambda name: jax.device_put(read(name, (slice(None),) * len(shapes[name].shape)), may_alias=True)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(shapes, pool.map(whole, shapes), strict=True))


def _sharded(read: Callable, shape: Sequence[int], place: jax.sharding.Sharding) -> jax.Array:
    shards, shard, last = [], None, None
    for device, index in place.addressable_devices_indices_map(tuple(shape)).items():
        if index != last:
            shard = None
            gc.collect(0)  # jaxlib frees copied arrays now: the last shard goes before the next is read
            shard, last = read(index), index
        shards.append(jax.device_put(shard, device, may_alias=False).block_until_ready())
    return jax.make_array_from_single_device_arrays(tuple(shape), place, shards)


def _settings(released, section, preprocess, tokenizer, tokenize, size) -> tuple[dict[str, Any], Lacks]:
    """Returns preprocess, tokenizer and tokenize, from the arguments or else the files; and what is missing."""
    missing = {}
    if section.get("image"):
        if preprocess in preprocessing.FAMILIES:
            known = size or section["image"].get("image_size")
            if known is None:
                raise UserError(f"preprocess={preprocess!r} needs the size of the pictures; pass image_size= as well")
            preprocess = preprocessing.FAMILIES[preprocess](known)
        elif preprocess is not None:
            _check_ops(preprocess)
        if preprocess is None and released.preprocess is not None:
            preprocess = released.preprocess if size is None else op_strings.resized(released.preprocess, size)
        if preprocess is None:
            families = ", ".join(preprocessing.FAMILIES)
            why = released.hints.get("preprocess") or "the files do not tell how pictures were prepared"
            missing["preprocess"] = f"{why}: pass preprocess= (one of {families}, or an op string)"
    texts = of_texts(section)
    if texts:
        tokenizer, tokenize = tokenizer or released.tokenizer, tokenize or released.tokenize
        if tokenizer is None:
            why = released.hints.get("tokenizer") or "the files hold no tokenizer"
            why = why if "tokenizer=" in why else f"{why}: pass tokenizer='clip', 'json:/path', ..."
            missing["tokenizer"] = why
        if tokenize is None:
            example = f"'tokenize({texts['length']})'"
            missing["tokenize"] = f"pass tokenize= (how texts are made tokens, e.g. {example})"
    settings = {
        "preprocess": preprocess if section.get("image") else None,
        "tokenizer": tokenizer if texts else None,
        "tokenize": tokenize if texts else None,
    }
    return settings, Lacks(f"{released.path} ({released.format})", missing)


def _check_ops(preprocess: str) -> None:
    try:
        ops.parse(preprocess)
    except UserError as error:
        families = ", ".join(preprocessing.FAMILIES)
        raise UserError(f"preprocess= is none of {families}, and no op string: {error}") from None


def _resized(pretrained: Pretrained, size: tuple[int, int], method: str | None) -> Pretrained:
    """The model for pictures of `size`, with learned positions resampled to it."""
    section, params = pretrained.config["model"]["image"], named_leaves(pretrained.params)
    table = params.get("image/pos_embed")
    if table is not None:  # else positions are computed, or there are none
        tower = pretrained.model.image
        patch, first = getattr(tower, "patch", None) or tower.stride, int(tower.cls_position)
        new = size[0] // patch, size[1] // patch
        if not all(new):
            raise UserError(f"image_size {size} is smaller than a patch of {patch} px")
        old = _grid(section.get("image_size"), patch, table.shape[1] - first, new)
        if old != new:
            if method is None:
                raise UserError(
                    f"the checkpoint has positions for {old[0]} x {old[1]} patches, image_size={size} gives {new[0]} x "
                    f"{new[1]}: pass resample= to resample them, one of {', '.join(RESAMPLING)}"
                )
            host = np.asarray(table)
            rows = resample_posemb(host[:, first:], old, new, method)
            params["image/pos_embed"] = jax.device_put(np.concatenate([host[:, :first], rows], axis=1), table.sharding)
    return _rebuilt(pretrained, dict(image=dict(section, image_size=size)), params)


def _of_length(pretrained: Pretrained, length: int, follows: bool) -> Pretrained:
    """The model for texts of `length` tokens; its op string `tokenize` follows."""
    section, params = pretrained.config["model"].get("text"), named_leaves(pretrained.params)
    if not section or length < 1:
        raise UserError(f"text_length is {length}; expected 1 or more, and a model with a text tower")
    if (table := params.get("text/pos_embed")) is not None:
        params["text/pos_embed"] = jax.device_put(of_length(table, length), table.sharding)
    pretrained = _rebuilt(pretrained, dict(text=dict(section, length=length)), params)
    if not follows or pretrained.tokenize is None:
        return pretrained
    tokenize = op_strings.lengthened(pretrained.tokenize, length)
    return dataclasses.replace(pretrained, tokenize=tokenize, config=pretrained.config | {"tokenize": tokenize})


def _rebuilt(pretrained: Pretrained, towers: Mapping[str, Any], params: Mapping[str, Any]) -> Pretrained:
    """The model with other sections of towers and parameters."""
    section = pretrained.config["model"] | towers
    model = models.build(section)
    if own := getattr(pretrained.model, "insertions", ()):
        model = insertion.inserted(insertion.removed(model), *own)
    config = pretrained.config | {"model": section}
    return dataclasses.replace(pretrained, model=model, params=_tree(params), config=config)


def _grid(size: Any, patch: int, rows: int, new: tuple[int, int]) -> tuple[int, int]:
    """Returns the grid of the checkpoint's positions: from its image_size, else a square, else `new` if that fits."""
    if size:
        height, width = _sides(size)
        return height // patch, width // patch
    side = math.isqrt(rows)
    if side * side == rows:
        return side, side
    if new[0] * new[1] != rows:
        raise UserError(f"positions of {rows} patches are no square, and the checkpoint does not tell their grid")
    return new


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"image_size is {size!r}; expected (height, width) or one int, in pixels")
    return sides


def _tree(flat: Mapping[str, Any]) -> dict:
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")
