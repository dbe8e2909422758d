"""CoCa: what each token sees, decoding with caches, and its objective."""

from functools import partial

import jax
import numpy as np
import pytest

from tests.support.compare import close
from tests.support.models import BOS, EOS, LENGTH, tiny
from vlm_jax import objectives
from vlm_jax.models.generate import Special, sample

OBJECTIVE = dict(terms=dict(contrastive={}, captioning=dict(mean="token", weight=2.0, chunk=2)))


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def coca(request):
    return tiny("coca", request.param)


def test_embeddings(coca):
    both = coca.apply()
    np.testing.assert_allclose(np.linalg.norm(both.image, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both.text, axis=1), 1, rtol=1e-5)
    assert both.image_tokens.shape == (3, 4, 32) and both.text_tokens.shape == (3, LENGTH, 32)
    np.testing.assert_allclose(both.scale, 1 / 0.07, rtol=1e-5)
    alone = coca.apply(coca.inputs[0], None)
    np.testing.assert_allclose(alone.image, both.image, atol=1e-6)
    assert alone.text is None


def test_the_text_tower_is_causal_and_its_cls_token_sees_the_text(coca):
    token_ids = coca.inputs[1]
    changed = token_ids.copy()
    changed[:, 2] = 1
    before, after = coca.apply(None, token_ids), coca.apply(None, changed)
    np.testing.assert_allclose(before.text_tokens[:, :2], after.text_tokens[:, :2], atol=1e-6)
    assert np.abs(before.text - after.text).max() > 1e-4


def test_cached_decoding_is_the_loop(coca):
    model, params, (images, _) = coca
    got = sample(model, params, images, length=4, greedy=True, special=Special(BOS, EOS, 0))
    ids = np.full((3, 5), BOS, np.int32)

    forward = lambda inputs: coca.apply(coca.apply(images, inputs, method="hidden"), method="logits")
    for t in range(4):
        ids[:, t + 1] = np.argmax(forward(ids[:, :-1])[:, t], axis=-1)
    for row, want in zip(np.asarray(got.token_ids), ids[:, 1:], strict=True):
        end = list(want).index(EOS) + 1 if EOS in want else len(want)
        np.testing.assert_array_equal(row[:end], want[:end])


def test_objective(coca):
    """The sum of the two losses, each by its definition; the first token is given, not predicted."""
    model, params, (images, token_ids) = coca
    objective = objectives.build(OBJECTIVE, model)
    batch = {"image": images, "token_ids": token_ids}
    value, metrics = jax.jit(partial(objectives.value, objective, model))(params, batch, None)
    embeddings = coca.apply()
    logits = embeddings.scale * embeddings.image @ embeddings.text.T
    pair = -np.mean([np.diag(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1)])
    hidden = coca.apply(images, token_ids[:, :-1], method="hidden")
    log_p = np.asarray(jax.nn.log_softmax(coca.apply(hidden, method="logits")))
    targets = np.asarray(token_ids[:, 1:])
    own = np.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    caption = -own[targets != 0].mean()
    np.testing.assert_allclose(metrics["contrastive/loss"], pair, rtol=1e-5)
    np.testing.assert_allclose(metrics["captioning/loss"], caption, rtol=1e-5)
    np.testing.assert_allclose(value, pair + 2 * caption, rtol=1e-5)


def test_micro_batches_give_the_same_gradients():
    model, params, (images, token_ids) = tiny("coca", scan=True)
    objective = objectives.build(OBJECTIVE, model)
    batch = {"image": images, "token_ids": token_ids}
    grads = partial(objectives.value_and_grad, objective, model, batch=batch, rng=None)
    run = jax.jit(lambda params, k: grads(params, accumulate=k)[2], static_argnums=1)
    close(run(params, 3), run(params, 1), rtol=2e-6, atol=2e-6)  # gradients are as large as 5
