"""Sentences of a long text and the patches of its picture: alignment in both directions, prototypes, reconstruction."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.block import AttentionInputs, over_heads
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import unit
from vlm_jax.models.vit import patchify
from vlm_jax.objectives.contrastive.conditioned import patches_of, within
from vlm_jax.objectives.contrastive.texts import mean, texts_of
from vlm_jax.objectives.generative.patches import normalised
from vlm_jax.objectives.outputs import fold
from vlm_jax.objectives.term import WHERE, Term


class Seen(NamedTuple):
    """What each side sees of the other.

    Attributes:
      sentences: [B, K, D], of the patches.
      patches: [B, N, D], of the sentences.
    """

    sentences: jax.Array
    patches: jax.Array


class CrossAttention(nn.Module):
    """Sentences attend to patches, and patches to sentences, by a sigmoid: a sentence may be seen by no patch."""

    @nn.compact
    def __call__(self, sentences, given, patches, real):
        """[B, K, D], bool [B, K], [B, N, D], bool [B, N] -> `Seen`."""
        width = patches.shape[-1]
        sides = {"sentence": sentences, "patch": patches}
        dense = lambda side, part: nn.Dense(width, dtype=patches.dtype, name=f"{side}_{part}")(sides[side])

        def attend(by, to, counts):
            scores = jnp.einsum("bqd,bkd->bqk", dense(by, "query"), dense(to, "key"), precision="highest")
            weights = jax.nn.sigmoid(scores / width**0.5) * counts[:, None]
            return jnp.einsum("bqk,bkd->bqd", weights, dense(to, "value"), precision="highest")

        return Seen(attend("sentence", "patch", real), attend("patch", "sentence", given))


class Predictor(nn.Module):
    """SimSiam's predictor (arXiv:2011.10566): D -> D / 2 -> D."""

    @nn.compact
    def __call__(self, x):
        """[..., D] -> [..., D]."""
        y = nn.relu(nn.Dense(x.shape[-1] // 2, dtype=x.dtype, name="fc1")(x))
        return nn.Dense(x.shape[-1], dtype=x.dtype, name="fc2")(y)


class Prototypes(nn.Module):
    """A bank of vectors, [M, D]."""

    number: int

    @nn.compact
    def __call__(self, x):
        """[..., D], of which only the width counts -> [M, D]."""
        return self.param("table", nn.initializers.normal(1.0), (self.number, x.shape[-1])).astype(x.dtype)


class Report(Encoder, kw_only=True):
    """Learned queries that attend to a picture's patches: the sentences of a report, all at once.

    Attributes:
      sentences: K.
      Others: see `Encoder`.
    """

    sentences: int = 1

    @nn.compact
    def __call__(self, patches, real):
        """[B, N, D], bool [B, N] -> [B, K, D]."""
        shape = (self.sentences, self.width)
        queries = self.param("queries", nn.initializers.normal(1.0), (1, *shape)).astype(self.dtype)
        x = jnp.broadcast_to(queries, (len(patches), *shape))
        x = self.stack(x, AttentionInputs(None, patches, over_heads(real))).tokens
        return nn.Dense(patches.shape[-1], dtype=self.dtype, name="head")(x)


class Painter(Encoder, kw_only=True):
    """Blocks on a picture's patches, some of them hidden, that attend to sentences.

    Attributes:
      pixels: P, the numbers of a patch that is painted.
      Others: see `Encoder`.
    """

    pixels: int = 1

    @nn.compact
    def __call__(self, patches, hidden, sentences, given):
        """[B, N, D], bool [B, N], [B, K, D], bool [B, K] -> [B, N, P]."""
        x = nn.Dense(self.width, dtype=self.dtype, name="inputs")(patches)
        token = self.param("mask", nn.initializers.normal(0.02), (self.width,)).astype(self.dtype)
        places = self.param("pos_embed", nn.initializers.normal(0.02), (1, x.shape[1], self.width)).astype(self.dtype)
        x = jnp.where(hidden[..., None], token, x) + places
        x = self.stack(x, AttentionInputs(None, sentences, over_heads(given))).tokens
        return nn.Dense(self.pixels, dtype=self.dtype, name="head")(x)


@method(
    family="terms",
    system="PRIOR",
    paper="arXiv:2307.12577",
    differs="sentences and patches attend to each other; both are reconstructed from the other side, by prototypes",
)
def sentences(
    *,
    model: Any,
    key: str = "texts",
    scale: float | None = None,
    prototypes: int = 0,
    temperature: float = 0.9,
    bank: float = 10.0,
    report: float = 0.0,
    picture: float = 0.0,
    share: float = 0.5,
    decoder: Mapping[str, Any] | None = None,
    pad_id: int | None = None,
) -> Term:
    """Local alignment, sentence prototypes and reconstruction (PRIOR, Cheng et al. 2023); beside `contrastive`.

    Sentences s_k and patches v_n of one picture attend to each other, which gives s'_k and v'_n (`CrossAttention`):

        sentences: half the sum of both directions' cross-entropies of scale cos(s_k, s'_l) over one picture's sentences
        patches:   -mean_n (cos(h(v_n), sg(v'_n)) + cos(h(v'_n), sg(v_n))) / 2,   h is `Predictor` (SimSiam)
        bank:      mean |s_k - p_k|,   p_k = sum_m softmax_m((<s_k, e_m> + Gumbel noise) / temperature) e_m
        report:    mean |q_k - p_k| + KL / 10,   q = `Report`, each q assigned to the p that suits all of them best
        picture:   mean |pixels - `Painter`| over hidden patches, given the sentences

    With prototypes, p replaces s in all but the bank; the KL is that of the prototypes' probabilities of s and of q.
    There is no noise in evaluation. A picture without sentences does not count. The paper trains the first two alone,
    then with the bank, then all; it also compares reports from the picture with those of the batch, which this term
    leaves out.

    Args:
      model: linen module with the output `patch_embeddings`.
      key: the sentences, int [B, K, L] of the batch, see `texts_of`.
      scale: the factor on cosines; defaults to the model's.
      prototypes: M, 512 in the paper; 0 for none.
      temperature: of the prototypes' softmax.
      bank, report, picture: weights of these parts, in the paper 10, 10 and 1. At 0 a part is not computed; the bank
        needs prototypes.
      share: of a picture's patches that are hidden from `Painter`.
      decoder: fields of `Report` and `Painter`, such as dict(width=128, depth=2, heads=4).
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: the value of each part.
    """
    if not 0 < share <= 1:
        raise UserError(f"{WHERE}.share is {share}; expected a share of the patches, above 0, up to 1")
    if temperature <= 0:
        raise UserError(f"{WHERE}.temperature is {temperature}; expected a number above 0")
    given = {"width": 128, "depth": 1, "heads": 4, "pool": "none", "cross": "after", **(decoder or {})}
    reporter, painter = (config.call(kind, given, f"{WHERE}.decoder") for kind in (Report, Painter))
    weights = {"sentences": 1.0, "patches": 1.0, "bank": bank if prototypes else 0.0}
    weights |= {"report": report, "picture": picture}

    def features(outputs, ctx):
        (said, given), seen = texts_of(outputs, ctx, key, pad_id), patches_of(outputs)
        patches, real = seen["patches"], seen["real"]
        keys, found, dtype = outputs.keys if ctx.train else None, {"given": jnp.sum(given, axis=1)}, patches.dtype.name
        of_bank = None
        if prototypes:
            table = outputs.part("bank", Prototypes(prototypes), said)
            of_bank = jnp.einsum("bkd,md->bkm", said, table, precision="highest")
            nearest = jnp.einsum("bkm,md->bkd", _softly(of_bank, temperature, keys), table, precision="highest")
            found["bank"] = _over(jnp.mean(jnp.abs(nearest - said), axis=2), given)
            said = nearest
        cross = outputs.part("cross", CrossAttention(), said, given, patches, real)
        factor = outputs["scale"] if scale is None else scale
        losses, _ = within(unit(said, 1e-12), unit(cross.sentences, 1e-12), given, factor)
        found["sentences"] = _over(losses, given) / jnp.maximum(found["given"], 1)
        predict = lambda x: unit(outputs.part("predictor", Predictor(), x), 1e-12)
        pairs = ((patches, cross.patches), (cross.patches, patches))
        alike = sum(jnp.sum(predict(x) * unit(jax.lax.stop_gradient(y), 1e-12), axis=2) for x, y in pairs) / 2
        found["patches"] = -_over(alike, real) / jnp.maximum(jnp.sum(real, axis=1), 1)
        if report:
            drawn = outputs.part("report", reporter.clone(sentences=said.shape[1], dtype=dtype), patches, real)
            drawn = _assigned(drawn, jnp.where(given[..., None], said, 0))
            found["report"] = jnp.mean(jnp.abs(drawn - jnp.where(given[..., None], said, 0)), axis=(1, 2))
            if of_bank is not None:
                again = jax.nn.log_softmax(jnp.einsum("bkd,md->bkm", drawn, table, precision="highest"))
                wanted = jax.nn.log_softmax(of_bank)
                found["kl"] = _over(jnp.sum(jnp.exp(wanted) * (wanted - again), axis=2), given)
        if picture:
            hidden = _hidden(keys, real, share)
            pixels = patchify(outputs["image"], model.image.patch)
            pixels = normalised(pixels.reshape(len(pixels), -1, pixels.shape[-1]))
            paint = painter.clone(pixels=pixels.shape[-1], dtype=dtype)
            painted = outputs.part("painter", paint, patches, hidden, said, given)
            errors = jnp.mean(jnp.abs(painted - pixels), axis=2)
            found["picture"] = _over(errors, hidden) / jnp.maximum(jnp.sum(hidden, axis=1), 1)
        return found

    def loss(outputs, features, rows, ctx):
        number = jnp.maximum(jnp.sum(features["given"]), 1)
        has = features["given"] > 0
        of_pictures = ("sentences", "patches", "report", "picture")
        parts = {name: mean(features[name], has) for name in of_pictures if name in features}
        parts |= {name: jnp.sum(features[name]) / number for name in ("bank", "kl") if name in features}
        if "kl" in parts:
            parts["report"] += parts["kl"] / 10
        return sum(weights[name] * one for name, one in parts.items() if name != "kl"), parts

    return Term("sentences", features, loss)


def _over(x, counts):
    """Returns the sums [B] of [B, K], over what counts."""
    return jnp.sum(jnp.where(counts, x, 0), axis=1)


def _softly(scores, temperature, keys):
    """Returns softmax((scores [B, K, M] + Gumbel noise) / temperature); no noise without keys."""
    if keys is not None:
        noise = lambda key: jax.random.gumbel(fold(key, "bank"), scores.shape[1:], scores.dtype)
        scores = scores + jax.vmap(noise)(keys)
    return jax.nn.softmax(scores / temperature)


def _assigned(x, y):
    """Returns the rows of x [B, K, D] in the order in which their distances to y [B, K, D] have the least sum."""
    costs = jax.lax.stop_gradient(jnp.sum(jnp.abs(x[:, :, None] - y[:, None]), axis=3))
    first, second = jax.vmap(optax.assignment.hungarian_algorithm)(costs)
    order = jnp.take_along_axis(first, jnp.argsort(second, axis=1), axis=1)
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _hidden(keys, real, share):
    """Returns bool [B, N]: `share` of the N patches of each row, drawn by its key; none of padding."""
    count = max(1, round(share * real.shape[1]))
    keys = jax.random.split(jax.random.key(0), len(real)) if keys is None else keys
    order = jax.vmap(lambda key: jax.random.permutation(fold(key, "hidden"), real.shape[1]))(keys)
    return (order < count) & real
