"""One transformer that reads a picture and then writes (GenLIP)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import slow_captioners as slow
from tests.support.compare import close
from tests.support.models import IMAGES, TOKENS, initial, run, section, tiny
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.generate import beam_search, log_likelihood, log_likelihoods, sample
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.pretrained.embedding import features


def test_values_and_gradients_are_the_loops():
    """Patches see each other; a text sees all patches and itself so far; a gate follows each attention."""

    def loop(params, drawn):
        losses = []
        for image, ids in zip(batch["image"], batch["token_ids"], strict=True):
            tokens = slow.embedded(image, params["image"]) + slow.texts(ids, params["decoder"])
            hidden = slow.blocks(tokens, params["image"], lambda i, j: j < 4 or j <= i)
            losses.append(slow.cross_entropy(hidden[4:], ids, params))
        return np.mean(losses)

    with jax.enable_x64(True):
        model, params = slow.build("one_tower_captioner")
        assert "gate" in params["image"]["blocks_0"]["attn"]
        batch, run = slow.compiled(model, dict(name="captioning"), lambda o: o["token_ids"])
        batch = jax.tree.map(np.asarray, batch)
        slow.agree(run, loop, params)


def test_pictures_do_not_see_the_text():
    """The gradient of the text's embeddings on tokens of the picture is zero; these are the tower's own tokens."""
    model, params, (images, texts) = tiny("one_tower_captioner")
    inputs = shift_right(jnp.asarray(texts))

    def picture(table):
        own = params | {"decoder": params["decoder"] | {"token_embed": {"embedding": table}}}
        context, mask = model.apply({"params": own}, images, method="patches")
        hidden = model.apply({"params": own}, inputs, context, context_mask=mask, whole=True, method="decode").hidden
        return jnp.sum(jnp.sin(hidden[:, :4])), hidden

    gradient, hidden = jax.jit(jax.grad(picture, has_aux=True))(params["decoder"]["token_embed"]["embedding"])
    assert not gradient.any()
    tower = run(model.image, params["image"], images).tokens
    np.testing.assert_allclose(hidden[:, :4], tower, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features(model, params, images), tower.mean(1), rtol=1e-5, atol=1e-5)


def test_texts_and_their_likelihoods():
    model, params, (images, texts) = tiny("one_tower_captioner")
    found = sample(model, params, images, length=8, greedy=True)
    close(log_likelihood(model, params, images, found.token_ids, eos_id=1), found.log_likelihood, 1e-4, 1e-4)
    best = beam_search(model, params, images, length=8, beams=2, length_penalty=0.0)
    assert (best.log_likelihood[:, 0] >= found.log_likelihood - 1e-4).all()
    matrix = log_likelihoods(model, params, images, texts)
    close(np.diag(matrix), log_likelihood(model, params, images, texts), 1e-4, 1e-4)


def test_an_open_gate_is_none_bit_for_bit():
    settings = section("one_tower_captioner")
    gated, params = models.build(settings), tiny("one_tower_captioner").params
    plain = models.build(settings | {"image": settings["image"] | {"attn_gate": False}})
    shapes = initial(plain, IMAGES, TOKENS)
    opened = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (0 * leaf + 100 * (path[-1].key == "bias")) if "gate" in str(path) else leaf, params
    )
    without = jax.tree_util.tree_map_with_path(lambda path, _: _at(params, path), shapes)
    np.testing.assert_array_equal(run(gated, opened, IMAGES, TOKENS), run(plain, without, IMAGES, TOKENS))


def test_prompts_before_a_text_are_refused():
    model = insertion.inserted(tiny("one_tower_captioner").model, Prompt(depth=None))
    with pytest.raises(UserError, match="`image` reads a text"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)


def _at(tree, path):
    for step in path:
        tree = tree[step.key]
    return tree
