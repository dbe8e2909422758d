"""Denoising inputs and targets as text: `[NLU] cat, <0>, face` and `<0> animal`; see `data.spans`.

Sentinel k is written <k>, a mode token by its name. So people can read the training data, and write blanks for a model
to fill in.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from vlm_jax.data import spans
from vlm_jax.errors import UserError

MARK = re.compile(r"<\d+>|" + "|".join(map(re.escape, spans.MODES)))


def write(ids: Iterable[int], tokenizer: Any, vocab_size: int, sentinels: int = spans.SENTINELS) -> str:
    """Returns the text of inputs or targets, up to EOS.

    Args:
      ids: int [L].
      tokenizer: with `decode` and `eos_id`.
      vocab_size: the model's.
      sentinels: their number.
    """
    ids = np.asarray(ids)
    names = {i: mark for mark, i in _marks(vocab_size, sentinels).items()}
    parts, words = [], []
    for i in ids[: spans.ends(ids, tokenizer.eos_id) - 1].tolist():
        if i in names:
            parts += [tokenizer.decode(words), names[i]]
            words = []
        else:
            words.append(i)
    return " ".join(filter(None, [*parts, tokenizer.decode(words)]))


def read(text: str, tokenizer: Any, vocab_size: int, length: int, sentinels: int = spans.SENTINELS) -> np.ndarray:
    """Returns the ids of a text, the inverse of `write`: int32 [length], with EOS, padded with 0.

    Raises:
      UserError: the text is too long, or has an unknown sentinel.
    """
    marks, ids, at = _marks(vocab_size, sentinels), [], 0
    for found in [*MARK.finditer(text), None]:
        ids += tokenizer.encode(text[at : found.start() if found else None].strip())
        if found:
            if found[0] not in marks:
                raise UserError(f"`{text}`: there is no sentinel {found[0]}, they end with <{sentinels - 1}>")
            ids.append(marks[found[0]])
            at = found.end()
    if len(ids) >= length:
        raise UserError(f"`{text}` has {len(ids)} tokens; there is room for {length - 1} and EOS")
    return np.array([*ids, tokenizer.eos_id, *[0] * (length - len(ids) - 1)], np.int32)


def _marks(vocab_size: int, sentinels: int) -> dict[str, int]:
    """Written mark -> id."""
    return {f"<{k}>": vocab_size - 1 - k for k in range(sentinels)} | spans.mode_ids(vocab_size, sentinels)
