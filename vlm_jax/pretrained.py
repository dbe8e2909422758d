"""A model with everything it needs to be used: parameters, tokenizer, preprocessing."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlm_jax import sharding
from vlm_jax.data import ops
from vlm_jax.data.registry import BadExample
from vlm_jax.errors import UserError


@partial(jax.jit, static_argnames="model")
def embed(model: nn.Module, params: Any, images: jax.Array | None, token_ids: jax.Array | None) -> jax.Array:
    """Embeddings [B, D] fp32, unit-norm, of what the image tower takes or of token ids [B, L]."""
    embeddings = model.apply({"params": params}, images, token_ids)
    return embeddings.image if token_ids is None else embeddings.text


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A two-tower model, or one tower, ready for use.

    Attributes:
      model: a `vlm_jax.models.TwoTower`.
      params: its parameters.
      tokenizer: text -> ids, see `vlm_jax.data.tokenizers`; None without a text tower.
      preprocess: op string from a record with "image" to the model's input, e.g. "decode | resize(32) | normalize";
        None without an image tower.
      tokenize: op string from a record with "text" to "token_ids", e.g. "lower | tokenize(16)"; None likewise.
      config: what it was made by: "model", "preprocess", "tokenizer", "tokenize"; of a run, all of its config.
      mesh: where it runs; None is one device.
      batch_size: how many examples are embedded at a time.
    """

    model: nn.Module
    params: Any
    tokenizer: Any
    preprocess: str | None
    tokenize: str | None
    config: dict = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    batch_size: int = 256

    def embed_images(self, images: Sequence) -> np.ndarray:
        """Pictures (PIL images, paths, encoded bytes, uint8 arrays [H, W, 3]) -> unit-norm float32 [n, D]."""
        self._need("image")
        read = lambda image: Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image
        rows = self._prepare("image", self.preprocess, [{"image": read(image)} for image in _as_list(images)], "image")
        return self._embed(rows, "image")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit-norm float32 [n, D]."""
        self._need("text")
        rows = self._prepare("text", self.tokenize, [{"text": text} for text in _as_list(texts)], "token_ids")
        return self._embed(rows, "text")

    def embed_image_batch(self, images: Any) -> np.ndarray:
        """Preprocessed images, float [B, H, W, 3] (or packed patches, see `models.ViT`) -> unit-norm float32 [B, D]."""
        self._need("image")
        return self._embed(images, "image")

    def logits(self, images: Sequence, texts: Sequence[str]) -> np.ndarray:
        """Every picture with every text: scale * cosine + bias, as in training, float32 [n, m]."""
        self._need("image")
        self._need("text")
        bias = float(self.params.get("logit_bias", 0.0))
        return (
            math.exp(float(self.params["logit_scale"])) * self.embed_images(images) @ self.embed_texts(texts).T + bias
        )

    def classify(self, images: Sequence, labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> np.ndarray:
        """Zero-shot probabilities float32 [n, labels]: the softmax over labels of scale * cosine (CLIP, section 3.1.2).

        A softmax for models trained with the sigmoid loss, too: the labels are taken to be all there are. Whether a
        text fits at all is the sigmoid of their `logits`.

        Args:
          images: as for `embed_images`.
          labels: class names.
          templates: prompts with a `{}` for the name; a label's embedding is the mean of its prompts'.
        """
        self._need("text")
        with ThreadPoolExecutor(1) as pool:  # two programs to compile, at the same time
            text = pool.submit(class_embeddings, self.embed_texts, labels, templates)
            image, text = self.embed_images(images), text.result()
        logits = math.exp(float(self.params["logit_scale"])) * image @ text.T
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        return logits / logits.sum(-1, keepdims=True)

    def _prepare(self, modality: str, string: str, records: list[dict], field: str) -> list:
        pipeline = ops.parse(string, self.tokenizer)
        rows = []
        for i, record in enumerate(records):
            try:
                rows.append(pipeline(record, np.random.default_rng(0))[field])
            except BadExample as error:
                raise UserError(f"{modality} {i} of {len(records)} cannot be embedded: {error}") from None
        return rows

    def _need(self, modality: str) -> None:
        if getattr(self.model, modality) is None:
            raise UserError(f"this model has no {modality} tower")

    def _embed(self, rows: Any, modality: str) -> np.ndarray:
        """Embeds a list of examples, or a batch (a tree of arrays [B, ...])."""
        if isinstance(rows, list):
            if not rows:
                raise UserError(f"no {modality} to embed: the list is empty")
            rows = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        count = len(jax.tree.leaves(rows)[0])
        size = min(self.batch_size, 1 << (count - 1).bit_length())  # few shapes, so that few programs are compiled
        if self.mesh is not None:
            size = _round_up(size, math.prod(self.mesh.shape[axis] for axis in sharding.BATCH_AXES))
        embeddings = []
        pad = lambda chunk: np.concatenate([chunk, np.repeat(chunk[:1], size - len(chunk), axis=0)])
        for start in range(0, count, size):
            padded = jax.tree.map(lambda array, start=start: pad(array[start : start + size]), rows)
            batch = jax.tree.map(jnp.asarray if self.mesh is None else self._spread, padded)
            images, token_ids = (batch, None) if modality == "image" else (None, batch)
            embeddings.append(np.asarray(self._gather(embed(self.model, self.params, images, token_ids))))
        return np.concatenate(embeddings)[:count]

    def _spread(self, batch: np.ndarray) -> jax.Array:
        place = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(batch.shape, place, lambda index: batch[index])

    def _gather(self, embeddings: jax.Array) -> jax.Array:
        if embeddings.is_fully_addressable:
            return embeddings
        return jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))(embeddings)


def _as_list(values) -> list:
    return (
        [values] if isinstance(values, (str, bytes)) or not isinstance(values, (Sequence, np.ndarray)) else list(values)
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns unit-norm class embeddings, float32 [C, D]: the normalised mean of the names' normalised prompts.

    Args:
      embed_texts: texts -> float [n, D].
      names: C class names.
      templates: prompts; `{}` stands for the name.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template `{template}` has no `{{}}` for the class name")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = np.asarray(embed_texts(prompts), np.float32).reshape(len(names), len(templates), -1)
    return unit(unit(embeddings).mean(axis=1))


def unit(x: np.ndarray) -> np.ndarray:
    """x / |x| over the last axis; 0 stays 0."""
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
