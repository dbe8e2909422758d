"""Ops on tags: which of a vocabulary a picture has, which it has not, and noise."""

import contextlib
import functools
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data import class_lists
from vlm_jax.data.english import TOKEN, longest, tried
from vlm_jax.data.ops.registry import Number, op
from vlm_jax.data.ops.text import texts_of
from vlm_jax.data.source import BadExample, field
from vlm_jax.errors import UserError


class Vocabulary:
    """Tags, in order.

    Attributes:
      names, shown: the tags as given.
      number: small letters without "#" -> place.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names = self.shown = names
        self.number: dict[str, int] = {}
        for i, name in enumerate(names):
            if not isinstance(name, str) or not plain(name):
                raise UserError(f"a vocabulary of tags has {name!r:.60}; expected words")
            if plain(name) in self.number:
                raise UserError(f"a vocabulary of tags has `{name}` twice; leave one out")
            self.number[plain(name)] = i
        self._longest = max(len(TOKEN.findall(name)) for name in self.number)

    def of(self, texts: list[str], within: bool) -> list[int]:
        """Returns the places of the texts that are tags; with `within`, of those that stand in a text."""
        found = {}
        for text in texts:
            if within:
                found |= dict.fromkeys(place for *_, place in longest(text, self.number, self._longest, plain))
            elif (place := self.number.get(plain(text))) is not None:
                found[place] = None
        return list(found)


def plain(tag: str) -> str:
    """Returns a tag as it is compared: "#Ice_cream" is "ice cream"."""
    return " ".join(tag.lower().replace("_", " ").lstrip("#").split())


@functools.lru_cache(64)
def vocabulary_of(spec: str | tuple[str, ...]) -> Vocabulary:
    """Returns the tags of a list: tags, a file, or a list of class names such as "emoji:seen", see `class_lists.read`.

    Class names that come twice are one tag.
    """
    names = spec if isinstance(spec, tuple) else tuple({plain(n): n for n in class_lists.read(spec).values()}.values())
    if not names:
        raise UserError("a vocabulary of tags is empty")
    return Vocabulary(names)


def _texts(example: dict, paths: tuple[str, ...]) -> list[str]:
    texts = []
    for path in paths:
        with contextlib.suppress(BadExample):
            texts += texts_of(field(example, path), path)
    if not texts:
        raise BadExample(f"tags {', '.join(paths)} are empty", "text")
    return texts


@method(
    family="ops",
    system="WSL-hashtags",
    paper="arXiv:1805.00932",
    differs="a picture's hashtags, or the words of its caption, become the classes that it has",
    needs={"data.ops": "caption('caption') | tags('emoji:seen', 'tags', least=0)"},
)
@op
def tags(
    example: dict,
    vocabulary: str | tuple[str, ...],
    path: str,
    *paths: str,
    within: bool = False,
    to: str = "tags",
    least: int = 1,
) -> dict:
    """Sets `tags` to bool [V]: which tags of a vocabulary the fields at the paths have.

    `tags(('cat', 'dog', 'red'), 'keywords/en')` of ["Dog", "pet"] gives [False, True, False]. See the term
    `tag_softmax`.

    Args:
      example: holds the fields: texts, or lists of texts.
      vocabulary: the tags; or a .txt or .json file, or a list of class names, see `vlm_jax.data.class_lists.read`.
      path, *paths: the fields. A text is a tag as a whole; "#Ice_cream" is the tag "ice cream".
      within: whether words of the vocabulary count that stand in longer texts, such as captions.
      to: the field to set.
      least: with fewer tags, the example is bad.
    """
    known = vocabulary_of(vocabulary)
    found = known.of(_texts(example, (path, *paths)), within)
    tried("tags", known, path, *paths)(bool(found))
    if len(found) < least:
        raise BadExample(f"tags {', '.join((path, *paths))} have {len(found)} of {least} in the vocabulary", "text")
    example[to] = np.zeros(len(known.names), bool)
    example[to][found] = True
    return example


@op
def wrong_tags(
    example: dict,
    rng: np.random.Generator,
    n: Number,
    vocabulary: str | tuple[str, ...],
    path: str,
    *paths: str,
    within: bool = False,
    to: str = "texts",
) -> dict:
    """Sets `texts` to n drawn tags of a vocabulary that the fields lack, and `texts_mask` to bool [n]: see `tags`."""
    known = vocabulary_of(vocabulary)
    own = set(known.of(_texts(example, (path, *paths)), within))
    tried("wrong_tags", known, path, *paths)(bool(own))
    count, chosen = min(n, len(known.names) - len(own)), {}
    while len(chosen) < count and 2 * n < len(known.names) - len(own):
        i = int(rng.random() * len(known.names))
        chosen |= {} if i in own else {i: None}
    if len(chosen) < count:  # of few others, all in a drawn order
        others = [i for i in range(len(known.names)) if i not in own]
        chosen = [others[i] for i in rng.permutation(len(others))[:count]]
    found = [known.names[i] for i in chosen]
    example[to] = found + [""] * (n - len(found))
    example[f"{to}_mask"] = np.arange(n) < len(found)
    return example


@op
def bag(example: dict, tokenizer: Any, key: str = "text", to: str = "tags") -> dict:
    """Sets `tags` to bool [vocabulary]: the tokens of the text at `key`, without special ones: a bag of words."""
    text = field(example, key)
    if not isinstance(text, str):
        raise UserError(f"op `bag` was given `{key}` of type {type(text).__name__}; expected a text")
    ids = [i for i in tokenizer.encode(text) if i not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)]
    if not ids:
        raise BadExample(f"text `{key}` has no tokens", "text")
    example[to] = np.zeros(tokenizer.vocab_size, bool)
    example[to][ids] = True
    return example


@op
def noisy_tags(example: dict, rng: np.random.Generator, share: float, key: str = "tags") -> dict:
    """Replaces each tag of bool [V] at `key`, with the probability `share`, by a random one that the picture lacks."""
    own = np.array(field(example, key), bool)
    if not 0 <= share <= 1:
        raise UserError(f"op `noisy_tags`: share is {share}; expected 0 to 1")
    leave = np.flatnonzero(own)[rng.random(int(own.sum())) < share]
    lacks = np.flatnonzero(~own)
    come = lacks[rng.permutation(len(lacks))[: len(leave)]]
    own[leave[: len(come)]] = False
    own[come] = True
    example[key] = own
    return example
