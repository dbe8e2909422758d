"""Words of lexical embeddings, and search by an inverted index."""

import numpy as np
import pytest

from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.pretrained import words


def sparse(seed, rows=7, size=40):
    rng = np.random.default_rng(seed)
    return (rng.random((rows, size)) * (rng.random((rows, size)) < 0.2)).astype(np.float32)


def test_an_inverted_index_has_the_inner_products():
    rows, queries = sparse(0), sparse(1, rows=3)
    found = words.index(rows)
    assert len(found.rows) == np.count_nonzero(rows) and found.size == 7
    np.testing.assert_allclose(found.scores(queries), queries @ rows.T, rtol=1e-6)
    few = np.where(rows >= -np.sort(-rows, axis=1)[:, 2:3], rows, 0)
    np.testing.assert_allclose(words.index(rows, words=3).scores(queries), queries @ few.T, rtol=1e-6)


def test_words_are_read():
    tokenizer = tokenizers.build("emoji")
    ids = [int(tokenizer.encode(word)[0]) for word in ("cat", "hat")]
    embeddings = np.zeros((2, tokenizer.vocab_size), np.float32)
    embeddings[0, ids] = 0.5, 0.75
    assert words.top_words(tokenizer, embeddings) == [[("hat", 0.75), ("cat", 0.5)], []]
    assert words.top_words(tokenizer, embeddings, count=1)[0] == [("hat", 0.75)]
    with pytest.raises(UserError, match="have no dimension for each of 2985 words"):
        words.top_words(tokenizer, embeddings[:, :128])
