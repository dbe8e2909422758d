"""What changes logits before a token is chosen: repetition, n-grams, temperature, top-k, top-p; and their ranges."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.config import choose
from vlm_jax.errors import UserError

HIDDEN = -1e30
"""Logit of a forbidden token; finite, so that sums of such logits stay finite."""


class Rules(NamedTuple):
    """Changes to the logits before a token is chosen. The start token counts as an earlier token, as in Transformers.

    Attributes:
      repetition_penalty: divides positive logits of earlier tokens, multiplies negative ones (Keskar et al. 2019,
        arXiv:1909.05858, section 4.1); above 0.
      no_repeat_ngram: n: no sequence of n tokens occurs twice; 0: no such rule.
      encoder_no_repeat_ngram: n: no sequence of n tokens of the text that the model reads occurs, its end included;
        0: no such rule.
      temperature, top_k, top_p: for sampling. top_p keeps the fewest tokens with a total probability of at least top_p
        (Holtzman et al. 2019, arXiv:1904.09751, section 3.1), after temperature and top_k. See `RANGES`.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    encoder_no_repeat_ngram: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


NUMBER, WHOLE = (int, float, np.floating, np.integer), (int, np.integer)
SAMPLING = ("temperature", "top_k", "top_p")
RANGES = {  # option -> types, condition, in words
    "repetition_penalty": (NUMBER, lambda x: 0 < x < math.inf, "a number above 0"),
    "no_repeat_ngram": (WHOLE, lambda x: x >= 0, "a whole number, at least 0"),
    "encoder_no_repeat_ngram": (WHOLE, lambda x: x >= 0, "a whole number, at least 0"),
    "temperature": (NUMBER, lambda x: 0 < x < math.inf, "a number above 0"),
    "top_k": (WHOLE, lambda x: x >= 1, "a whole number, at least 1, or None"),
    "top_p": (NUMBER, lambda x: 0 < x <= 1, "above 0 and at most 1, or None"),
    "length": (WHOLE, lambda x: x >= 1, "a whole number, at least 1"),
    "beams": (WHOLE, lambda x: x >= 1, "a whole number, at least 1"),
    "seed": (WHOLE, lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1"),
}
LENGTH_FORMS = {  # what divides log p, of tokens and a; the range of a
    "gnmt": (
        lambda tokens, a: ((5.0 + tokens) / 6.0) ** a,
        (NUMBER, lambda x: 0 <= x < math.inf, "a number, at least 0"),
    ),
    "power": (lambda tokens, a: jnp.maximum(1.0, tokens) ** a, (NUMBER, math.isfinite, "a finite number")),
}


def check(rules: Rules, sampling: Sequence[str] = (), **options: float) -> None:
    """Raises a UserError that names the first option out of its range; options for sampling count only if named."""
    used = {name: value for name, value in rules._asdict().items() if name in sampling or name not in SAMPLING}
    for name, value in {**used, **options}.items():
        if value is not None or name not in ("top_k", "top_p"):
            _in_range(name, value, *RANGES[name])


def check_beams(length_penalty: float, length_form: str, early_stopping: Any) -> None:
    """Raises a UserError unless the options of a beam search are in their ranges."""
    _in_range("length_penalty", length_penalty, *choose(LENGTH_FORMS, length_form, "length_form")[1])
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise UserError(f'early_stopping should be "never", False or True; got {early_stopping!r:.40}')


def _in_range(name, value, kind, holds, expected):
    if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
        hint = "; for the likeliest tokens, use greedy" if name in ("temperature", "top_p") and value == 0 else ""
        raise UserError(f"{name} should be {expected}; got {value!r:.40}{hint}")


def read_texts(inputs: Any, rules: Rules, beams: int = 1) -> jax.Array | None:
    """Returns the token ids [B * beams, S] of texts that a model reads, if a rule is about these, else None."""
    if not rules.encoder_no_repeat_ngram:
        return None
    if getattr(inputs, "ndim", 0) != 2 or not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise UserError("encoder_no_repeat_ngram is for models that read texts; this one reads pictures")
    return jnp.repeat(inputs, beams, axis=0)


def controlled(
    logits: jax.Array, token_ids: jax.Array, t: jax.Array, rules: Rules, start: int, read: jax.Array | None
) -> jax.Array:
    """Returns logits after repetition control.

    Args:
      logits: [N, V] of token t.
      token_ids: [N, L]; those before t are earlier tokens.
      t: position of the token to choose.
      rules: `Rules`.
      start: id of the start token.
      read: result of `read_texts`, [N, S].
    """
    if rules[:3] == Rules()[:3]:
        return logits
    token_ids, t = jnp.pad(token_ids, ((0, 0), (1, 0)), constant_values=start), t + 1
    rows, absent = jnp.arange(len(token_ids))[:, None], logits.shape[-1]  # mode="drop" ignores ids out of range
    if rules.repetition_penalty != 1.0:
        earlier = jnp.where(jnp.arange(token_ids.shape[1]) < t, token_ids, absent)
        seen = jnp.zeros(logits.shape, bool).at[rows, earlier].set(True, mode="drop")
        factor = jnp.where(logits > 0, 1.0 / rules.repetition_penalty, rules.repetition_penalty)
        logits = jnp.where(seen, logits * factor, logits)
    sources = [(rules.no_repeat_ngram, token_ids, t)]
    sources += [] if read is None else [(rules.encoder_no_repeat_ngram, read, read.shape[1])]
    for n, source, known in sources:
        if 0 < n <= source.shape[1] and n <= token_ids.shape[1]:
            banned = jnp.where(_follows(source, known, token_ids, t, n), source[:, n - 1 :], absent)
            logits = logits.at[rows, banned].set(HIDDEN, mode="drop")
    return logits


def _follows(source, known, token_ids, t, n):
    """Returns bool [N, S - n + 1]: whether the n-gram of source [N, S] that begins here would end in token t.

    known: number of source tokens that count; token_ids [N, L]: those before t are earlier tokens.
    """
    last = jax.lax.dynamic_slice_in_dim(token_ids, jnp.maximum(t - n + 1, 0), n - 1, axis=1)
    count = source.shape[1] - n + 1
    before = jnp.stack([source[:, i : i + count] for i in range(n - 1)], -1) if n > 1 else last[:, None]
    return jnp.all(before == last[:, None], axis=-1) & (jnp.arange(count) + n <= known) & (t >= n - 1)


def truncated(logits: jax.Array, rules: Rules) -> jax.Array:
    """Returns the logits [N, V] for sampling, after temperature, top_k and top_p."""
    logits = logits / rules.temperature
    if rules.top_k is not None:
        floor = jax.lax.top_k(logits, min(rules.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= floor, logits, HIDDEN)
    if rules.top_p is not None:
        ranked = -jnp.sort(-logits, axis=-1)
        p = jax.nn.softmax(ranked)
        needed = jnp.cumsum(p, axis=-1) - p < rules.top_p  # likelier tokens do not reach top_p
        floor = jnp.min(jnp.where(needed, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= floor, logits, HIDDEN)
    return logits
