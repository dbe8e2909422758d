"""Texts that a model writes: captions, answers, what follows a prefix."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.config import call, choose
from vlm_jax.errors import UserError
from vlm_jax.models import generate, logit_rules

METHODS = {"greedy": 0, "sample": 0, "beam": 0}


def write(
    pretrained: Any,
    images: Any,
    method: str = "greedy",
    *,
    prefix: str | Sequence[str] = "",
    echo: bool = True,
    length: int | None = None,
    beams: int = 4,
    length_penalty: float = 0.6,
    length_form: str = "gnmt",
    early_stopping: bool | str = "never",
    seed: int = 0,
    **rules,
) -> list[str]:
    """Describes preprocessed images, or answers texts.

    Args:
      pretrained: a `Pretrained` with a decoder.
      images: [B, H, W, 3], or token ids [B, L] of the texts to answer.
      method: "greedy", "sample" or "beam".
      prefix: beginning of every text, or of each.
      echo: whether the texts contain their prefix.
      length: largest number of tokens, prefix included; defaults to the decoder's length.
      beams, length_penalty, length_form, early_stopping: for "beam", see `generate.beam_search`.
      seed: for "sample".
      **rules: fields of `logit_rules.Rules`: temperature, top_k, top_p, repetition_penalty, no_repeat_ngram,
        encoder_no_repeat_ngram.
    """
    choose(METHODS, method, "method of `caption`")
    rules = call(logit_rules.Rules, rules, "`caption`")
    pretrained.lacks.check("tokenizer")
    decoder, ids = pretrained.model.decoder, pretrained.tokenizer
    length = decoder.length if length is None else length
    drawn = logit_rules.SAMPLING if method == "sample" else ()
    logit_rules.check(rules, drawn, length=length, beams=beams, seed=seed)
    logit_rules.check_beams(length_penalty, length_form, early_stopping)
    length = length if decoder.posemb == "none" else min(length, decoder.length)
    end = ids.pad_id if ids.eos_id is None else ids.eos_id
    special = generate.Special(decoder.start_id, end, ids.pad_id)
    forced = _forced(pretrained, prefix, len(jax.tree.leaves(images)[0]), special)

    def rows(model, params, batch):
        images, forced = batch
        if method == "beam":
            return generate.beam_search(
                model, params, images, forced, length=length, beams=beams, length_penalty=length_penalty,
                length_form=length_form, early_stopping=early_stopping, special=special, rules=rules,
            ).token_ids[:, 0]  # fmt: skip
        rng, greedy = jax.random.key(seed), method == "greedy"
        common = dict(length=length, special=special, rules=rules)
        return generate.sample(model, params, images, rng, forced, greedy=greedy, **common).token_ids

    written = pretrained._run(rows, (images, forced))
    given = np.zeros(len(forced), int) if echo else np.sum(forced != special.pad, axis=1)
    return [ids.decode(row[start:]) for row, start in zip(written, given, strict=True)]


def _forced(pretrained: Any, prefix: str | Sequence[str], count: int, special: generate.Special) -> np.ndarray:
    """Returns int32 [count, P], the prefixes' tokens and padding."""
    if not prefix:
        return np.full((count, 0), special.pad, np.int32)
    prefixes = [prefix] if isinstance(prefix, str) else list(prefix)
    if len(prefixes) not in (1, count):
        raise UserError(f"there are {len(prefixes)} prefixes for {count} inputs; give one, or one each")
    forced = pretrained._target_ids(prefixes)
    return np.broadcast_to(np.where(forced == special.end, special.pad, forced), (count, forced.shape[1]))
