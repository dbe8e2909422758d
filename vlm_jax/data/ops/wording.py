"""Ops that make texts of a text: false by a word, in other words, cut to a length."""

import contextlib
from typing import Annotated, Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data import english, false_texts, phrases
from vlm_jax.data.english import article
from vlm_jax.data.ops.pipeline import Pipeline
from vlm_jax.data.ops.registry import Length, Number, op
from vlm_jax.data.ops.text import texts_of
from vlm_jax.data.source import BadExample, field
from vlm_jax.errors import UserError

Least = Annotated[int, range(1025)]


@method(
    family="ops",
    system="HardNeg-texts",
    paper="arXiv:2403.02875",
    differs="a caption's words for things, colours, sizes and places are replaced: texts that are wrong by a word",
    needs={"data.ops": "caption('caption') | hard_negatives(2, objects='objects', relations='relations')"},
)
@op
def hard_negatives(
    example: dict,
    rng: np.random.Generator,
    n: Number,
    *,
    kinds: tuple[false_texts.Kind, ...] = false_texts.KINDS,
    words: dict | None = None,
    foils: str | None = None,
    objects: str | None = None,
    relations: str | None = None,
    key: str = "text",
    to: str = "texts",
    least: Least = 0,
) -> dict:
    """Sets `texts` to n texts that the text is not, each wrong by a word, and `texts_mask` to bool [n]: see `captions`.

    `caption('caption') | hard_negatives(2) | tokenize(16) | tokenize(16, key='texts', to='texts')` suits the negatives
    `texts` of the term `contrastive`. Kinds take turns, so that n texts are of as many kinds as there are.

    Args:
      example: holds the text.
      rng: the example's generator.
      n: number of texts.
      kinds: some of "object", "attribute", "relation", "count", "order", see `vlm_jax.data.false_texts`.
      words: your own words by kind, `{'object': ('cat|kitty; dog', 'rose; tulip')}`, in the place of the packaged
        English ones, see `vlm_jax.data.english`.
      foils: path of the data's own false texts, {kind: text}; they come before those by rules.
      objects: path of the picture's objects, {"name": [...], "attributes": [[...], ...]}: texts that may be true by
        them are left out.
      relations: path of relations between the objects, {"subject": [...], "relation": [...], "object": [...]}.
      key: the field of the text.
      to: the field to set.
      least: with fewer texts, the example is bad.
    """
    text = _text_of(example, key, "hard_negatives")
    known, facts = english.words(words), None
    if objects is not None:
        facts = _facts(example, objects, relations)
    own = field(example, foils) if foils is not None else {}
    found = [own[kinds[i]] for i in rng.permutation(len(kinds)) if own.get(kinds[i]) not in (None, "", text)]
    found = list(dict.fromkeys(found))[:n]
    if len(found) < n:
        made = false_texts.draw(text, kinds, n + len(found), known, rng, facts)
        found += [false for false in made if false not in found][: n - len(found)]
    english.tried("hard_negatives", known, key, kinds)(bool(found))
    return _put(example, found, n, to, least, f"`{key}` has {len(found)} of {least} hard negatives")


@method(
    family="ops",
    system="Structure-CLIP",
    paper="arXiv:2305.06152",
    differs="subject, relation and object of what a caption states, by a small grammar",
    needs={"data.ops": "caption('caption') | triples(4, 6)"},
)
@op
def triples(
    example: dict,
    tokenizer: Any,
    n: Number,
    length: Length,
    *,
    words: dict | None = None,
    key: str = "text",
    to: str = "triples",
) -> dict:
    """Sets `triples` to the token ids int32 [n, 3, length] of (subject, relation, object) that the text states.

    "a red fox to the left of two owls" states (fox, left of, owls) and (fox, is, red), see `vlm_jax.data.phrases`. Of
    more than n, the first count; what lacks is padding. See the term `knowledge`.

    Args:
      example: holds the text.
      tokenizer: the run's.
      n: number of triples.
      length: tokens of each part.
      words: your own words by kind, as of `hard_negatives`.
      key: the field of the text.
      to: the field to set.
    """
    known = english.words(words)
    stated = phrases.triples(_text_of(example, key, "triples"), known)[:n]
    english.tried("triples", known, key)(bool(stated))
    ids = np.full((n, 3, length), tokenizer.pad_id, np.int32)
    if stated:
        parts = tokenizer([part for triple in stated for part in triple], length, bos=False, eos=False)
        ids[: len(stated)] = parts.reshape(len(stated), 3, length)
    example[to] = ids
    return example


@op
def paraphrases(
    example: dict,
    rng: np.random.Generator,
    n: Number,
    *paths: str,
    words: dict | None = None,
    key: str = "text",
    to: str = "texts",
    least: Least = 0,
) -> dict:
    """Sets `texts` to n texts that mean the same, and `texts_mask` to bool [n]: see `captions`.

    A paraphrase is the text with other wordings of its words, such as "picture" for "image", or a text of the fields at
    the paths, such as keywords. None is the text itself.

    Args:
      example: holds the text.
      rng: the example's generator.
      n: number of texts.
      *paths: fields with texts, or lists of texts, that are true of the example; absent ones do not count.
      words: your own words by kind, as of `hard_negatives`.
      key: the field of the text.
      to: the field to set.
      least: with fewer texts, the example is bad.
    """
    text, known = _text_of(example, key, "paraphrases"), english.words(words)
    found = dict.fromkeys(reworded(text, known, n, rng))
    if not paths:
        english.tried("paraphrases", known, key)(bool(found))
    for path in paths:
        with contextlib.suppress(BadExample):
            found |= dict.fromkeys(texts_of(field(example, path), path))
    found.pop(text, None)
    texts = list(found)
    chosen = [texts[i] for i in rng.permutation(len(texts))[:n]]
    return _put(example, chosen, n, to, least, f"`{key}` has {len(chosen)} of {least} paraphrases")


