"""Distillation: the model's outputs follow a teacher's."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    paper="arXiv:2307.12732",
    where="section 3.3",
    differs="embeddings follow a teacher's, row by row",
    needs={"objective.teachers": {"average": {"decay": 0.99}}},
)
def feature_distillation(
    *, model: Any, teacher: str = "average", of: Sequence[str] = ("image_embedding", "text_embedding")
) -> Term:
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
