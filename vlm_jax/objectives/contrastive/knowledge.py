"""Structured knowledge beside a text: triples of subject, relation and object, encoded and added to its embedding."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.contrastive import contrastive
from vlm_jax.objectives.term import WHERE, Term

ROLES = ("subject", "relation", "object")


class Knowledge(Encoder, kw_only=True):
    """Embedded triples -> blocks -> mean -> head; unit norm, zero without triples. See `Encoder`.

    A triple is the sum of its parts, each the mean of its tokens in a table of its role. Triples have no order. With
    depth 0, they do not see each other.

    Attributes:
      vocab_size: rows of each table.
    """

    vocab_size: int

    @nn.compact
    def __call__(self, triples, pad_id):
        """int [B, T, 3, L] -> [B, out_dim]."""
        real = triples != pad_id
        given = jnp.any(real, axis=(2, 3))
        x = 0
        for i, role in enumerate(ROLES):
            words = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name=role)(triples[:, :, i])
            count = jnp.maximum(jnp.sum(real[:, :, i], axis=-1, keepdims=True), 1)
            x += jnp.sum(words * real[:, :, i, :, None], axis=2) / count
        seen = given | ~jnp.any(given, axis=1, keepdims=True)  # attention sees something
        x = self.encode(x, mask=seen).tokens if self.depth else self.new_norm("norm")(x)
        weights = given[..., None] / jnp.maximum(jnp.sum(given, axis=1), 1)[:, None, None]
        x = unit(self.project(jnp.sum(x * weights, axis=1)))
        return x * jnp.any(given, axis=1, keepdims=True)


@method(
    family="terms",
    system="Structure-CLIP",
    paper="arXiv:2305.06152",
    differs="encoded triples of subject, relation and object are added to the text's embedding",
    needs={"objective.vocab_size": 14, "objective.encoder": {"width": 16, "depth": 0}},
)
def knowledge(
    *,
    model: Any,
    key: str = "triples",
    strength: float = 0.2,
    encoder: Mapping[str, Any] | None = None,
    vocab_size: int | None = None,
    penalty: str | Mapping[str, Any] = "softmax",
    targets: str | Mapping[str, Any] = "identity",
    pad_id: int | None = None,
) -> Term:
    """The loss of `contrastive` with texts t_i + strength e_i (knowledge-enhanced encoder, Huang et al. 2024).

    e_i is the unit vector of `Knowledge` of the text's triples, such as (fox, left of, owl) and (fox, is, red); 0 for a
    text without any. The sum is not normalised, as the authors have it. With strength 0, the term is `contrastive`. The
    encoder belongs to the term: an exported model has the text tower alone. With `semantic_margin` beside it this is
    Structure-CLIP.

    Args:
      model: linen module with two embeddings.
      key: the triples, token ids int [B, T, 3, L] of the batch; the op `triples` makes them.
      strength: the factor.
      encoder: fields of `Knowledge`, such as dict(width=128, depth=2, heads=4).
      vocab_size: of the tables; the tokenizer's, which is the default.
      penalty, targets: as for `contrastive`.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: those of `contrastive`, and `triples`, the mean number of a text's triples.
    """
    base = contrastive(model=model, penalty=penalty, targets=targets)
    given = {"width": 128, "depth": 2, "heads": 4, "pool": "none", **(encoder or {})}

    def features(outputs, ctx):
        found, triples = base.features(outputs, ctx), outputs[key]
        if triples.ndim != 4 or triples.shape[2] != 3:
            raise UserError(f"{WHERE}: `{key}` has shape {list(triples.shape)}; expected triples [B, T, 3, L]")
        rows = ctx.tokenizer.vocab_size if vocab_size is None and ctx.tokenizer is not None else vocab_size
        if rows is None:
            raise UserError(f"{WHERE}: the run has no tokenizer; set vocab_size")
        sizes = given | {"vocab_size": rows, "out_dim": found["text"].shape[-1]}
        pad = ctx.special(pad_id)[0]
        module = config.call(Knowledge, sizes, f"{WHERE}.encoder")
        known = outputs.part("encoder", module, triples, pad)
        return found | {
            "text": found["text"] + strength * known.astype(found["text"].dtype),
            "triples": jnp.sum(jnp.any(triples != pad, axis=(2, 3)), axis=1),
        }

    def loss(outputs, features, rows, ctx):
        value, metrics = base.loss(outputs, features, rows, ctx)
        return value, metrics | {"triples": jnp.mean(features["triples"].astype(value.dtype))}

    return Term("knowledge", features, loss)
