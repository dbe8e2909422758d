"""Token ids that a model can look up. A look-up beyond the table gives NaN, one below 0 another token: both raise."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import UserError

FIELDS = ("token_ids", "input_ids")


def vocab_size(model: nn.Module) -> int | None:
    """Returns the number of token ids that all text towers and decoders of a model know; None without texts."""
    readers = [getattr(model, side, None) for side in ("text", "decoder")] + list(getattr(model, "towers", ()))
    return min((tower.vocab_size for tower in readers if hasattr(tower, "vocab_size")), default=None)


def is_text(token_ids: Any, pad_id: int, eos_id: int | None = None) -> Any:
    """Returns bool [..., L]: the tokens of texts, int [..., L], their end token among them; of numpy for numpy.

    If padding has the id of the end token (GPT-2, OPT, SigLIP), the first padding after a text is its end. A row of
    padding alone is no text.
    """
    xp = np if isinstance(token_ids, np.ndarray) else jnp
    real = token_ids != pad_id
    if eos_id != pad_id:
        return real
    positions = xp.arange(real.shape[-1])
    last = xp.max(xp.where(real, positions, -1), axis=-1, keepdims=True)
    return (positions <= last + 1) & (last >= 0)


def check_padding(model: nn.Module, tokenizer: Any) -> None:
    """Raises a UserError if a part of a model masks another id than the tokenizer's padding."""
    parts = {"model": model, "model.text": getattr(model, "text", None)}
    for where, part in parts.items():
        own = getattr(part, "pad_id", None)
        masks = part is model or getattr(part, "pad_mask", False)
        if own is not None and masks and tokenizer is not None and tokenizer.pad_id not in (None, own):
            its = f"tokenizer `{tokenizer.spec}` pads with {tokenizer.pad_id}"
            raise UserError(f"config.{where}.pad_id is {own}, {its}: give it that id")


def check_ids(batch: Mapping[str, Any], known: int | None, where: str) -> None:
    """Raises a UserError if a field of token ids in a batch (of one or several sources) has an id outside `known`."""
    for name, rows in batch.items():
        if isinstance(rows, Mapping):
            check_ids(rows, known, f"{where} {name}")
        elif known is not None and name.endswith(FIELDS) and np.size(rows):
            low, high = int(np.min(rows)), int(np.max(rows))
            if low < 0 or high >= known:
                raise UserError(
                    f"{where}: `{name}` has the id {high if high >= known else low}, the model's vocabulary "
                    f"{known} ids, from 0: use the model's own tokenizer, or set vocab_size of a new model"
                )
