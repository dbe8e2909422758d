"""Ops on the fields of an example: keep, rename, draw, leave out."""

import numpy as np

from vlm_jax.data.ops.registry import op
from vlm_jax.data.source import BadExample, field
from vlm_jax.errors import UserError


@op
def keep(example: dict, path: str, *paths: str) -> dict:
    """Keeps only the fields at `path` and `paths`, renamed to the last part of their paths (`name/en`: `en`)."""
    return {one.rsplit("/", 1)[-1]: field(example, one) for one in (path, *paths)}


@op
def rename(example: dict, old: str, new: str) -> dict:
    """Renames the field at path `old` to `new`."""
    example[new] = field(example, old)
    if "/" not in old and old != new:
        del example[old]
    return example


@op
def draw(example: dict, rng: np.random.Generator, path: str) -> dict:
    """Sets the field at `path`, lists of equal length by name, to the items of one place, drawn anew every time.

    `draw("questions")` of {"question": ["how many?", "which colour?"], "answer": ["two", "red"]} sets `questions` to
    {"question": "which colour?", "answer": "red"}, or to the other. Empty lists make a bad example.
    """
    lists = field(example, path)
    sizes = {len(items) for items in lists.values()} if isinstance(lists, dict) else set()
    if len(sizes) != 1:
        raise UserError(f"op `draw`: the field `{path}` is not a dict of lists of one length")
    if not (size := sizes.pop()):
        raise BadExample(f"`{path}` is empty", "fields")
    i = int(rng.random() * size)
    example[path] = {name: items[i] for name, items in lists.items()}
    return example


@op
def missing(example: dict, rng: np.random.Generator, p: float, key: str, *keys: str, fill: float = 0) -> dict:
    """Leaves one of the fields out with probability p: it becomes `fill`, and `<key>_present` is False.

    `... | normalize | caption('text') | tokenize(8) | missing(0.5, 'image', 'token_ids')` leaves out the picture or the
    text of half of the examples, each as often, never both; `<key>_present` is True for all others.

    Args:
      example: holds the fields, arrays: the op follows `normalize` and `tokenize`.
      rng: the example's generator.
      p: from 0 to 1.
      key, *keys: the fields.
      fill: the value of what is missing; of texts the tokenizer's padding.
    """
    if not 0 <= p <= 1:
        raise UserError(f"op `missing` was given p={p}; expected a probability, from 0 to 1")
    keys = (key, *keys)
    u = rng.random()
    gone = min(int(u / p * len(keys)), len(keys) - 1) if u < p else None
    for i, name in enumerate(keys):
        value = field(example, name)
        if not isinstance(value, np.ndarray):
            raise UserError(f"op `missing`: `{name}` is a {type(value).__name__}; put it after normalize and tokenize")
        example[f"{name}_present"] = i != gone
        if i == gone:
            example[name] = np.full_like(value, fill)
    return example
