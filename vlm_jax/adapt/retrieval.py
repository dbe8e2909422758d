"""RECO: refines embeddings of a frozen two-tower model with near pairs from a memory of pictures and texts.

    head = reco(features, texts, scale)                                # trains on pairs, which are also the memory
    zero_shot(head.texts(names), scale)(head.images(pictures))         # class names and pictures, both refined
    head._replace(memory=(more, their_texts)).images(pictures)         # another memory, without training

Iscen et al. 2023, "Retrieval-Enhanced Contrastive Vision-Text Models", arXiv:2306.07196. From the paper, by second-hand
descriptions: the search within a modality and its results (section 3.1); one layer of self-attention for pictures, one
for texts, and the losses (3.2); the learning rate (4.1). The paper removes near-duplicates of test pictures from the
memory; here the caller has to. Choices of this project: k, heads, width of the MLP; no positions, pre-norm, branches
that begin at 0; Adam; no training pair finds itself.
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
from vlm_jax.models.block import AttentionInputs
from vlm_jax.models.transformer import Encoder
from vlm_jax.objectives.contrastive.penalty import softmax

ROWS = 1024  # refined at a time


class Fusion(Encoder, kw_only=True):
    """A transformer block over an embedding and its retrieved embeddings, in any order; the identity at init."""

    depth: int = 1
    layer_scale: float | None = 0.0  # slow at first; matrices of zeros leap beside entries as small as embeddings'
    implementation: str | None = "reference"  # no kernel pays for k + 1 tokens

    @nn.compact
    def __call__(self, x, found):
        """Embeddings [B, D], found [B, k, D] -> refined embeddings, unit norm [B, D]: the output at the first place."""
        tokens = jnp.concatenate([x[:, None], found], axis=1)
        x = self.stack(tokens, AttentionInputs(), norm=False)[0][:, 0]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


class Reco(NamedTuple):
    """Refines pictures with the texts of similar pictures, and texts with the pictures of similar texts.

    Attributes:
      memory: embeddings of pictures and of their texts, float32 [P, D] each, unit norm.
      k: pairs found for an embedding.
      fusion: the layer.
      params: the layer's parameters, for pictures and for texts along a leading axis of 2.
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
    """Returns the rows of the memory nearest to each query by inner product, int [M, k], nearest first.

    Exact; equal products are ordered by row. Products are computed in blocks of 1,024 queries.

    Args:
      queries, memory: float [M, D] and [P, D].
      exclude: int [M], a row that a query may not find (for instance itself), -1 for none; None: no row is excluded.
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
    """Trains RECO's fusion on pairs by `alignment`.

    The paper trains on 10 million pairs for 10 epochs, in batches of 4096.

    Args:
      features, texts: float [N, D] each, unit norm: embeddings of the training pictures and of their texts.
      scale: the model's logit scale, 100 in CLIP; stays fixed.
      memory: pictures and their texts, float [P, D] each, unit norm, searched in training and later. Defaults to the
        training pairs; in training no pair finds itself.
      exclude: int [N], the memory's row of each training pair, -1 for none; this row is not found in training.
      targets: int [N]; pictures and texts of equal targets match. By default only the two of a pair match.
      k: pairs found for an embedding.
      heads: attention heads; a divisor of D.
      mlp_dim: width of the hidden layer; defaults to 4 D.
      steps: 0 gives the identity.
      batch_size: at most all pairs; the last batch of an epoch, if short, is left out.
      learning_rate: the initial one.
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
    """L(V', T') + L(V', T) + L(V, T') of embeddings V, T and refined V', T', [B, D] each (section 3.2).

    L is CLIP's loss, a mean; the paper's L is a sum, 2 B times the mean. Targets: int [B], equal if an image and a text
    match.
    """
    positives, nce = targets[:, None] == targets, softmax().plain
    pairs = (refined_images, refined_texts), (refined_images, texts), (images, refined_texts)
    all_logits = (scale * jnp.matmul(x, y.T, precision="highest") for x, y in pairs)
    return sum(nce(logits, logits, positives, positives) for logits in all_logits)


@functools.partial(jax.jit, static_argnums=0)
def _train(fusion, params, batches, pairs, memory, found, targets, scale, learning_rate):
    def loss(params, rows):
        refine = lambda params, x, found, values: _fuse(fusion, params, x[rows], values[found[rows]])
        refined = jax.vmap(refine)(params, pairs, found, memory[::-1])
        return alignment(*pairs[:, rows], *refined, scale, targets[rows])

    return descend(loss, params, optax.adam(optax.cosine_decay_schedule(learning_rate, len(batches))), batches)


def _pairs(images, texts, name, width=None):
    """Returns both in float32 [2, N, D]; raises a UserError unless both have unit norm, one width and one length."""
    texts = unit(texts, f"{name} texts", width)
    images = unit(images, f"{name} images", texts.shape[1])
    if len(images) != len(texts):
        raise UserError(f"{name}: {len(images)} images, {len(texts)} texts; expected a text for each image")
    return np.stack([images, texts]).astype(np.float32)
