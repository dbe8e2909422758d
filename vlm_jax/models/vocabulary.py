"""Token ids that a model can look up. A look-up beyond the table gives NaN, one below 0 another token: both raise."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from vlm_jax.errors import UserError

FIELDS = ("token_ids", "input_ids")


def vocab_size(model: nn.Module) -> int | None:
    """Returns the number of token ids that all text towers and decoders of a model know; None without texts."""
    readers = [getattr(model, side, None) for side in ("text", "decoder")] + list(getattr(model, "towers", ()))
    return min((tower.vocab_size for tower in readers if hasattr(tower, "vocab_size")), default=None)


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
