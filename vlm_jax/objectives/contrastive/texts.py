"""Several texts of a picture: extra texts of the batch, [B, K, L], and terms that compare pictures with all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive as kernel
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Context, Term


class Texts(NamedTuple):
    """Extra texts of the rows.

    Attributes:
      embeddings: [B, K, D], unit norm.
      given: bool [B, K], False where a text lacks.
    """

    embeddings: jax.Array
    given: jax.Array

    @property
    def flat(self) -> tuple[jax.Array, jax.Array]:
        """Returns (embeddings [B K, D], given [B K])."""
        return self.embeddings.reshape(-1, self.embeddings.shape[-1]), self.given.reshape(-1)


def texts_of(outputs: Outputs, ctx: Context, key: str, pad_id: int | None = None) -> Texts:
    """Returns the texts `key` of the batch, int [B, K, L], or [B, L] for one text; encoded once for all terms.

    A text lacks if it is padding alone, or if bool [B, K] `<key>_mask` of the batch is False.

    Raises:
      UserError: the batch lacks the key, or its shape is another.
    """
    ids = read(outputs, key)

    def encode(outputs):
        found = one_vector(outputs.apply("__call__", None, ids.reshape(-1, ids.shape[-1])).text, "text")
        return found.reshape(*ids.shape[:2], -1)

    return Texts(outputs.once(f"texts of {key}", encode), given_of(outputs, ctx, key, pad_id))


def given_of(outputs: Outputs, ctx: Context, key: str, pad_id: int | None = None) -> jax.Array:
    """Returns which texts of a key there are, bool [B, K], see `texts_of`."""
    given = jnp.any(read(outputs, key) != ctx.special(pad_id)[0], axis=-1)
    if f"{key}_mask" in outputs.rows:
        given &= jnp.reshape(outputs.rows[f"{key}_mask"], given.shape).astype(bool)
    return given


def read(outputs: Outputs, key: str) -> jax.Array:
    """Returns the token ids [B, K, L] of the rows' texts `key`; errors say which ops make them."""
    try:
        return ids_of(key, outputs[key])
    except UserError as error:
        raise UserError(
            f"{error}; texts are made in data.ops: `captions(4, 'sub_captions', to='{key}') | "
            f"tokenize(32, key='{key}', to='{key}') | keep(..., '{key}')`"
        ) from None


def ids_of(key: str, ids: jax.Array) -> jax.Array:
    """Returns the token ids of a key of the batch as [B, K, L]."""
    if ids.ndim not in (2, 3) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise UserError(f"{WHERE}: `{key}` is {ids.dtype} {list(ids.shape)}; expected token ids [B, K, L] or [B, L]")
    return jnp.asarray(ids if ids.ndim == 3 else ids[:, None])


def compared(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    labels: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array | None, jax.Array | None] = (None, None),
    penalty: str = "softmax",
) -> tuple[jax.Array, jax.Array]:
    """Returns (the loss of two sets, the share of x with a y of its own label above all others).

    l = scale x y^T + bias. softmax: half the sum, over x and over y, of the mean over rows of lse_j l_ij - the mean of
    l_ij over j of the same label. A row without such a partner does not count. sigmoid: -log sigmoid(z l), where z is 1
    for equal labels, else -1, summed over all pairs, by the number of y. With as many x as y this is SigLIP's loss.

    Args:
      x, y: [N, D] and [M, D]; on a mesh, blocks travel a ring, and the logits are never held.
      scale, bias: of the logits.
      labels: int [N] and [M].
      masks: bool [N] and [M], rows that count.
      penalty: "softmax" or "sigmoid".
    """
    counts = [jnp.ones(len(z), bool) if mask is None else mask for z, mask in zip((x, y), masks, strict=True)]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    found = kernel.statistics(
        x.astype(dtype), y.astype(dtype), scale, bias, x_labels=labels[0], y_labels=labels[1], x_mask=counts[0],
        y_mask=counts[1], penalty=penalty, positives=penalty == "softmax", best=True,
    )  # fmt: skip
    accuracy = mean(found[0].best_positive > found[0].best_negative, counts[0])
    if penalty == "sigmoid":
        return jnp.sum(found[0].loss) / jnp.maximum(jnp.sum(counts[1]), 1), accuracy
    total = 0
    for side, count in zip(found, counts, strict=True):
        own = side.positive_sum / jnp.maximum(side.positive_count, 1)
        total += mean(side.lse - own, count & (side.positive_count > 0))
    return total / 2, accuracy


