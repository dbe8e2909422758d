"""Embeddings in the space `lexical`: their words, and search by an inverted index."""

from typing import Any, NamedTuple

import numpy as np

from vlm_jax.errors import UserError


def top_words(tokenizer: Any, embeddings: np.ndarray, count: int = 5) -> list[list[tuple[str, float]]]:
    """Returns the words with the largest values of each embedding, and the values, largest first; no word at 0.

    Args:
      tokenizer: of the model.
      embeddings: [n, V], of a model with the space `lexical`.
      count: at most so many words.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] < tokenizer.vocab_size:
        shape, words = embeddings.shape, tokenizer.vocab_size
        raise UserError(f"embeddings of shape {shape} have no dimension for each of {words} words: model.space=lexical")
    best = np.argsort(-embeddings, axis=1, kind="stable")[:, :count]
    return [
        [(tokenizer.decode([int(word)]), float(row[word])) for word in words if row[word] > 0]
        for row, words in zip(embeddings, best, strict=True)
    ]


class InvertedIndex(NamedTuple):
    """For each dimension, the rows in which it is not 0.

    Attributes:
      rows: int [nonzeros], grouped by dimension.
      values: float32 [nonzeros].
      starts: int [V + 1]: dimension v has rows[starts[v] : starts[v + 1]].
      size: number of rows.
    """

    rows: np.ndarray
    values: np.ndarray
    starts: np.ndarray
    size: int

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Returns the inner products [m, n] of queries [m, V] with all rows; reads only what both have."""
        found = np.zeros((len(queries), self.size))
        for scores, query in zip(found, queries, strict=True):
            for word in np.flatnonzero(query):
                part = slice(self.starts[word], self.starts[word + 1])
                scores[self.rows[part]] += float(query[word]) * self.values[part]
        return found.astype(np.float32)


def index(embeddings: np.ndarray, words: int | None = None) -> InvertedIndex:
    """Returns the inverted index of embeddings [n, V]; `words` keeps so many of the largest values of each row."""
    if words is not None and words < embeddings.shape[1]:
        floor = -np.partition(-embeddings, words - 1, axis=1)[:, words - 1 : words]
        embeddings = np.where(embeddings >= floor, embeddings, 0)
    dimension, rows = np.nonzero(embeddings.T)
    starts = np.searchsorted(dimension, np.arange(embeddings.shape[1] + 1))
    return InvertedIndex(rows, embeddings[rows, dimension].astype(np.float32), starts, len(embeddings))
