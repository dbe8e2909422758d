"""Contrastive objectives: similarity x targets x penalty, over all pairs of the global batch.

Written over global arrays: under `jit` with the batch sharded over devices, every device's examples are negatives of
every other's. Each penalty has two forms, which agree: of the logits [B, B], for small batches, and of
`kernels.contrastive.statistics`, which holds no more than a block of them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.objectives.objective import WHERE, Objective, model_inputs


class Similarity(NamedTuple):
    """How well an image and a text match, before scale and bias.

    Attributes:
      features: what is kept of the model's `Embeddings`: pytree, leading axis B.
      scores: features -> (of images, of texts), each [B, B], images in rows, texts in columns: what an image finds in
        texts, and what a text finds in images.
      embeddings: features -> (images [B, D], texts [B, D]) whose inner products the scores are; None where they are not
        inner products.
    """

    features: Callable
    scores: Callable
    embeddings: Callable | None = None


def cosine() -> Similarity:
    """z_i . z_j of unit-norm global embeddings."""

    def scores(features):
        image, text = features["image"], features["text"]
        dtype = jnp.promote_types(image.dtype, jnp.float32)
        cosines = jnp.matmul(image.astype(dtype), text.astype(dtype).T, precision=jax.lax.Precision.HIGHEST)
        return cosines, cosines

    return Similarity(vectors, scores, lambda features: (features["image"], features["text"]))


def token_wise(*, chunk: int = 64) -> Similarity:
    """Of every token its best match in the other modality, on average (FILIP, arXiv:2111.07783, section 3.1).

        of images: mean_k max_r <v_ik, t_jr>        of texts: mean_r max_k <v_ik, t_jr>

    Embeddings [B, N, D] and [B, L, D] are of towers with pool "all": v_ik is patch k of image i, t_jr word r of text j,
    zeros for padding, which takes no part. `chunk` texts at a time, so that the products of all tokens are never there.
    """

    def scores(features):
        images, texts = features["image"], features["text"]
        is_patch, is_token = (jnp.any(x != 0, axis=-1) for x in (images, texts))
        mean = lambda x, real: jnp.sum(x * real, axis=-1) / jnp.maximum(jnp.sum(real, axis=-1), 1)

        @jax.checkpoint
        def with_text(text):
            tokens, real = text
            products = jnp.einsum("bkd,rd->bkr", images, tokens, precision=jax.lax.Precision.HIGHEST)
            best_token = jnp.max(products, axis=2, where=real, initial=-1)
            best_patch = jnp.max(products, axis=1, where=is_patch[..., None], initial=-1)
            return mean(best_token, is_patch), mean(best_patch, real)

        of_images, of_texts = jax.lax.map(with_text, (texts, is_token), batch_size=chunk)
        return of_images.T, of_texts.T

    return Similarity(tokens, scores)


def vectors(embeddings: Any) -> dict[str, jax.Array]:
    """Of `Embeddings` both towers', a vector each."""
    if embeddings.image.ndim != 2:
        raise UserError(f'{WHERE}.similarity compares one vector each; give towers another pool than "all"')
    return {"image": embeddings.image, "text": embeddings.text}


def tokens(embeddings: Any) -> dict[str, jax.Array]:
    """Of `Embeddings` both towers', a vector for every token."""
    if embeddings.image.ndim != 3:
        raise UserError(f'{WHERE}.similarity compares tokens; give image and text pool "all"')
    return {"image": embeddings.image, "text": embeddings.text}


SIMILARITIES = {"cosine": cosine, "token_wise": token_wise}


def positives(targets: str, batch: Mapping[str, Any], size: int) -> jax.Array:
    """Returns bool [B, B]: which texts (columns) describe which images (rows).

    Args:
      targets: "identity": text i describes image i alone; or a batch key whose entry has shape [B]: equal values
        describe each other.
      batch: the batch.
      size: B.
    """
    if targets == "identity":
        return jnp.eye(size, dtype=bool)
    labels = labels_of(targets, batch, size)
    return labels[:, None] == labels[None, :]


def labels_of(targets: str, batch: Mapping[str, Any], size: int) -> jax.Array:
    """Returns [B]: an image and a text describe each other where theirs are equal; arguments as in `positives`."""
    if targets == "identity":
        return jnp.arange(size)
    if targets not in batch:
        raise UserError(
            f"{WHERE}.targets is `{targets}`, which the batch lacks; expected `identity` or one of: {', '.join(batch)}"
        )
    labels = batch[targets]
    if labels.shape != (size,):
        raise UserError(f"{WHERE}.targets `{targets}` has shape {labels.shape} in the batch; expected ({size},)")
    return labels


