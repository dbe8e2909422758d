"""A penalty on words, or other dimensions, that are active for everything."""

from collections.abc import Sequence
from typing import Any

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

    def features(outputs, ctx):
        found = {}
        for name in of:
            parts = outputs[f"{name}_parts"] or {}
            if part not in parts:
                known = ", ".join(parts) or "none"
                raise UserError(f"{WHERE}.part is `{part}`; the parts of the model's space: {known}; see model.space")
            found[name] = parts[part]
        return found

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
