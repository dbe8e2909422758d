"""RECO: embeddings of a frozen two-tower model, refined by what a memory of pictures with texts holds near them.

    head = reco(features, texts, scale)                                # trained on pairs, which are the memory too
    zero_shot(head.texts(names), scale)(head.images(pictures))         # class names and pictures, both refined
    head._replace(memory=(more, their_texts)).images(pictures)         # with another memory, nothing trained anew

Iscen et al. 2023, "Retrieval-Enhanced Contrastive Vision-Text Models", arXiv:2306.07196. The paper's, as others tell
it: the search within a modality and what it returns (section 3.1); a layer of self-attention for pictures, one for
texts, the losses (3.2); the learning rate (4.1). It takes near-duplicates of test pictures out of the memory, here the
caller does. Chosen here: k, heads, width of the MLP; no positions, pre-norm, branches that begin at 0; Adam; no
training pair finds itself.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.adapt.heads.checks import unit
from vlm_jax.adapt.heads.training import descend, finite, shuffled
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.transformer import AttentionInputs, Encoder
from vlm_jax.objectives.contrastive.penalty import softmax

ROWS = 1024  # refined at a time


class Fusion(Encoder, kw_only=True):
    """A block over an embedding and what was found for it, in any order; it begins as the identity."""

    depth: int = 1
    layer_scale: float | None = 0.0  # slow at first; matrices of zeros leap beside entries as small as embeddings'
    implementation: str | None = "reference"  # no kernel pays for k + 1 tokens

    @nn.compact
    def __call__(self, x, found):
        """Embeddings [B, D], found [B, k, D] -> the block's output at the embedding's place, unit norm [B, D]."""
        tokens = jnp.concatenate([x[:, None], found], axis=1)
        x = self.stack(tokens, AttentionInputs(), norm=False)[0][:, 0]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Reco(NamedTuple):
    """Refines pictures with the texts of pictures like them, and texts with the pictures of texts like them.

    Attributes:
      memory: embeddings of pictures and of their texts, float32 [P, D] each, unit norm.
      k: how many pairs are found for an embedding.
      fusion, params: the layer, and its parameters for pictures and for texts, a leading axis of 2.
    """

    memory: tuple[np.ndarray, np.ndarray]
    k: int
    fusion: Fusion
    params: dict[str, Any]

    def images(self, images: np.ndarray, exclude: np.ndarray | None = None) -> np.ndarray:
        """Embeddings [M, D], unit norm -> refined, float32 [M, D], unit norm; exclude: as in `retrieve`."""
        return self._refine(0, images, exclude)

    def texts(self, texts: np.ndarray, exclude: np.ndarray | None = None) -> np.ndarray:
        """The same for texts."""
        return self._refine(1, texts, exclude)

    def _refine(self, kind, x, exclude):
        keys, values = self.memory[kind], self.memory[1 - kind]
        if np.shape(keys) != np.shape(values):
            raise UserError(f"the memory has shapes {np.shape(keys)}, {np.shape(values)}; expected a text per picture")
        x = unit(x, ("images", "texts")[kind], keys.shape[1]).astype(np.float32)
        found = retrieve(x, keys, self.k, exclude)
        params = jax.tree.map(lambda leaf: leaf[kind], self.params)
        blocks = [slice(start, start + ROWS) for start in range(0, len(x), ROWS)]
        return np.concatenate([_fuse(self.fusion, params, x[rows], values[found[rows]]) for rows in blocks])


@functools.partial(jax.jit, static_argnums=0)
def _fuse(fusion, params, x, found):
    with jax.default_matmul_precision("highest"):
        return fusion.apply({"params": params}, x, found)


def retrieve(queries: np.ndarray, memory: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """Returns the rows of the memory with the largest inner products with each query, int [M, k], the largest first.

    Exact; equals stand in the order of their rows. Products are made in blocks of 1,024 queries.

    Args:
      queries, memory: float [M, D] and [P, D].
      exclude: int [M], a row that a query may not find (itself, say), -1 for none; None: each may find all.
    """
    queries, memory = np.asarray(queries, np.float32), np.asarray(memory, np.float32)
    if queries.ndim != 2 or queries.shape[1:] != memory.shape[1:]:
        raise UserError(f"queries {queries.shape} and memory {memory.shape} do not fit; expected [M, D] and [P, D]")
    most = len(memory) - (exclude is not None)
    if not 1 <= k <= most:
        raise UserError(f"k is {k}; expected 1 to {most}, what a query may find in a memory of {len(memory)} pairs")
    exclude = np.full(len(queries), -1) if exclude is None else np.asarray(exclude)
    if exclude.shape != queries.shape[:1] or exclude.dtype.kind not in "iu" or exclude.max() >= len(memory):
        need = f"{len(queries)} integers below {len(memory)}: a pair of the memory for each query, or -1"
        raise UserError(f"exclude is {exclude.dtype} {exclude.shape}; expected {need}")

    blocks = [slice(start, start + ROWS) for start in range(0, len(queries), ROWS)]
    return np.concatenate([_nearest(queries[rows], memory, exclude[rows], k) for rows in blocks])


@functools.partial(jax.jit, static_argnums=3)
def _nearest(queries, memory, exclude, k):
    scores = jnp.matmul(queries, memory.T, precision="highest")
    return jax.lax.top_k(jnp.where(exclude[:, None] == jnp.arange(len(memory)), -jnp.inf, scores), k)[1]


@method(
    family="retrieval",
    system="RECO",
    paper="arXiv:2306.07196",
    where="section 3.2",
    differs="embeddings are refined by what a memory of pairs holds near them",
    claim="few_shot: retrieved pairs make pictures easier to name",
)
def reco(
    features: np.ndarray,
    texts: np.ndarray,
    scale: float,
    *,
    memory: tuple[np.ndarray, np.ndarray] | None = None,
    exclude: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    k: int = 10,
    heads: int = 8,
    mlp_dim: int | None = None,
    steps: int = 1000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Reco:
    """Trains RECO's fusion on pairs by `alignment`. The paper's batches have 4096 pairs, of 10 million, for 10 epochs.

    Args:
      features, texts: float [N, D] each, unit norm: embeddings of the training pictures and of their texts.
      scale: the model's logit scale, 100 in CLIP; it is not trained.
      memory: pictures and their texts, float [P, D] each, unit norm, to be searched in training and later. By default
        the training pairs, none of which finds itself in training.
      exclude: int [N], which pair of the memory is the training pair, -1 for none: in training it is not found.
      targets: int [N]: pictures and texts of equal targets describe each other. By default only those of a pair do.
      k: pairs found for an embedding.
      heads: of the attention; they divide D.
      mlp_dim: width of the hidden layer; None is 4 D.
      steps: 0 gives what refines nothing.
      batch_size: all pairs at most; an epoch's last batch, if short, is left out.
      learning_rate: the first one.
      seed: of the parameters and of the order of pairs.
    """
    pairs = _pairs(features, texts, "training")
    _, count, width = pairs.shape
    if memory is None:
        memory, exclude = pairs, np.arange(count) if exclude is None else exclude
    memory = _pairs(*memory, "memory", width)
    targets = np.arange(count) if targets is None else np.asarray(targets)
    if targets.shape != (count,) or targets.dtype.kind not in "iu":
        raise UserError(f"targets are {targets.dtype} {targets.shape} of {count} pairs; expected an integer for each")
    if batch_size < 2:
        raise UserError(f"batch_size is {batch_size}; expected 2 or more: a pair learns from others in its batch")
    found = np.stack([retrieve(x, keys, k, exclude) for x, keys in zip(pairs, memory, strict=True)])
    fusion = Fusion(width=width, heads=heads, mlp_dim=mlp_dim)
    params = _init(fusion, jax.random.key(seed))
    size = min(batch_size, count)
    batches = shuffled(count, size, -(-steps // (count // size)), seed)
    batches = batches[(batches >= 0).all(1)][:steps]
    if len(batches):
        params, losses = _train(fusion, params, batches, pairs, memory, found, targets, scale, learning_rate)
        params = jax.tree.map(lambda leaf: finite(leaf, losses), params)
    return Reco((memory[0], memory[1]), k, fusion, params)


@functools.partial(jax.jit, static_argnums=0)
def _init(fusion, key):
    of_one = lambda key: fusion.init(key, jnp.ones((1, fusion.width)), jnp.ones((1, 1, fusion.width)))["params"]
    return jax.vmap(of_one)(jax.random.split(key))


def alignment(images, texts, refined_images, refined_texts, scale, targets):
    """L(V', T') + L(V', T) + L(V, T') of embeddings V, T and refined V', T', [B, D] each (the paper's section 3.2).

    L is CLIP's, a mean; the paper's is a sum, 2 B times that. Targets: int [B], equal where an image and a text match.
    """
    positives, nce = targets[:, None] == targets, softmax().plain
    pairs = (refined_images, refined_texts), (refined_images, texts), (images, refined_texts)
    all_logits = (scale * jnp.matmul(x, y.T, precision="highest") for x, y in pairs)
    return sum(nce(logits, logits, positives) for logits in all_logits)


@functools.partial(jax.jit, static_argnums=0)
def _train(fusion, params, batches, pairs, memory, found, targets, scale, learning_rate):
    def loss(params, rows):
        refine = lambda params, x, found, values: _fuse(fusion, params, x[rows], values[found[rows]])
        refined = jax.vmap(refine)(params, pairs, found, memory[::-1])
        return alignment(*pairs[:, rows], *refined, scale, targets[rows])

    return descend(loss, params, optax.adam(optax.cosine_decay_schedule(learning_rate, len(batches))), batches)


def _pairs(images, texts, name, width=None):
    """Both in float32 [2, N, D], or a UserError if they are not of unit norm, of one width, a text for each image."""
    texts = unit(texts, f"{name} texts", width)
    images = unit(images, f"{name} images", texts.shape[1])
    if len(images) != len(texts):
        raise UserError(f"{name}: {len(images)} images, {len(texts)} texts; expected a text for each image")
    return np.stack([images, texts]).astype(np.float32)