class Penalty(NamedTuple):
    """How logits and positives become a loss.

    Attributes:
      plain: (logits of images [B, B], logits of texts [B, B], positives bool [B, B]) -> scalar.
      of_pairs: (`Pairs`) -> (scalar, results of images, results of texts with `best_positive` and `best_negative`).
    """

    plain: Callable
    of_pairs: Callable


class Pairs(NamedTuple):
    """What the logits of a batch are made of.

    Attributes:
      image, text: [B, D].
      scale, bias: scalars; the bias may be None.
      labels: int [B].
      identity: whether the labels are all different: image i and text i describe each other alone.
      mask: bool [B], which examples count; None for all.
      implementation, mesh: of `kernels.contrastive`.
    """

    image: jax.Array
    text: jax.Array
    scale: jax.Array
    bias: jax.Array | None
    labels: jax.Array
    identity: bool
    mask: jax.Array | None
    implementation: str | None
    mesh: Any

    def statistics(self, **options):
        """`kernels.contrastive.statistics` of images in rows, texts in columns."""
        return kernel.statistics(
            self.image, self.text, self.scale, self.bias, x_labels=self.labels, y_labels=self.labels,
            x_mask=self.mask, y_mask=self.mask, implementation=self.implementation, mesh=self.mesh, best=True,
            **options,
        )  # fmt: skip

    def mean(self, values):
        """The mean over the examples that count."""
        if self.mask is None:
            return jnp.mean(values)
        return jnp.sum(jnp.where(self.mask, values, 0)) / jnp.maximum(jnp.sum(self.mask), 1)

    def logits_of(self, x, y):
        """[B], the logits of x_i and y_i [B, D], or of each x_i and one y [D]."""
        values = self.scale * jnp.sum(x.astype(self.scale.dtype) * y.astype(self.scale.dtype), axis=1)
        return values if self.bias is None else values + self.bias


def softmax(*, label_smoothing: float = 0.0) -> Callable:
    """Mean of the cross-entropies image -> texts and text -> images (CLIP, Radford et al. 2021, Figure 3).

    A row's target is uniform over its positives (Khosla et al. 2020, arXiv:2004.11362, eq. 2, L_out), a column's over
    its own; `label_smoothing` moves that share of it to the uniform distribution over all.

    Over pairs: lse_i - (1 - e) (sum of positives' logits)_i / (their number)_i - e (mean of all logits)_i, where the
    last is the logit of x_i and the mean of y.
    """

    def cross_entropy(logits, positives, axis):
        target = positives / jnp.sum(positives, axis, keepdims=True, dtype=logits.dtype)
        target = (1 - label_smoothing) * target + label_smoothing / logits.shape[axis]
        return jnp.mean(jax.nn.logsumexp(logits, axis) - jnp.sum(target * logits, axis))

    def of_pairs(pairs):
        results = pairs.statistics(positives=not pairs.identity)
        own = pairs.logits_of(pairs.image, pairs.text) if pairs.identity else None
        count = jnp.asarray(len(pairs.image)) if pairs.mask is None else jnp.maximum(jnp.sum(pairs.mask), 1)
        counts = lambda z: z if pairs.mask is None else jnp.where(pairs.mask[:, None], z, 0)
        total = 0
        for result, (x, y) in zip(results, ((pairs.image, pairs.text), (pairs.text, pairs.image)), strict=True):
            positive = own if pairs.identity else result.positive_sum / jnp.maximum(result.positive_count, 1)
            value = result.lse - (1 - label_smoothing) * positive
            if label_smoothing:
                value -= label_smoothing * pairs.logits_of(counts(x), jnp.sum(counts(y), 0, pairs.scale.dtype) / count)
            total += pairs.mean(value)
        return 0.5 * total, *results

    def plain(of_images, of_texts, positives):
        return 0.5 * (cross_entropy(of_images, positives, 1) + cross_entropy(of_texts, positives, 0))

    return Penalty(plain, of_pairs)


def sigmoid() -> Callable:
    """-1/B sum_ij log sigmoid(s_ij x_ij), s = +1 for positives, else -1 (SigLIP, arXiv:2303.15343, Section 3.2)."""

    def plain(of_images, of_texts, positives):
        of_pairs = lambda logits: jax.nn.log_sigmoid(jnp.where(positives, logits, -logits))
        return -0.5 * jnp.mean(jnp.sum(of_pairs(of_images) + of_pairs(of_texts), axis=1))

    def of_pairs(pairs):
        images, texts = pairs.statistics(penalty="sigmoid")
        return pairs.mean(images.loss), images, texts

    return Penalty(plain, of_pairs)


PENALTIES = {"softmax": softmax, "sigmoid": sigmoid}