def reworded(text: str, words: english.Words, n: int, rng: np.random.Generator) -> list[str]:
    """Returns up to n different texts in which words of the lists have other wordings."""
    options = []
    for match in words.find(text):
        before, own = false_texts.article_at(text, match.start), text[match.start : match.end]
        fits = [one for one in words.wordings(match) if before in (None, article(one))]
        if any(one.lower() != own.lower() for one in fits):
            options.append((match, [own.lower(), *(one for one in fits if one.lower() != own.lower())]))
    found: dict[str, None] = {}
    for _ in range(4 * n if options else 0):
        drawn = [(match, others[int(rng.random() * len(others))]) for match, others in options]
        edits = [false_texts.Edit(*match[:2], one) for match, one in drawn]
        found[false_texts.edited(text, edits)] = None
    return [one for one in found if one.lower() != text.lower()][:n]


@method(
    family="ops",
    system="Text-shearing",
    paper="arXiv:2311.18765",
    differs="captions that a model wrote are cut to the length of the picture's own caption",
    needs={"data.ops": "random_caption('caption', 'long_caption') | shear(key='text', like='caption')"},
)
@op
def shear(example: dict, *, like: str = "text", length: Length | None = None, key: str = "texts") -> dict:
    """Cuts the text, or each text of the list, at `key` to as many words as the text at `like` has.

    `random_caption('caption', 'long_caption') | shear(key='text', like='caption')` trains on one of a picture's
    captions at a time, its own or a sheared one. `caption('caption') | captions(3, 'sub_captions') | shear` gives
    several at once. Words are what white space separates.

    Args:
      example: holds the texts.
      like: the field of the picture's own caption, a text or a list of texts, of which the first counts.
      length: number of words, in the place of the caption's.
      key: the field that is cut.
    """
    if length is None:
        own = field(example, like)
        own = own if isinstance(own, str) else next((one for one in own if isinstance(one, str)), "")
        length = len(own.split())
        if not length:
            raise BadExample(f"caption `{like}` is empty", "text")
    value = field(example, key)
    if not isinstance(value, str | list):
        raise UserError(f"op `shear` was given `{key}` of type {type(value).__name__}; expected a text or a list")
    cut = lambda text: text if len(text.split()) <= length else " ".join(text.split()[:length])
    example[key] = cut(value) if isinstance(value, str) else [cut(text) for text in value]
    return example


@method(
    family="ops",
    system="EDA",
    paper="arXiv:1901.11196",
    differs="views of a text: words are exchanged and left out",
    needs={"data.ops": "caption('caption') | text_views(2)"},
)
@op
def text_views(
    example: dict, rng: np.random.Generator, n: Number, drop: float = 0.1, swaps: int = 1, to: str = "texts"
) -> dict:
    """Sets `texts` to n views of the text, for augmentation: words are exchanged, and left out (two edits of EDA's).

    `caption('caption') | text_views(2) | each('texts', lower)` also sets `texts_mask`, all True. For synonyms, see
    `paraphrases`.

    Args:
      example: holds `text`.
      rng: the example's generator.
      n: number of views.
      drop: probability that a word is left out; at least one stays.
      swaps: number of exchanges of two words.
      to: name of the field that is set.
    """
    if not 0 <= drop <= 1:
        raise UserError(f"op `text_views` was given drop={drop}; expected a probability, 0 to 1")
    words, texts = _text_of(example, "text", "text_views").split(), []
    for _ in range(n):
        view = list(words)
        for i, j in rng.integers(len(words), size=(swaps, 2)) if words else ():
            view[i], view[j] = view[j], view[i]
        kept = rng.random(len(view)) >= drop
        texts.append(" ".join(word for word, stays in zip(view, kept, strict=True) if stays) or " ".join(view[:1]))
    return _put(example, texts, n, to, n, "views")


@op
def each(example: dict, rng: np.random.Generator, key: str, ops: Pipeline) -> dict:
    """Runs ops on each text of the list at `key`, such as `each('texts', lower)`; empty texts stay empty."""
    texts = field(example, key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"op `each` was given `{key}` of type {type(texts).__name__}; expected a list of texts")
    example[key] = [text and ops(example | {"text": text}, rng)["text"] for text in texts]
    return example


def _text_of(example: dict, key: str, name: str) -> str:
    text = field(example, key)
    if not isinstance(text, str):
        raise UserError(
            f"op `{name}` was given `{key}` of type {type(text).__name__}; expected a text: use `caption` first"
        )
    return text


def _facts(example: dict, objects: str, relations: str | None) -> false_texts.Facts:
    columns = field(example, objects), None if relations is None else field(example, relations)
    try:
        return false_texts.Facts(*columns)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadExample(f"`{objects}` holds no columns of objects: {type(error).__name__} {error}") from None


def _put(example: dict, texts: list[str], n: int, to: str, least: int, lacks: str) -> dict:
    """Sets n texts, padded with empty ones, and which of them are texts."""
    if len(texts) < least:
        raise BadExample(lacks, "text")
    example[to] = texts + [""] * (n - len(texts))
    example[f"{to}_mask"] = np.arange(n) < len(texts)
    return example
