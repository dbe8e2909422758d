"""CoCa: what each token sees, decoding with caches, and its objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import models, objectives
from vlm_jax.models.generate import Special, sample

VOCAB, LENGTH, BOS, EOS = 13, 6, 11, 12
SIZES = dict(width=32, depth=2, heads=2, mlp_dim=64)


@pytest.fixture(scope="module", params=[False, True], ids=["loop", "scan"])
def coca(request):
    """(model, params, images, token_ids)."""
    sizes = dict(**SIZES, scan=request.param)
    text = dict(**sizes, vocab_size=VOCAB, length=LENGTH, start_id=BOS)
    section = dict(
        name="coca",
        image=dict(**sizes, patch=8),
        pool=dict(width=32, queries=5, heads=2),
        text=text,
        decoder=dict(**text, logits_bias=False),
        out_dim=16,
    )
    model = models.build(section)
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    token_ids = jnp.array([[BOS, 3, 4, EOS, 0, 0], [BOS, 5, 6, 7, 8, EOS], [BOS, 9, EOS, 0, 0, 0]])
    params = jax.jit(model.init)(jax.random.key(1), images, token_ids)["params"]
    params["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    return model, params, images, token_ids


def test_embeddings(coca):
    model, params, images, token_ids = coca
    both = jax.jit(model.apply)({"params": params}, images, token_ids)
    np.testing.assert_allclose(np.linalg.norm(both.image, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both.text, axis=1), 1, rtol=1e-5)
    assert both.image_tokens.shape == (3, 4, 32) and both.text_tokens.shape == (3, LENGTH, 32)
    np.testing.assert_allclose(both.scale, 1 / 0.07, rtol=1e-5)
    alone = model.apply({"params": params}, images, None)
    np.testing.assert_allclose(alone.image, both.image, atol=1e-6)
    assert alone.text is None


def test_the_text_tower_is_causal_and_its_cls_token_sees_the_text(coca):
    model, params, _, token_ids = coca
    run = lambda ids: model.apply({"params": params}, None, ids)
    before, after = run(token_ids), run(token_ids.at[:, 2].set(1))
    np.testing.assert_allclose(before.text_tokens[:, :2], after.text_tokens[:, :2], atol=1e-6)
    assert np.abs(before.text - after.text).max() > 1e-4


def test_cached_decoding_is_the_loop(coca):
    model, params, images, _ = coca
    got = sample(model, params, images, length=4, greedy=True, special=Special(BOS, EOS, 0))
    ids = np.full((3, 5), BOS, np.int32)

    @jax.jit
    def forward(inputs):
        hidden = model.apply({"params": params}, images, inputs, method="hidden")
        return model.apply({"params": params}, hidden, method="logits")

    for t in range(4):
        ids[:, t + 1] = np.argmax(forward(ids[:, :-1])[:, t], axis=-1)
    for row, want in zip(np.asarray(got.token_ids), ids[:, 1:], strict=True):
        end = list(want).index(EOS) + 1 if EOS in want else len(want)
        np.testing.assert_array_equal(row[:end], want[:end])


def test_objective(coca):
    """The sum of the two losses, each by its definition; the first token is given, not predicted."""
    model, params, images, token_ids = coca
    objective = objectives.build(dict(name="coca", contrastive_loss=dict(penalty="softmax"), chunk=2), model)
    batch = {"image": images, "token_ids": token_ids}
    features = jax.jit(objective.encode)(params, batch, None)
    value, metrics = objective.loss(params, features, batch)
    embeddings = model.apply({"params": params}, images, token_ids)
    logits = embeddings.scale * embeddings.image @ embeddings.text.T
    pair = -np.mean([np.diag(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1)])
    hidden = model.apply({"params": params}, images, token_ids[:, :-1], method="hidden")
    log_p = np.asarray(jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits")))
    targets = np.asarray(token_ids[:, 1:])
    own = np.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    caption = -own[targets != 0].mean()
    np.testing.assert_allclose(metrics["contrastive_loss"], pair, rtol=1e-5)
    np.testing.assert_allclose(metrics["caption_loss"], caption, rtol=1e-5)
    np.testing.assert_allclose(value, pair + 2 * caption, rtol=1e-5)
    grads = jax.jit(lambda p: objectives.value_and_grad(objective, p, batch, None, accumulate=3)[2])(params)
    whole = jax.jit(lambda p: objectives.value_and_grad(objective, p, batch, None)[2])(params)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)  # gradients are as large as 5
