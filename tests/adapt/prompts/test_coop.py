"""Contexts: room for them in texts, and the Meta-Net that moves them."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.support.few_shot import NAMES, D, tuned
from vlm_jax.adapt.recipe import Inserted
from vlm_jax.data import ops, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.prompts import Context


def test_room():
    """Where the context goes; padding falls off, then what is before the last token."""
    tokenizer = tokenizers.build("emoji")
    make = lambda n, at: ops.parse(f"room({n}, {at}) | keep('token_ids')", tokenizer)  # the tokenizer of now
    run = lambda ids, n, at: make(n, at)({"token_ids": np.array(ids, np.int32)}, None)["token_ids"].tolist()
    filler = run([0, 0], 1, 0)[0]
    assert filler not in (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    assert run([7, 8, 9, 0, 0, 0], 2, 1) == [7, filler, filler, 8, 9, 0]
    assert run([7, 8, 9, 10, 11, 12], 2, 0) == [filler, filler, 7, 8, 9, 12]
    tokenizer = SimpleNamespace(pad_id=1, eos_id=1, bos_id=0)  # SigLIP's: the first padding ends the text
    assert run([7, 8, 9, 10, 1, 1], 2, 0) == [2, 2, 7, 8, 9, 1]
    assert run([7, 8, 9, 10, 11, 1], 2, 1) == [7, 2, 2, 8, 9, 1]


def test_a_meta_net_moves_the_context_by_the_picture(base, pictures):
    """Each picture's texts have contexts v + net(x), in numpy (arXiv:2203.05557, equation 3)."""
    images = pictures[0][:3]
    adapted = tuned(base, Inserted((Context(length=2, image_width=D),)), pictures)
    assert adapted.compares_pairs and not base.compares_pairs
    x = adapted.embed_image_batch(images)
    own = adapted.params["text"]["token_embed"]
    hidden = np.maximum(x @ own["inserted_meta_down"] + own["inserted_meta_down_bias"], 0)
    moves = hidden @ own["inserted_meta_up"] + own["inserted_meta_up_bias"]
    want = []
    for i in range(3):
        params = jax.tree.map(lambda leaf: leaf, adapted.params)
        params["text"]["token_embed"]["inserted_context"] = own["inserted_context"] + moves[i]
        plain = insertion.inserted(base.model, Context(length=2, at=0))
        texts = dataclasses.replace(adapted, model=plain, params=params).embed_texts(NAMES)
        want.append(np.exp(float(params["logit_scale"])) * texts @ x[i])
    np.testing.assert_allclose(adapted.class_logits(images, NAMES), want, rtol=1e-4, atol=1e-4)
    assert np.abs(moves).max() > 1e-3
    with pytest.raises(UserError, match="texts of this model depend on the picture"):
        adapted.embed_texts(NAMES)
