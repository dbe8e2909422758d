"""The loss of predicted patches."""

from typing import Any

import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.models.vit import patchify
from vlm_jax.objectives.term import Term


def normalised(patches):
    """Returns patches [..., P] less their mean, by their standard deviation, at least fp32 (MAE: arXiv:2111.06377)."""
    patches = patches.astype(jnp.promote_types(patches.dtype, jnp.float32))
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True, ddof=1) + 1e-6)


@method(
    family="terms",
    paper="arXiv:2411.14402",
    where="section 2.1",
    differs="the squared error of each next patch, given those before",
    needs={"model.name": "next_patch_captioner"},
)
def next_patch(*, model: Any) -> Term:
    """Mean over pictures of the mean over patches i > M of mean((predicted_i - normalised_i)^2).

    M is the number of patches that the tower sees both ways. The weight beside `captioning` is the paper's alpha.

    Args:
      model: `NextPatchCaptioner`, or another model with the output `next_patch`.
    """

    def features(outputs, ctx):
        predicted, counts = outputs["next_patch"]
        patches = patchify(outputs["image"], model.image.patch)
        wanted = normalised(patches.reshape(len(patches), -1, patches.shape[-1])[:, 1:])
        errors = jnp.mean(jnp.square(predicted - wanted), axis=-1)
        return jnp.sum(jnp.where(counts, errors, 0), axis=1) / jnp.maximum(jnp.sum(counts, axis=1), 1)

    def loss(outputs, features, rows, ctx):
        return jnp.mean(features), {}

    return Term("next_patch", features, loss)
