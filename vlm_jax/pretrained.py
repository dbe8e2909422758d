"""A model with everything it needs to be used: parameters, tokenizer, preprocessing."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax import checkpoint, config, models, sharding
from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.evaluators.zeroshot import class_embeddings


@partial(jax.jit, static_argnames="model")
def embed(model: nn.Module, params: Any, images: jax.Array | None, token_ids: jax.Array | None) -> jax.Array:
    """Embeddings [B, D] fp32, unit-norm, of normalised images [B, H, W, 3] or of token ids [B, L]."""
    embeddings = model.apply({"params": params}, images, token_ids)
    return embeddings.image if token_ids is None else embeddings.text


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A two-tower model ready for use.

    Attributes:
      model: a `vlm_jax.models.TwoTower`.
      params: its parameters.
      tokenizer: text -> ids, see `vlm_jax.data.tokenizers`.
      preprocess: op string from a record with "image" to the model's input, e.g. "decode | resize(32) | normalize".
      tokenize: op string from a record with "text" to "token_ids", e.g. "lower | tokenize(16)".
      config: the config that it was trained with.
      mesh: where it runs; None is one device.
      batch_size: how many examples are embedded at a time.
    """

    model: nn.Module
    params: Any
    tokenizer: Any
    preprocess: str
    tokenize: str
    config: dict = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    batch_size: int = 256

    def embed_images(self, images: Sequence) -> np.ndarray:
        """Pictures (PIL images, paths, encoded bytes, uint8 arrays [H, W, 3]) -> unit-norm float32 [n, D]."""
        pipeline = ops.parse(self.preprocess, self.tokenizer)
        read = lambda image: Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image
        rows = [pipeline({"image": read(image)}, np.random.default_rng(0))["image"] for image in _as_list(images)]
        return self._embed(rows, "image")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit-norm float32 [n, D]."""
        pipeline = ops.parse(self.tokenize, self.tokenizer)
        rows = [pipeline({"text": text}, np.random.default_rng(0))["token_ids"] for text in _as_list(texts)]
        return self._embed(rows, "text")

    def embed_image_batch(self, images: np.ndarray) -> np.ndarray:
        """Preprocessed images, float [B, H, W, 3] -> unit-norm float32 [B, D]."""
        return self._embed(images, "image")

    def classify(self, images: Sequence, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> np.ndarray:
        """Zero-shot probabilities float32 [n, labels]: the softmax over labels of scale * cosine (CLIP, section 3.1.2).

        Args:
          images: as for `embed_images`.
          labels: class names.
          templates: prompts with a `{}` for the name; a label's embedding is the mean of its prompts'.
        """
        image = self.embed_images(images)
        text = class_embeddings(self.embed_texts, labels, templates)
        logits = math.exp(float(self.params["logit_scale"])) * image @ text.T
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        return logits / logits.sum(-1, keepdims=True)

    def _embed(self, rows: Sequence[np.ndarray], modality: str) -> np.ndarray:
        if not len(rows):
            raise UserError(f"no {modality} to embed: the list is empty")
        size = min(self.batch_size, _round_up(len(rows), 16))
        if self.mesh is not None:
            size = _round_up(size, math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES))
        embeddings = []
        for start in range(0, len(rows), size):
            chunk = np.stack(rows[start : start + size])
            padded = np.concatenate([chunk, np.repeat(chunk[:1], size - len(chunk), axis=0)])
            batch = jnp.asarray(padded) if self.mesh is None else self._spread(padded)
            images, token_ids = (batch, None) if modality == "image" else (None, batch)
            embeddings.append(np.asarray(self._gather(embed(self.model, self.params, images, token_ids)))[: len(chunk)])
        return np.concatenate(embeddings)

    def _spread(self, batch: np.ndarray) -> jax.Array:
        place = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(batch.shape, place, lambda index: batch[index])

    def _gather(self, embeddings: jax.Array) -> jax.Array:
        if embeddings.is_fully_addressable:
            return embeddings
        return jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))(embeddings)


def load(workdir: str | os.PathLike) -> Pretrained:
    """Loads the model that `vlm_jax.train` left in `workdir`.

    Raises:
      UserError: the folder holds no finished checkpoint.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} holds no config.json; expected a workdir that `vlm_jax.train` wrote")
    settings = json.loads(path.read_text())
    return Pretrained(
        model=config.call(models.build, {"section": settings["model"]}, "config"),
        params=checkpoint.load_params(workdir),
        tokenizer=tokenizers.build(settings["tokenizer"]),
        preprocess=settings["preprocess"],
        tokenize=settings["tokenize"],
        config=settings,
    )


def _as_list(values) -> list:
    return (
        [values] if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)) else list(values)
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
