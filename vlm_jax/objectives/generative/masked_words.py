"""Masked words: the text tower predicts tokens that it does not see. For texts with and without pictures."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.token_loss import token_loss
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.outputs import fold
from vlm_jax.objectives.term import WHERE, Term


@method(
    family="terms",
    paper="arXiv:1810.04805",
    where="section 3.1",
    differs="the text tower predicts hidden words of a text",
    needs={"objective.mask_id": 13},
)
def masked_words(
    *, model: Any, mask_id: int, share: float = 0.15, key: str = "token_ids", chunk: int = 8, pad_id: int | None = None
) -> Term:
    """Mean over hidden tokens of -log p(token | the text with hidden tokens) (BERT, Devlin et al. 2019).

    Of `share` of a text's tokens, 8 in 10 become the mask, 1 in 10 a drawn token, 1 in 10 stays. A linear map of the
    term's own takes the tower's tokens to logits. With on="texts", a row set of texts alone, the tower keeps its
    language while `contrastive` trains on pairs (UNIMO, arXiv:2012.15409). The tower should not be causal.

    Args:
      model: linen module with a text tower.
      mask_id: id of the mask; if the tokenizer has none, a new one: its vocabulary's size, with
        model.text.vocab_size one larger.
      share: of the tokens, the end token among them; padding is never hidden.
      key: the texts, int [B, L].
      chunk: number of positions whose logits are in memory at a time.
      pad_id: id of padding; the tokenizer's, which is the default.

    Metrics: `token_accuracy` and `perplexity`, of hidden tokens.
    """
    if not 0 < share <= 1:
        raise UserError(f"{WHERE}.share is {share}; expected a share of the tokens, above 0, up to 1")
    vocabulary = getattr(getattr(model, "text", None), "vocab_size", None)
    if vocabulary is not None and not 0 <= mask_id < vocabulary:
        raise UserError(
            f"{WHERE}.mask_id is {mask_id}; the model's ids are 0 to {vocabulary - 1}: model.text.vocab_size"
        )

    def features(outputs, ctx):
        ids = jnp.asarray(outputs[key])
        size = vocabulary or int(mask_id) + 1
        hidden, seen = hide(ids, is_text(ids, *ctx.special(pad_id)), outputs.keys, share, mask_id, size)
        tokens = outputs.apply("__call__", None, seen).text_tokens
        head = nn.Dense(size, dtype=tokens.dtype)
        outputs.part("head", head, tokens[:, :1])  # makes its parameters outside of the loop over chunks
        losses = token_loss(lambda x: outputs.part("head", head, x).astype(jnp.promote_types(x.dtype, "float32")),
                            tokens, ids, chunk=chunk)  # fmt: skip
        over = lambda x: jnp.sum(jnp.where(hidden, x, 0), axis=1)
        return {"loss": over(losses.loss), "correct": over(losses.correct), "count": jnp.sum(hidden, axis=1)}

    def loss(outputs, features, rows, ctx):
        count = jnp.maximum(jnp.sum(features["count"]), 1)
        value = jnp.sum(features["loss"]) / count
        return value, {"token_accuracy": jnp.sum(features["correct"]) / count, "perplexity": jnp.exp(value)}

    return Term("masked_words", features, loss)


def hide(
    ids: jax.Array, real: jax.Array, keys: jax.Array | None, share: float, mask_id: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (bool [B, L], the hidden tokens; int [B, L], the text in which they are hidden), drawn for each row."""
    keys = jax.random.split(jax.random.key(0), len(ids)) if keys is None else keys

    def one(key, ids):
        which, how, other = (jax.random.uniform(fold(key, name), ids.shape) for name in ("which", "how", "other"))
        drawn = jnp.floor(other * size).astype(ids.dtype)
        return which < share, jnp.where(how < 0.8, mask_id, jnp.where(how < 0.9, drawn, ids))

    chosen, changed = jax.vmap(one)(keys, ids)
    hidden = chosen & real
    return hidden, jnp.where(hidden, changed, ids)