def mean(x: jax.Array, counts: jax.Array) -> jax.Array:
    """Returns the mean of what counts; 0 without any."""
    return jnp.sum(jnp.where(counts, x, 0)) / jnp.maximum(jnp.sum(counts), 1)


PENALTIES = {"softmax": "softmax", "sigmoid": "sigmoid"}  # those of `compared`


@method(
    family="terms",
    system="DreamLIP",
    paper="arXiv:2403.17007",
    differs="several texts of a picture, such as sentences of its long caption, are its positives",
)
def several_texts(
    *,
    model: Any,
    key: str = "texts",
    among: str = "place",
    penalty: str = "softmax",
    targets: str = "identity",
    pad_id: int | None = None,
) -> Term:
    """The contrastive loss of pictures with K texts each: sub-captions drawn from a long caption (Zheng et al. 2024).

    among "place": mean over k of the loss of all pictures with their k-th texts, as the authors train: the other texts
    of a picture are no negatives of it. Each of the K losses counts by the number of pictures that have the text.
    among "all": one loss of all pictures with all texts. The target of a picture is uniform over its texts. With the
    sigmoid penalty, this is the multi-positive loss of FLAIR (arXiv:2412.03561).

    With one text for each picture, both are `contrastive`'s. The term stands in its place, or beside it.

    Args:
      model: linen module with two embeddings.
      key: the texts, int [B, K, L] of the batch; the op `captions` makes them. See `texts_of`.
      among: "place" or "all".
      penalty: "softmax" or "sigmoid".
      targets: "identity", or a key of the batch such as "concept": pictures and texts of rows with equal values match.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `accuracy`, the share of pictures with one of its texts above all others; `texts`, the mean number of a
    picture's texts.
    """
    choose({"place": 0, "all": 0}, among, f"{WHERE}.among")
    choose(PENALTIES, penalty, f"{WHERE}.penalty")
    of = targets_of.build(targets, f"{WHERE}.targets").labels
    if of is None:
        raise UserError(f"{WHERE}.targets of several texts match or do not: `identity` or a key of the batch")

    def features(outputs, ctx):
        return {"image": one_vector(outputs["image_embedding"], "image"), "texts": texts_of(outputs, ctx, key, pad_id)}

    def loss(outputs, features, rows, ctx):
        image, texts = features["image"], features["texts"]
        labels, count = of(rows, len(image)), texts.given.shape[1]
        options = dict(scale=outputs["scale"], bias=outputs["bias"], penalty=penalty)
        if among == "all":
            both, (y, given) = (labels, jnp.repeat(labels, count)), texts.flat
            found = [compared(image, y, labels=both, masks=(None, given), **options)]
            shares = jnp.ones(1)
        else:
            pick = lambda k: (texts.embeddings[:, k], (texts.given[:, k],) * 2)
            picked = map(pick, range(count))
            found = [compared(image, y, labels=(labels, labels), masks=masks, **options) for y, masks in picked]
            shares = jnp.sum(texts.given, axis=0)
        shares = shares / jnp.maximum(jnp.sum(shares), 1)
        value, accuracy = (
            sum(s * one for s, one in zip(shares, ones, strict=True)) for ones in zip(*found, strict=True)
        )
        return value, {"accuracy": accuracy, "texts": jnp.mean(jnp.sum(texts.given, axis=1))}

    return Term("several_texts", features, loss)


def one_vector(embedding: jax.Array, side: str) -> jax.Array:
    """Returns the embeddings [n, D] of a tower, "image" or "text"; raises a UserError for a vector each token."""
    if embedding.ndim != 2:
        raise UserError(f'{WHERE} compares one vector for each {side}; give model.{side} another pool than "all"')
    return embedding


