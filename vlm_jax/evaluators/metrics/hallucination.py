"""Objects that captions name: those that are not there, and those there that are named (CHAIR, arXiv:1809.02156)."""

from collections.abc import Collection, Sequence

import numpy as np

from vlm_jax.data.scenes.words import plural
from vlm_jax.evaluators.metrics.caption_tokens import tokenize
from vlm_jax.evaluators.metrics.intervals import interval

Form = tuple[str, ...]


def forms(names: Collection[str]) -> dict[Form, str]:
    """Returns tokens -> name, of English names and their plurals; a name goes before a plural."""
    found = {tuple(tokenize(name)): name for name in names}
    for name in names:
        found.setdefault(tuple(tokenize(plural(name))), name)
    return {form: name for form, name in found.items() if form}


def named(tokens: Sequence[str], known: dict[Form, str]) -> set[str]:
    """Returns the names that a caption's tokens hold; the longest name at a place hides those inside of it."""
    found, at, longest = set(), 0, max(map(len, known), default=0)
    while at < len(tokens):
        for length in range(min(longest, len(tokens) - at), 0, -1):
            if name := known.get(tuple(tokens[at : at + length])):
                found.add(name)
                at += length - 1
                break
        at += 1
    return found


def chair(
    captions: Sequence[Sequence[str]], there: Sequence[Collection[str]], known: dict[Form, str]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Returns the metrics of N captions and the intervals of the shares (Rohrbach et al. 2018, section 2.1).

    `chair_i`: of the objects that captions name, each once a caption, the share that is not there; left out if none is
    named. `chair_s`: the share of captions that name an object that is not there. `object_recall`: of the objects that
    are there, the share that is named.

    Args:
      captions: N lists of tokens.
      there: the names of the objects of each picture.
      known: of `forms`; other words name nothing.
    """
    said = [named(tokens, known) for tokens in captions]
    pictures = [set(names) for names in there]
    false = [(i, name not in own) for i, (own, names) in enumerate(zip(pictures, said, strict=True)) for name in names]
    told = [(i, name in names) for i, (own, names) in enumerate(zip(pictures, said, strict=True)) for name in own]
    captions_false = np.bincount([i for i, wrong in false if wrong], minlength=len(said)) > 0
    shares = {"chair_i": false, "chair_s": [*enumerate(captions_false)], "object_recall": told}
    numbers, intervals = {}, {}
    for name, rows in shares.items():
        if rows:
            units, values = np.array(rows, np.int64).T
            numbers[name], intervals[name] = float(values.mean()), interval(values, units=units)
    return numbers, intervals
