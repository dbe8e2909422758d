"""Distillation: outputs, attention, similarities and hard negatives of teachers.

    terms=dict(contrastive={}, similarity_distillation=dict(teachers=("french", "large"))),
    teachers=dict(french=dict(spec="runs/fr", inputs=dict(token_ids="fr_ids")), large=dict(spec="runs/large")),

A teacher may have any architecture and widths. If it reads other texts than the model, or has a tokenizer of its own,
its `inputs` name its field: `... | tokenize(77, to='fr_ids', tokenizer='json:fr.json')` in the data ops.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.models.attention_weights import of_blocks
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.contrastive import targets as targets_of
from vlm_jax.objectives.contrastive.penalty import HIDDEN
from vlm_jax.objectives.contrastive.targets import cosines_of
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Term

PAIR = ("image_embedding", "text_embedding")
COMBINED = {"mean": lambda x: sum(x) / len(x), "max": lambda x: jnp.max(jnp.stack(x), axis=0)}


@method(
    family="terms",
    paper="arXiv:2307.12732",
    where="section 3.3",
    differs="embeddings follow a teacher's, row by row",
    needs={"objective.teachers": {"average": {"decay": 0.99}}},
)
def feature_distillation(*, model: Any, teacher: str = "average", of: Sequence[str] = PAIR) -> Term:
    """Mean squared distance |s - t|^2 between outputs of the model and of a teacher (CLIP-KD, "FD").

    An output whose width differs from the teacher's passes a linear map of the term's own first.

    Args:
      model: linen module.
      teacher: name of the teacher: an average of the run's parameters, or a checkpoint of any architecture.
      of: names of the outputs, [B, ...].

    Metrics: the distance of each output.
    """

    def features(outputs, ctx):
        taught, found = outputs.teacher(teacher), {}
        for name in of:
            own, want = outputs[name], taught[name]
            if own.shape[:-1] != want.shape[:-1]:
                seen = f"`{name}` has the shape {own.shape}, the teacher's {want.shape}"
                raise UserError(f"{WHERE}: {seen}; only the last dimension may differ")
            if own.shape[-1] != want.shape[-1]:
                own = outputs.part(name, nn.Dense(want.shape[-1], param_dtype=own.dtype), own)
            square = jnp.sum(jnp.square(own - want), axis=-1)
            found[name] = jnp.mean(square.reshape(len(square), -1), axis=1)
        return found

    def loss(outputs, features, rows, ctx):
        distances = {name: jnp.mean(distance) for name, distance in features.items()}
        return sum(distances.values()), distances

    return Term("feature_distillation", features, loss)


@method(
    family="terms",
    paper="arXiv:2002.10957",
    differs="the self-attention of one block follows a teacher's",
    needs={"objective.teachers": {"average": {"decay": 0.99, "inputs": {"image": "global"}}}},
)
def attention_distillation(
    *, model: Any, teacher: str = "average", of: str = "image", block: int = -1, pad_id: int | None = None
) -> Term:
    """Mean over rows, heads and tokens n of KL(t_n || s_n), the attention of token n to all tokens (MiniLM, Wang 2020).

    Both towers see as many tokens; of different numbers of heads, the mean over heads counts. Padding of texts asks
    for nothing. The weights are computed beside the kernel: B x heads x L^2 numbers for each block.

    Args:
      model: linen module with the tower.
      teacher: name of the teacher.
      of: the tower, "image" or "text".
      block: number of the block in both towers, from 0; negative ones count from the end.
      pad_id: id of padding; the tokenizer's, which is the default.
    """
    choose({"image": 0, "text": 0}, of, f"{WHERE}.of")

    def seen(outputs):
        inputs = (outputs["image"], None) if of == "image" else (None, outputs["token_ids"])
        found = of_blocks(lambda: outputs.apply("__call__", *inputs), of)
        if not -found.shape[1] <= block < found.shape[1]:
            raise UserError(f"{WHERE}.block is {block}; a tower has {found.shape[1]} blocks")
        return found[:, block]

    def features(outputs, ctx):
        own, taught = seen(outputs), seen(outputs.teacher(teacher))
        if own.shape[1] != taught.shape[1]:
            own, taught = (jnp.mean(x, axis=1, keepdims=True) for x in (own, taught))
        if own.shape != taught.shape:
            seen_by = f"{own.shape[-1]} tokens, the teacher {taught.shape[-1]}"
            raise UserError(
                f"{WHERE}: attention is distilled between towers of as many tokens; the model has {seen_by}"
            )
        log_p, log_q = (jnp.log(jnp.maximum(x, 1e-30)) for x in (taught, own))
        rows = jnp.mean(jnp.sum(taught * (log_p - log_q), axis=-1), axis=1)
        counts = jnp.ones(rows.shape, bool)
        if of == "text":
            counts = is_text(outputs["token_ids"], *ctx.special(pad_id))
        return jnp.sum(jnp.where(counts, rows, 0), axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1)

    return Term("attention_distillation", features, lambda outputs, found, rows, ctx: (jnp.mean(found), {}))


@method(
    family="terms",
    system="TeachText",
    paper="arXiv:2104.08271",
    differs="the similarities of a batch follow those of several teachers with other text encoders, combined",
    needs={"objective.teachers": {"teacher": {"decay": 1.0, "inputs": {"image": "global"}}}},
)
def similarity_distillation(
    *,
    model: Any,
    teachers: Sequence[str] = ("teacher",),
    combine: str = "mean",
    loss: str = "huber",
    scale: float = 1.0,
    of: Sequence[str] = PAIR,
) -> Term:
    """Mean over pairs of h(s_ij - t_ij), where t combines the teachers' similarities (TeachText, Croitoru et al. 2021).

        huber   h(d) = d^2 / 2 if |d| <= 1, else |d| - 1/2
        kl      KL(softmax_j t_ij || softmax_j s_ij) instead, mean over rows; likewise of columns; half of each

    s = scale x cosine of the model, t of the teachers. It stands beside `contrastive`; teachers cost nothing later.
    "kl" of one teacher is the relational loss of CLIP-KD (arXiv:2307.12732), and differs from the targets `affinities`
    by a number that no parameter changes.

    Args:
      model: linen module.
      teachers: names of teachers, of any architectures.
      combine: of the teachers' matrices: "mean" or "max", entry by entry.
      loss: "huber" or "kl".
      scale: the factor on cosines, 1 / temperature.
      of: two outputs [B, D] that are compared; twice the same one for the similarities within a modality.

    Metrics: `agreement`, the share of rows whose most similar column is the teachers'.
    """
    combined = choose(COMBINED, combine, f"{WHERE}.combine")
    penalty = choose({"huber": _huber, "kl": _divergence}, loss, f"{WHERE}.loss")
    _check_teachers(teachers)
    if len(of) != 2:
        raise UserError(f"{WHERE}: `of` is {list(of)}; expected two outputs that are compared")

    def loss_of(outputs, features, rows, ctx):
        own = scale * cosines_of(*features["model"])
        taught = combined([scale * cosines_of(*pair) for pair in features["teachers"]])
        agree = jnp.mean(jnp.argmax(own, axis=1) == jnp.argmax(taught, axis=1))
        return penalty(own, jax.lax.stop_gradient(taught)), {"agreement": agree}

    return Term("similarity_distillation", lambda outputs, ctx: _pairs(outputs, teachers, of), loss_of)


@method(
    family="terms",
    system="DCD",
    paper="arXiv:2207.01426",
    differs="a teacher chooses the negatives of each row, and says by its certainty how far the row follows it",
    needs={"objective.teachers": {"teacher": {"decay": 1.0}}, "objective.negatives": 3},
)
def dynamic_distillation(
    *,
    model: Any,
    teachers: Sequence[str] = ("teacher",),
    negatives: int = 15,
    scale: float = 100.0,
    dynamic: bool = True,
    targets: str | Mapping[str, Any] = "identity",
    of: Sequence[str] = PAIR,
) -> Term:
    """Contrast and distillation on the negatives that a teacher finds hardest (DCD, Rao et al. 2022).

    The candidates of image i are its text, c = 0, and the K others whose similarity the teacher says is largest:

        mean_i v_i ((1 - u_i) KL(p_i || q_i) - u_i log q_i0)      p = softmax_c(scale x t_ic),  q = softmax_c(s_ic)

    u_i = H(p_i) / log(K + 1) is how uncertain the teacher is, v_i = H(q_i) / log(K + 1) how uncertain the model is: a
    row that the model has learned counts little, and where the teacher is uncertain, the label leads. No gradient
    flows to u and v. Half of the loss is of images, half of texts. s has the model's learned scale. Not dynamic:
    KL - log q_i0; with all K = B - 1 others, the second part is then CLIP's loss.

    Args:
      model: linen module with two embeddings and a `scale`.
      teachers: names of teachers; the mean of their similarities counts.
      negatives: K, below the number of rows.
      scale: the factor on the teachers' cosines.
      dynamic: whether rows have the weights u and v.
      targets: "identity", or labels as for `contrastive`; pairs that match are no negatives.
      of: outputs [B, D] of images and of texts.

    Metrics: `accuracy` among the candidates of images, `teacher_uncertainty` and `uncertainty`, the means of u and v.
    """
    if negatives < 1:
        raise UserError(f"{WHERE}.negatives is {negatives}; expected at least 1")
    _check_teachers(teachers)
    matches = targets_of.build(targets, f"{WHERE}.targets")
    if matches.labels is None:
        raise UserError(f"{WHERE}.targets match or do not, such as `identity`; got soft ones")

    def directed(own, taught, also):
        own, taught = (jnp.where(also, HIDDEN, logits) for logits in (own, taught))
        _, index = jax.lax.top_k(jnp.where(jnp.eye(len(own), dtype=bool), jnp.inf, taught), negatives + 1)
        log_q, log_p = (
            jax.nn.log_softmax(jnp.take_along_axis(logits, index, axis=1), axis=1) for logits in (own, taught)
        )
        p = jnp.exp(log_p)
        hard, soft = -log_q[:, 0], jnp.sum(p * (log_p - log_q), axis=1)
        uncertain = [-jnp.sum(jnp.exp(x) * x, axis=1) / jnp.log(negatives + 1) for x in (log_p, log_q)]
        u, v = jax.lax.stop_gradient(uncertain)
        value = jnp.mean(v * ((1 - u) * soft + u * hard) if dynamic else soft + hard)
        accuracy = jnp.mean(log_q[:, 0] > jnp.max(log_q[:, 1:], axis=1))
        return value, {"accuracy": accuracy, "teacher_uncertainty": jnp.mean(u), "uncertainty": jnp.mean(v)}

    def loss(outputs, features, rows, ctx):
        own = outputs["scale"] * cosines_of(*features["model"])
        if negatives >= len(own):
            raise UserError(f"{WHERE}.negatives is {negatives}; expected fewer than the {len(own)} rows of a batch")
        taught = scale * COMBINED["mean"]([cosines_of(*pair) for pair in features["teachers"]])
        taught = jax.lax.stop_gradient(taught)
        also = matches.of({}, rows, len(own))[0] & ~jnp.eye(len(own), dtype=bool)  # other rows that match
        of_images, metrics = directed(own, taught, also)
        return 0.5 * (of_images + directed(own.T, taught.T, also.T)[0]), metrics

    return Term("dynamic_distillation", lambda outputs, ctx: _pairs(outputs, teachers, of), loss)


def _check_teachers(teachers: Sequence[str]) -> None:
    if isinstance(teachers, str) or not teachers:
        raise UserError(f"{WHERE}.teachers is {teachers!r}; expected names of teachers, such as ('teacher',)")


def _pairs(outputs: Outputs, teachers: Sequence[str], of: Sequence[str]) -> dict[str, Any]:
    """Returns the outputs to compare, [B, D] each, of the model and of each teacher."""

    def pair(given):
        found = tuple(given[name] for name in of)
        if any(x.ndim != 2 for x in found) or found[0].shape != found[1].shape:
            shapes = " and ".join(f"`{name}` {list(x.shape)}" for name, x in zip(of, found, strict=True))
            raise UserError(f"{WHERE}: similarities are of two outputs [B, D]; got {shapes}")
        return found

    return {"model": pair(outputs), "teachers": [pair(outputs.teacher(name)) for name in teachers]}


def _huber(own: jax.Array, taught: jax.Array) -> jax.Array:
    distance = jnp.abs(own - taught)
    return jnp.mean(jnp.where(distance <= 1, 0.5 * jnp.square(distance), distance - 0.5))


def _divergence(own: jax.Array, taught: jax.Array) -> jax.Array:
    def directed(axis):
        log_p, log_q = (jax.nn.log_softmax(logits, axis=axis) for logits in (taught, own))
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=axis))

    return 0.5 * (directed(1) + directed(0))
