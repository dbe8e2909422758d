"""Terms on what a model's space says besides embeddings: words that are active for everything, entailed concepts."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="LexVLA",
    paper="arXiv:2407.17827",
    differs="words that are active in most pictures or texts cost more",
    needs={"model.space": "lexical"},
)
def overuse(*, model: Any, part: str = "words", of: Sequence[str] = ("image", "text"), weighted: bool = True) -> Term:
    """Sum over modalities of sum_v p_v a_v^2, p_v = a_v / sum_u a_u (overuse penalty of LexVLA, Li et al. 2024).

    a_v is the mean activation of word v over the batch. The term stands beside `contrastive` in `terms`.

    Args:
      model: linen module whose space has the part.
      part: activations of at least 0, [B, V]: "words" of the space `lexical`, "codes" of `codes`.
      of: modalities: "image", "text".
      weighted: False: sum_v a_v^2, the FLOPs regularizer (arXiv:2004.05665), by which rare words cost as well.

    Metrics, of each modality: `<modality>_active`, the mean number of active words of a row; `<modality>_overused`, the
    share of words that are active in more than half of the rows.
    """
    if not of or not set(of) <= {"image", "text"}:
        raise UserError(f"{WHERE}: `of` is {list(of)}; expected some of: image, text")

    features = lambda outputs, ctx: {name: part_of(outputs, name, part) for name in of}

    def loss(outputs, features, rows, ctx):
        total, metrics = 0, {}
        for name, active in features.items():
            mean = jnp.mean(active, axis=0)
            share = mean / jnp.maximum(jnp.sum(mean), 1e-12) if weighted else 1
            total += jnp.sum(share * jnp.square(mean))
            metrics[f"{name}_active"] = jnp.mean(jnp.sum(active > 0, axis=1, dtype=mean.dtype))
            metrics[f"{name}_overused"] = jnp.mean(jnp.mean(active > 0, axis=0) > 0.5)
        return total, metrics

    return Term("overuse", features, loss)


@method(
    family="terms",
    system="ConceptCentric",
    paper="arXiv:2412.13847",
    differs="the boxes of pictures and of texts lie in the boxes of their concepts, and not in others",
    needs={"model.space": "boxes"},
)
def entailment(*, model: Any, key: str = "concept", of: Sequence[str] = ("image", "text")) -> Term:
    """Mean over modalities, rows and concepts of the binary cross-entropy of P(c | x) (Geng and Tang 2024).

    Concepts that a row has and those that it lacks have half of a row's weight each.

    Args:
      model: linen module with the space `boxes`.
      key: a key of the batch: bool [B, C], the concepts of a row; or integers [B], its one concept.
      of: modalities: "image", "text"; each is trained by itself, so that one may be added later.

    Metrics, of each modality: `<modality>_present` and `<modality>_absent`, the mean P of concepts that a row has, and
    of those that it lacks.
    """
    if not of or not set(of) <= {"image", "text"}:
        raise UserError(f"{WHERE}: `of` is {list(of)}; expected some of: image, text")

    def loss(outputs, features, rows, ctx):
        if key not in rows:
            raise UserError(f"{WHERE}: the key is `{key}`, which the batch lacks; it has: {', '.join(rows)}")
        total, metrics = 0, {}
        for name, log_p in features.items():
            has = rows[key] if rows[key].ndim == 2 else jax.nn.one_hot(rows[key], log_p.shape[1])
            if has.shape != log_p.shape:
                raise UserError(f"{WHERE}: `{key}` has shape {has.shape}, the space has concepts {log_p.shape}")
            has = has.astype(bool)
            log_absent = jnp.log(-jnp.expm1(jnp.minimum(log_p, -1e-7)))
            mean = lambda x, where: jnp.mean(jnp.sum(x * where, axis=1) / jnp.maximum(jnp.sum(where, axis=1), 1))
            total -= (mean(log_p, has) + mean(log_absent, ~has)) / (2 * len(features))
            p = jnp.exp(log_p)
            metrics |= {f"{name}_present": mean(p, has), f"{name}_absent": mean(p, ~has)}
        return total, metrics

    return Term("entailment", lambda outputs, ctx: {name: part_of(outputs, name, "log_entailed") for name in of}, loss)


def part_of(outputs: Any, side: str, part: str) -> jax.Array:
    """Returns what the model's space says of one side, "image" or "text".

    Raises:
      UserError: the space has no such part.
    """
    parts = outputs[f"{side}_parts"] or {}
    if part not in parts:
        known = ", ".join(parts) or "none"
        raise UserError(f"{WHERE}.part is `{part}`; the parts of the model's space: {known}; see model.space")
    return parts[part]