@method(
    family="terms",
    system="ParaCLIP",
    paper="arXiv:2402.15120",
    differs="a caption and its paraphrases are compared with each other, not only with the picture",
)
def paraphrases(
    *,
    model: Any,
    pairs: Sequence[Sequence[str]] = (("image", "texts:1"), ("text", "texts:0"), ("texts:0", "texts:1")),
    penalty: str = "softmax",
    pad_id: int | None = None,
) -> Term:
    """L(picture, second paraphrase) + L(caption, first) + L(first, second); L is CLIP's loss (Kim et al. 2024).

    The first paraphrase rewrites the caption, and the second the first, in plainer words. The image tower is locked,
    `optimizer.params=((r"image/.*", dict(freeze=True)), (".*", {}))`, so that the space of pictures stays.

    Args:
      model: linen module with two embeddings.
      pairs: what is compared with what, see `named`. With `(("image", "text"),)` the term is `contrastive`.
      penalty: "softmax" or "sigmoid".
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: of each pair, `<first>-<second>`, the share of the first with its own second above all others.
    """
    return Term("paraphrases", *_of_pairs(pairs, penalty, pad_id))


@method(
    family="terms",
    system="TIPS",
    paper="arXiv:2410.16512",
    differs="two class tokens: one is compared with the web's caption, one with a synthetic caption",
    needs={"model.image.pool": "tok", "model.image.cls": True, "model.image.registers": 1},
)
def two_captions(
    *,
    model: Any,
    pairs: Sequence[Sequence[str]] = (("image", "text"), ("image:1", "texts:0")),
    penalty: str = "softmax",
    pad_id: int | None = None,
) -> Term:
    """Half of L(class token, noisy caption) + L(second class token, synthetic caption) (Maninis et al. 2025).

    The second class token is the first register, which passes the tower's head, as the class token does. With
    `model.image.pool="second"` and cls=True it is the model's embedding: the same parameters, the other caption's view.

    Args: as for `paraphrases`. The loss is the mean over pairs. With `(("image", "text"),)` it is `contrastive`.

    Metrics: as for `paraphrases`.
    """
    features, loss = _of_pairs(pairs, penalty, pad_id)

    def mean_loss(*args):
        value, metrics = loss(*args)
        return value / len(pairs), metrics

    return Term("two_captions", features, mean_loss)


def _of_pairs(pairs, penalty, pad_id):
    """Returns `features` and `loss` of a term: the sum over pairs of names of the loss of what they name."""
    choose(PENALTIES, penalty, f"{WHERE}.penalty")
    pairs = [tuple(pair) for pair in pairs]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UserError(f'{WHERE}.pairs is {pairs}; expected pairs of names, such as (("image", "text"),)')

    def features(outputs, ctx):
        names = dict.fromkeys(name for pair in pairs for name in pair)
        return {name: named(outputs, ctx, name, pad_id) for name in names}

    def loss(outputs, features, rows, ctx):
        total, metrics = 0, {}
        for first, second in pairs:
            (x, has_x), (y, has_y) = features[first], features[second]
            labels, both = jnp.arange(len(x)), has_x & has_y
            options = dict(labels=(labels, labels), masks=(both, both), penalty=penalty)
            value, metrics[f"{first}-{second}"] = compared(x, y, outputs["scale"], outputs["bias"], **options)
            total += value
        return total, metrics

    return features, loss


def named(outputs: Outputs, ctx: Context, name: str, pad_id: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns (embeddings [B, D], bool [B], False where a row has none) of a name.

    "image" and "text" are the towers' embeddings, "image:1" the picture's by its class token 1, "texts:0" those of text
    0 of the batch's key `texts`.

    Raises:
      UserError: there is no such class token or text.
    """
    key, _, number = name.partition(":")
    if not number:
        found = one_vector(outputs[f"{key}_embedding"], key)
        return found, jnp.ones(len(found), bool)
    if key == "image":
        found, given = outputs["class_embeddings"], None
    else:
        found, given = texts_of(outputs, ctx, key, pad_id)
    if not number.isdecimal() or int(number) >= found.shape[1]:
        what = "class tokens and registers" if key == "image" else f"texts under `{key}`"
        raise UserError(f"{WHERE}.pairs names `{name}`; there are {found.shape[1]} {what}, counted from 0")
    k = int(number)
    return found[:, k], jnp.ones(len(found), bool) if given is None else given[:, k]
