"""Spaces: how towers' tokens become embeddings, in the place of a unit vector from each tower's pool and head.

A space is a module that both towers share, `TwoTower.space`. It is part of the model: saved, and used in evaluation.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.fields import Part
from vlm_jax.models.layers import Norm
from vlm_jax.models.pooling import MapPool, pool
from vlm_jax.models.two_tower import unit


@method(
    family="spaces",
    system="FDT",
    paper="arXiv:2303.14865",
    differs="patches and words choose few of a set of learned vectors, the same for both modalities",
)
def codes(*, size: int = 16384, width: int = 512, weights: str = "sparsemax", temperature: float = 1.0) -> Part:
    """Returns `Codes` (finite discrete tokens, Chen et al. 2023); the fields are described there."""
    choose(WEIGHTS, weights, "config.model.space.weights")
    return Part(Codes, size=size, width=width, weights=weights, temperature=temperature)


@method(
    family="spaces",
    system="MAP-uncertainty",
    paper="arXiv:2210.05335",
    differs="a picture or a text is a normal distribution, whose width says how ambiguous it is",
)
def gaussian(*, heads: int = 4, sigma: float = 0.1) -> Part:
    """Returns `Gaussian`, for the similarity `wasserstein` (MAP, Ji et al. 2022); the fields are described there."""
    return Part(Gaussian, heads=heads, sigma=sigma)


@method(
    family="spaces",
    system="LexVLA",
    paper="arXiv:2407.17827",
    differs="an embedding has a dimension for each word of the vocabulary, and few words are active",
)
def lexical(*, activation: str = "log1p") -> Part:
    """Returns `Lexical`, for the term `overuse` (LexVLA, Li et al. 2024); the fields are described there."""
    choose(ACTIVATIONS, activation, "config.model.space.activation")
    return Part(Lexical, activation=activation)


@method(
    family="spaces",
    system="ConceptCentric",
    paper="arXiv:2412.13847",
    differs="concepts are boxes; a picture or a text is a box that lies in those of its concepts",
)
def boxes(*, concepts: int = 2048, width: int = 32, temperature: float = 0.1) -> Part:
    """Returns `Boxes`, for the term `entailment` (Geng and Tang 2024); the fields are described there."""
    return Part(Boxes, concepts=concepts, width=width, temperature=temperature)


class Boxes(nn.Module):
    """P(c | x) = Vol(c and x) / Vol(x) for each concept c, and the embedding P / |P|.

    A box is a center and positive sides: those of the concepts are learned, the same for both towers; those of a
    picture or a text are dense maps of the tower's mean token. Corners are Gumbel variables (arXiv:2010.04831), so that
    all volumes have gradients; as the temperature goes to 0, boxes are those of geometry. A second modality may learn
    to project into boxes that are frozen: optimizer.params=((r"space/concepts.*", dict(freeze=True)), ...).

    Attributes:
      concepts: C, number of concepts.
      width: dimensions of the boxes.
      temperature: scale of the corners' Gumbel distributions.
    """

    concepts: int
    width: int = 32
    temperature: float = 0.1

    @nn.compact
    def __call__(self, encoded, side, table=None):
        """`Encoded`, "image" or "text" -> unit-norm [B, C], {"log_entailed": log P, below 0, [B, C]}."""
        exact = jnp.promote_types(encoded.tokens.dtype, jnp.float32)
        centers = nn.initializers.normal(0.5)
        known = self.param("concepts", centers, (self.concepts, 2 * self.width)).astype(exact)
        mean = pool("mean", encoded.tokens, encoded.mask)
        own = nn.Dense(2 * self.width, dtype=exact, name=f"{side}_box")(mean)
        log_entailed = log_containment(corners(known)[:, None], corners(own)[:, :, None], self.temperature)
        largest = jax.lax.stop_gradient(jnp.max(log_entailed, axis=1, keepdims=True))  # small volumes are no zeros
        return unit(jnp.exp(log_entailed - largest)), {"log_entailed": log_entailed}


def corners(box):
    """Returns the lower and the upper corners [2, ..., D] of boxes [..., 2 D]: centers, then sides before softplus."""
    center, side = jnp.split(box, 2, axis=-1)
    half = jax.nn.softplus(side) / 2
    return jnp.stack([center - half, center + half])


def log_containment(outer, inner, temperature):
    """Returns log of Vol(outer and inner) / Vol(inner), of corners [2, ..., D] that broadcast -> [...].

    With temperature t: the expected volume of a box is prod_d t softplus((upper - lower) / t - 2 g), where g is Euler's
    constant; an intersection's lower corner is t logsumexp(lower / t), its upper one -t logsumexp(-upper / t).
    """
    soft = lambda a, b: temperature * jnp.logaddexp(a / temperature, b / temperature)
    lower, upper = soft(outer[0], inner[0]), -soft(-outer[1], -inner[1])
    log_sides = lambda lower, upper: _log_softplus((upper - lower) / temperature - 2 * EULER)
    return jnp.sum(log_sides(lower, upper) - log_sides(*inner), axis=-1)


def _log_softplus(x):
    """Returns log(log(1 + e^x)), which is x for small x."""
    return jnp.where(x < -30, x, jnp.log(jax.nn.softplus(jnp.maximum(x, -30))))


class Codes(nn.Module):
    """w_j = sparsemax_j(max_k <q(v_k), c_j> / (sqrt(D) temperature)), embedding sum_j w_j c_j / |...|.

    v_k are a tower's tokens, q is an MLP for each tower; the codes c are the same for both towers.

    Attributes:
      size: number of codes.
      width: D of the codes, the width of embeddings.
      weights: "sparsemax", which gives most codes the weight 0, or "softmax".
      temperature: the smaller, the fewer codes.
    """

    size: int
    width: int
    weights: str = "sparsemax"
    temperature: float = 1.0

    @nn.compact
    def __call__(self, encoded, side, table=None):
        """`Encoded`, "image" or "text" -> unit-norm [B, D], {"codes": [B, size]}, the weights, which sum to 1."""
        exact = jnp.promote_types(encoded.tokens.dtype, jnp.float32)
        vectors = self.param("codes", nn.initializers.normal(1.0), (self.size, self.width)).astype(exact)
        query = Query(self.width, name=side)(encoded.tokens).astype(exact)
        scores = jnp.einsum("bld,cd->blc", query, vectors, precision="highest") / self.width**0.5
        weights = WEIGHTS[self.weights](best_token(scores, encoded.mask) / self.temperature)
        return unit(jnp.matmul(weights, vectors, precision="highest")), {"codes": weights}


class Query(nn.Module):
    """norm, dense, gelu, norm, dense."""

    width: int

    @nn.compact
    def __call__(self, x):
        """[B, L, K] -> [B, L, width]."""
        x = nn.Dense(self.width, dtype=x.dtype, name="fc1")(Norm(dtype=x.dtype, name="norm1")(x))
        x = nn.gelu(x, approximate=False)
        return nn.Dense(self.width, dtype=x.dtype, name="fc2")(Norm(dtype=x.dtype, name="norm2")(x))


class Gaussian(nn.Module):
    """Mean: the tower's unit-norm embedding. Standard deviation: exp(dense(map pool(tokens))), for each dimension.

    Attributes:
      heads: of the attention that pools tokens into the standard deviation.
      sigma: the initial standard deviation.
    """

    heads: int = 4
    sigma: float = 0.1

    @nn.compact
    def __call__(self, encoded, side, table=None):
        """`Encoded`, "image" or "text" -> unit-norm [B, D], {"sigma": [B, D]}, above 0."""
        if encoded.pooled is None or encoded.pooled.ndim != 2:
            raise UserError(
                f"config.model.space `gaussian` needs one vector of the {side} tower as mean; change its pool"
            )
        mean, tokens = unit(encoded.pooled), encoded.tokens
        head_dim = max(tokens.shape[-1] // self.heads, 1)
        map_pool = MapPool(heads=self.heads, head_dim=head_dim, dtype=str(tokens.dtype), name=f"{side}_pool")
        start = nn.initializers.constant(math.log(self.sigma))
        dense = nn.Dense(mean.shape[-1], dtype=mean.dtype, bias_init=start, name=f"{side}_log_sigma")
        return mean, {"sigma": jnp.exp(dense(map_pool(tokens, encoded.mask)))}


class Lexical(nn.Module):
    """s_v = max_k activation(<m(t_k), e_v>) for each word v of the vocabulary, embedding s / |s|.

    t_k are a tower's tokens, m is a dense map for each tower, e_v the token embeddings of the text tower.

    Attributes:
      activation: "log1p", log(1 + max(0, x)), which leaves most words at exactly 0; or "elu1p", 1 + elu(x), which is
        nowhere 0.
    """

    activation: str = "log1p"

    @nn.compact
    def __call__(self, encoded, side, table=None):
        """`Encoded`, "image" or "text", [V, D] -> unit-norm [B, V], {"words": [B, V]}, the activations, at least 0."""
        if table is None:
            raise UserError("config.model.space `lexical` needs a text tower with token embeddings: model.text")
        exact = jnp.promote_types(encoded.tokens.dtype, jnp.float32)
        mapped = nn.Dense(table.shape[1], dtype=encoded.tokens.dtype, name=f"{side}_map")(encoded.tokens)
        scores = jnp.einsum("bld,vd->blv", mapped.astype(exact), table.astype(exact), precision="highest")
        words = ACTIVATIONS[self.activation](best_token(scores, encoded.mask))
        return unit(words), {"words": words}


def best_token(scores, mask):
    """Returns the largest score over tokens: [B, L, C], bool [B, L] or None -> [B, C]; 0 without a token."""
    if mask is None:
        return jnp.max(scores, axis=1)
    best = jnp.max(scores, axis=1, where=mask[..., None], initial=-jnp.inf)
    return jnp.where(jnp.any(mask, axis=1)[:, None], best, 0)


def sparsemax(z):
    """Returns the point of the simplex that is nearest to z, over the last axis (arXiv:1602.02068, algorithm 1)."""
    ordered = -jnp.sort(-z, axis=-1)
    count = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    above = jnp.cumsum(ordered, axis=-1) - 1
    size = jnp.sum(count * ordered > above, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(above, size - 1, axis=-1) / size
    return jnp.maximum(z - threshold, 0)


EULER = 0.5772156649015329
WEIGHTS = {"sparsemax": sparsemax, "softmax": jax.nn.softmax}
ACTIVATIONS = {"log1p": lambda x: jnp.log1p(jax.nn.relu(x)), "elu1p": lambda x: 1 + jax.nn.elu(x)}