def contrastive(
    *,
    model: Any,
    penalty: str | Mapping[str, Any] = "softmax",
    similarity: str | Mapping[str, Any] = "cosine",
    targets: str = "identity",
    max_scale: float | None = None,
    mask: str | None = None,
    implementation: str | None = None,
    mesh: Any = None,
) -> Objective:
    """An objective on a model that returns `Embeddings`; logits are scale x similarity + bias.

    Args:
      model: linen module, `apply({"params": p}, images, token_ids, train=...) -> Embeddings`.
      penalty: "softmax", "sigmoid", or a dict with the name and options, `dict(name="softmax", label_smoothing=0.1)`.
      similarity: "cosine" or "token_wise", for towers with pool "all".
      targets: "identity", or a batch key such as "concept": pictures and texts of equal value are positives.
      max_scale: the scale is at most this (100 in CLIP, Section 2.5); gradients that lower it still pass.
      mask: a batch key, bool [B]: the other examples are nobody's negatives, and neither loss nor metrics see them.
      implementation: of `kernels.contrastive`; None holds all logits of a small batch on one device, and blocks of
        them otherwise.
      mesh: whose devices share the batch, for the kernel; None is that of `jax.set_mesh`. With neither, several devices
        hold all logits between them.

    Metrics: `accuracy_image_to_text` (the share of images for which a positive beats every negative),
    `accuracy_text_to_image`, `scale`, and `bias` where the model has one.
    """
    similarity = config.part(SIMILARITIES, similarity, f"{WHERE}.similarity")
    if similarity.embeddings is None and (mask is not None or implementation is not None):
        raise UserError(f"{WHERE}.mask and implementation are of the similarity `cosine`, which kernels know")
    penalty = config.part(PENALTIES, penalty, f"{WHERE}.penalty")

    def encode(params, batch, rng):
        rngs = None if rng is None else {"dropout": rng}
        embeddings = model.apply({"params": params}, *model_inputs(batch), train=rng is not None, rngs=rngs)
        return similarity.features(embeddings)

    def loss(params, features, batch):
        embeddings = model.apply({"params": params}, None, None)
        scale, bias = embeddings.scale, embeddings.bias
        if max_scale is not None:
            scale = at_most(scale, max_scale)
        metrics = {"scale": scale} | ({} if bias is None else {"bias": bias})
        if by_pairs(features):
            pairs = pairs_of(features, batch, scale, bias)
            value, *results = penalty.of_pairs(pairs)
            accuracies = [pairs.mean(result.best_positive > result.best_negative) for result in results]
        else:
            logits = [scale * scores for scores in similarity.scores(features)]
            if bias is not None:
                logits = [one + bias for one in logits]
            matches = positives(targets, batch, len(logits[0]))
            value = penalty.plain(*logits, matches)
            accuracies = [accuracy(one, matches, axis) for one, axis in zip(logits, (1, 0), strict=True)]
        names = "accuracy_image_to_text", "accuracy_text_to_image"
        return value, metrics | dict(zip(names, accuracies, strict=True)) | {"loss": value}

    def by_pairs(features):
        if similarity.embeddings is None:
            return False
        if mask is not None or implementation is not None:
            return True
        if mesh is None and kernel.ambient_mesh() is None and jax.device_count() > 1:
            return False
        return kernel.explain(*similarity.embeddings(features), mesh=mesh).implementation != "reference"

    def pairs_of(features, batch, scale, bias):
        image, text = similarity.embeddings(features)
        if mask is not None and mask not in batch:
            raise UserError(f"{WHERE}.mask is `{mask}`, which the batch lacks; it has: {', '.join(batch)}")
        dtype = jnp.promote_types(image.dtype, jnp.float32)
        scale, bias = scale.astype(dtype), None if bias is None else bias.astype(dtype)
        labels = labels_of(targets, batch, len(image))
        valid = None if mask is None else batch[mask]
        return Pairs(image, text, scale, bias, labels, targets == "identity", valid, implementation, mesh)

    return Objective(encode, loss)


def accuracy(logits: jax.Array, positives: jax.Array, axis: int) -> jax.Array:
    """The share of rows (axis=1) or columns (axis=0) where a positive is above every negative; a tie is a miss."""
    best = lambda where: jnp.max(logits, axis, initial=-jnp.inf, where=where)
    return jnp.mean(best(positives) > best(~positives))


@jax.custom_vjp
def at_most(x: jax.Array, ceiling: float) -> jax.Array:
    """min(x, ceiling), whose gradient at the ceiling passes where descent would lower x: it can come down again."""
    return jnp.minimum(x, ceiling)


at_most.defvjp(
    lambda x, ceiling: (jnp.minimum(x, ceiling), x < ceiling),
    lambda below, g: (jnp.where(below | (g > 0), g, 0), None),
)
