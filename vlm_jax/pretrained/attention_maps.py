"""Attention maps of an image tower, and the similarity of patches and texts, as arrays.

    attention_maps.attention(clip, pictures)               # float32 [n, h, w]
    attention_maps.word_patch(clip, pictures, ["a hat"])   # float32 [n, 1, h, w]
    attention_maps.seen(clip, pictures)                    # the pictures under these maps

`figures.maps` and `figures.word_patch` draw these arrays. The model runs unchanged: its modules are
watched (`flax.linen.intercept_methods`). Kernels do not return the softmax, which is computed again from queries and
keys.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.models.attention_weights import softmax_of
from vlm_jax.models.block import Block
from vlm_jax.models.coca import CoCa, QueryPool
from vlm_jax.models.layers import Attention
from vlm_jax.models.vit import ViT
from vlm_jax.pretrained import Pretrained


def attention(pretrained: Pretrained, images: Sequence) -> np.ndarray:
    """Returns the attention of the image tower's output to each patch, float32 [n, h, w].

    - Attention pooling (SigLIP's MAP head, CoCa's pooler): the weights of the first query, averaged over heads.
    - cls token: the cls row of the last block's weights, averaged over heads.
    - Otherwise (the mean of the tokens, a captioner's tokens): attention rollout (Abnar and Zuidema 2020,
      arXiv:2005.00928, section 3), the product over blocks of (weights + identity) / 2, averaged over heads and query
      tokens.

    Weights on a cls token, registers or prompts are left out, so a map may not add up to 1.

    Args:
      pretrained: a model with a ViT.
      images: as for `Pretrained.embed_images`.

    Raises:
      UserError: the image tower has no patches, or packed pictures have different grids of patches.
    """
    return attention_batch(pretrained, pretrained._pictures(images))


def attention_batch(pretrained: Pretrained, images: Any) -> np.ndarray:
    """Returns `attention` of preprocessed images [B, H, W, 3], float32 [B, h, w]."""
    return pretrained._run(partial(_attention, grid=_grid(pretrained, images)), images)


def has_patches(pretrained: Pretrained) -> bool:
    """Whether the model has an image tower with patches, a ViT."""
    return isinstance(getattr(pretrained.model, "image", None), ViT)


def seen(pretrained: Pretrained, images: Sequence) -> np.ndarray:
    """Returns the image tower's input before normalisation: uint8 [n, H, W, 3], h x w whole patches.

    Maps fit these pictures and not the given ones, which preprocessing may have cropped or stretched.
    """
    drawn = dataclasses.replace(pretrained, preprocess=before_normalize(pretrained.preprocess))._pictures(images)
    return whole_patches(pretrained, drawn)


def before_normalize(preprocess: str) -> str:
    """Returns the op string up to normalisation; the result is a picture, uint8."""
    return re.sub(r"\|?\s*\b(normalize|to_float)\b.*", "", preprocess, flags=re.DOTALL)


def ops_of_places(preprocess: str, task: str) -> str:
    """Returns the ops that move what is in a picture; raises UserError if they depend on what is in it."""
    if "crop_to_content" in preprocess:
        raise UserError(
            f"{task}: the preprocessing `{preprocess}` crops by content, which boxes and masks cannot follow; give "
            "other ops, such as `resize(64) | normalize`"
        )
    return " | ".join(filter(None, ("decode", before_normalize(preprocess))))


def whole_patches(pretrained: Pretrained, images: np.ndarray) -> np.ndarray:
    """Returns [n, H, W, 3] without the rows and columns beyond the last whole patch."""
    h, w = (pretrained.model.image.patch * side for side in _grid(pretrained, images))
    return images[:, :h, :w]


def word_patch(pretrained: Pretrained, images: Sequence, texts: Sequence[str]) -> np.ndarray:
    """Returns the cosine of patches and texts, float32 [n, m, h, w]; see `patch_embeddings`."""
    pretrained._need("text")
    patches = patch_embeddings(pretrained, images)
    words = text_vectors(pretrained.embed_texts(texts))
    return np.einsum("nhwd,md->nmhw", patches, words, dtype=np.float32)


def text_vectors(embedded: np.ndarray) -> np.ndarray:
    """Returns one vector for each text, [m, D], of [m, D] or of a vector for every token, [m, L, D]: their mean."""
    if embedded.ndim == 2:
        return embedded
    return embedded.sum(axis=1) / np.float32(np.maximum(np.any(embedded != 0, axis=2).sum(axis=1), 1))[:, None]


def patch_embeddings(pretrained: Pretrained, images: Sequence) -> np.ndarray:
    """Returns each patch in the joint space of pictures and texts, unit norm, float32 [n, h, w, D].

    Each patch token passes alone through the layers after the tower's blocks:

    - mean ("gap") or max: the head. For a mean without cls token and tanh, the head's output averaged over patches is
      the picture's embedding before normalisation.
    - "concat": the head, given this token times L and zeros for the other L - 1 tokens; the same average holds.
    - attention ("map", CoCa): the pool over this token alone, and the head.
    - every token ("all"): unchanged. `word_patch` then averages a text's words.
    - cls token ("tok"): the head, after a last block in which each token attends to itself alone, as in MaskCLIP (Zhou
      et al. 2022, arXiv:2112.01071, section 3.3).

    Args: as for `attention`.

    Raises:
      UserError: as for `attention`; or the model is a captioner, which has no embeddings, or has pool "none".
    """
    return patch_embedding_batch(pretrained, pretrained._pictures(images))


def patch_embedding_batch(pretrained: Pretrained, images: Any) -> np.ndarray:
    """Returns `patch_embeddings` of preprocessed images [B, H, W, 3], float32 [B, h, w, D]."""
    if pretrained.is_captioner:
        raise UserError("a captioner embeds no pictures: patches and texts have no joint space")
    grid = _grid(pretrained, images)
    if pretrained.model.image.pool == "all":
        embedded = pretrained.embed_image_batch(images)
        return embedded.reshape(len(embedded), *grid, -1)
    if not isinstance(pretrained.model, CoCa) and pretrained.model.image.pool == "none":
        raise UserError('the image tower has pool "none": no layer takes its patches into the space of the texts')
    return pretrained._run(partial(_patch_embeddings, grid=grid), images)


def _grid(pretrained: Pretrained, images: Any) -> tuple[int, int]:
    """(rows, columns) of the patches of preprocessed images."""
    pretrained._need("image")
    patch = getattr(pretrained.model.image, "patch", None)
    if patch is None:
        raise UserError(f"the image tower, a {type(pretrained.model.image).__name__}, has no patches; a ViT has")
    if not isinstance(images, Mapping):
        return images.shape[1] // patch, images.shape[2] // patch
    grids = np.unique(images["grid"], axis=0)
    if len(grids) > 1:
        raise UserError(f"the pictures have patches of different grids, {grids.tolist()}; give them one at a time")
    return tuple(grids[0].tolist())


def _watched(model: nn.Module, params: Any, images: Any, look: Callable) -> Any:
    """Runs the model on images, each method call wrapped in `look(call, args, kwargs, module, method)`.

    `look` also wraps insertions (`adapt.insert`) and sees their additions.
    """
    model = model.clone(image=model.image.clone(remat="none"))  # watched values must leave the block

    def watch(call, args, kwargs, context):
        return look(call, args, kwargs, context.module, context.method_name)

    with nn.intercept_methods(watch):
        if "embed" in model.can:
            return model.apply({"params": params}, images, None)
        return model.apply({"params": params}, images, method="see")


@partial(jax.jit, static_argnames=("model", "grid"))
def _attention(model: nn.Module, params: Any, images: Any, grid: tuple[int, int]) -> jax.Array:
    """fp32 [B, h, w]."""
    tower, patches = model.image, grid[0] * grid[1]
    first = tower.tokens_before
    own = slice(None, patches) if isinstance(images, Mapping) else slice(-patches - first, None)  # no pad, no prompts
    has_pool = tower.pool == "map" or isinstance(getattr(model, "pool", None), QueryPool)
    from_cls = tower.pool in ("tok", "first") and not has_pool
    projected, pooled, blocks = {}, [], []

    def reduced(softmax):
        softmax = softmax.mean(axis=1)
        return softmax[:, own][:, :1] if from_cls else softmax

    def look(call, args, kwargs, module, method):
        path = module.path
        if isinstance(module, Attention) and method == "turned" and path[-1] == "attn":
            projected[args[0]] = call(*args, **kwargs)
            return projected[args[0]]
        result = call(*args, **kwargs)
        if isinstance(module, Attention) and method == "__call__" and path[-1] == "attn":
            projected["weights"] = softmax_of(module, projected, *args, **kwargs)
            if path in (("image", "map_pool", "attn"), ("pool", "attn")):
                pooled.append(projected["weights"][:, :, 0].mean(axis=1))
        elif isinstance(module, Block) and method == "__call__" and path[0] == "image" and not has_pool:
            return result[0], result[1]._replace(statistics={"attention": reduced(projected["weights"])})
        elif method == "stack" and path == ("image",) and not has_pool:
            blocks[:] = jnp.moveaxis(result.aux["attention"], 1, 0)
        return result

    _watched(model, params, images, look)
    if has_pool:
        seen = pooled[0]
    elif from_cls:
        seen = blocks[-1][:, 0]
    else:
        seen = _rollout(blocks)[:, own].mean(axis=1)
    return seen[:, own][:, first:].reshape(-1, *grid)


def _rollout(blocks: Sequence[jax.Array]) -> jax.Array:
    """Multiplies the weights of all blocks, first to last, each [B, L, L]: attention to the input tokens."""
    total = jnp.eye(blocks[0].shape[-1])
    for weights in blocks:
        total = 0.5 * (jnp.matmul(weights, total, precision="highest") + total)
    return total


@partial(jax.jit, static_argnames=("model", "grid"))
def _patch_embeddings(model: nn.Module, params: Any, images: Any, grid: tuple[int, int]) -> jax.Array:
    """fp32 [B, h, w, D], unit norm."""
    tower, patches, packed = model.image, grid[0] * grid[1], isinstance(images, Mapping)
    is_cls = tower.pool in ("tok", "first")

    def one_by_one(tokens):
        """[B, L, D] -> [B N, 1, D], or [B N, L, D] for "concat": each patch becomes a picture."""
        own = tokens[:, :patches] if packed else tokens[:, -patches:]
        if tower.pool != "concat":
            return own.reshape(-1, 1, own.shape[-1])
        length = tokens.shape[1]
        alone = length * jnp.eye(length, dtype=own.dtype)[-patches:, :, None]
        return (alone * own[:, :, None]).reshape(-1, length, own.shape[-1])

    def look(call, args, kwargs, module, method):
        path = module.path
        if isinstance(module, Block) and method == "__call__" and path[0] == "image" and is_cls:
            x, around, layer, cache = args
            alone = jnp.eye(x.shape[1], dtype=bool) | (layer < tower.depth - 1)
            return call(x, around._replace(mask=alone[None, None]), layer, cache)
        if method == "summarise" and path == ("image",) and tower.pool != "none":
            return call(one_by_one(args[0]))
        if isinstance(module, QueryPool) and method == "__call__":
            return call(one_by_one(args[0]))
        if path == ("pool", "attn") and method == "__call__":
            return call(args[0][:, :1], *args[1:])  # the first query is the picture
        return call(*args, **kwargs)

    embeddings = _watched(model, params, images, look).image
    return embeddings.reshape(-1, *grid, embeddings.shape[-1])
