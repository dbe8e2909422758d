"""Which ids are text, by hand; ids of padding that do not agree."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.models.vocabulary import check_padding, is_text

ROWS = np.array([[5, 6, 1, 0, 0], [5, 0, 6, 0, 0], [5, 6, 7, 8, 9], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_tokens_of_texts(array):
    counts = lambda *special: is_text(array(ROWS), *special).sum(-1).tolist()
    assert counts(0) == counts(0, 1) == [3, 2, 5, 0]
    assert counts(0, 0) == [4, 4, 5, 0]  # the first padding is the end; a row of padding is no text
    assert is_text(array(ROWS), 0, 0)[0].tolist() == [True, True, True, True, False]


def test_a_models_padding_is_the_tokenizers():
    tokenizer = SimpleNamespace(pad_id=1, spec="json:a")
    with pytest.raises(UserError, match=r"config\.model\.pad_id is 0, tokenizer `json:a` pads with 1"):
        check_padding(SimpleNamespace(pad_id=0), tokenizer)
    text = SimpleNamespace(pad_id=0, pad_mask=True)
    with pytest.raises(UserError, match=r"config\.model\.text\.pad_id is 0"):
        check_padding(SimpleNamespace(text=text), tokenizer)
    text.pad_mask = False  # padding is not masked, so that its id does not matter
    check_padding(SimpleNamespace(text=text), tokenizer)
    check_padding(SimpleNamespace(pad_id=1), tokenizer)
