"""Each modality alone: a row's other view among those of other rows."""

from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.texts import ids_of
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    system="CleanCLIP",
    paper="arXiv:2303.03323",
    differs="each picture and each text finds its own other view: modalities are aligned anew, each by itself",
    needs={"objective.image": "global", "objective.text": "cap_token_ids"},
)
def own_views(*, model: Any, image: str | None = "view", text: str | None = "texts") -> Term:
    """CleanCLIP's self-supervised loss (Bansal et al. 2023), of modalities z = image, text:

        the mean over modalities of mean_i -log softmax_j(scale <z_i, z'_j>)_i

    z' is another view. Beside `contrastive` on clean pairs, with equal weights in the authors' code, the term undoes
    what a model has learned of a planted trigger, see the op `trigger`. Views are made in data.ops:
    `view('view', random_resized_crop(...) | ... | normalize)`, `paraphrases(1) | ... key='texts'`.

    Args:
      model: linen module with two embeddings.
      image, text: keys of the batch with the other views, pictures [B, H, W, 3] and token ids [B, L] or [B, 1, L]; None
        leaves the modality out.

    Metrics: `image` and `text`, the share of rows that find their own view.
    """
    keys = {name: key for name, key in (("image", image), ("text", text)) if key is not None}
    if not keys:
        raise UserError(f"{WHERE}: own_views has no modality; give `image`, `text` or both")

    def other(outputs, name, key):
        if name == "image":
            return outputs.apply("__call__", outputs[key], None).image
        ids = ids_of(key, outputs[key])
        if ids.shape[1] != 1:
            raise UserError(f"{WHERE}: `{key}` has {ids.shape[1]} texts a row; own_views takes one")
        return outputs.apply("__call__", None, ids[:, 0]).text

    def features(outputs, ctx):
        return {name: (outputs[f"{name}_embedding"], other(outputs, name, key)) for name, key in keys.items()}

    def loss(outputs, features, rows, ctx):
        total, found = 0, {}
        for name, (own, view) in features.items():
            logits = outputs["scale"] * jnp.matmul(own, view.T, precision="highest")
            total -= jnp.mean(jnp.diag(jax.nn.log_softmax(logits, axis=1)))
            found[name] = jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(len(logits)))
        return total / len(features), found

    return Term("own_views", features, loss)
