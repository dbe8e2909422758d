"""Corruptions by their definitions, the token loss against the plain one, and their composition."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import models, objectives
from vlm_jax.errors import UserError
from vlm_jax.models.token_loss import token_loss
from vlm_jax.objectives.generative import corruptions

VOCAB, LENGTH = 11, 6
SIZES = dict(width=32, depth=1, heads=2, mlp_dim=64)
MASK = VOCAB
DECODER = types.SimpleNamespace(start_id=0, mask_id=MASK)


def targets(n=3):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (n, LENGTH)).astype(np.int32)
    lengths = np.array([LENGTH, 4, 1, 2, 5])[np.arange(n) % 5]
    return jnp.asarray(np.where(np.arange(LENGTH) < lengths[:, None], ids, 0)), jnp.asarray(lengths)


@pytest.fixture(scope="module")
def captioner():
    decoder = dict(**SIZES, vocab_size=VOCAB, length=LENGTH, mask_token=True)
    model = models.build(dict(name="captioner", image=dict(**SIZES, patch=8), decoder=decoder))
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = model.init(jax.random.key(1), images, targets()[0])["params"]
    params["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
    return model, params, {"image": images, "token_ids": targets()[0]}


def value(objective, model, params, batch):
    """(loss, metrics) of a step."""
    loss, metrics = objectives.value(objective, model, params, batch, jax.random.key(0), train=True)
    return loss, {name.removeprefix("captioning/"): metric for name, metric in metrics.items()}


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("chunk", [1, 4, 6, 8])
def test_token_loss_is_the_plain_one(chunk):
    """Values and gradients, whatever is computed at a time."""
    rng = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(rng.normal(size=(3, 6, 8))), jnp.asarray(rng.normal(size=(8, VOCAB)))
    ids = targets()[0]
    smooth, z = 0.1, 1e-2

    def plain(hidden, kernel):
        logits = hidden @ kernel
        log_p = jax.nn.log_softmax(logits)
        wanted = (1 - smooth) * jax.nn.one_hot(ids, VOCAB) + smooth / VOCAB
        return -jnp.sum(wanted * log_p, -1) + z * jax.nn.logsumexp(logits, axis=-1) ** 2

    def chunked(hidden, kernel):
        return token_loss(lambda h: h @ kernel, hidden, ids, label_smoothing=smooth, z_loss=z, chunk=chunk).loss

    weights = jnp.asarray(rng.normal(size=ids.shape))
    grad = lambda fn: jax.grad(lambda *x: jnp.vdot(fn(*x), weights), (0, 1))(hidden, kernel)
    np.testing.assert_allclose(chunked(hidden, kernel), plain(hidden, kernel), rtol=1e-5)
    for a, b in zip(grad(chunked), grad(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_token_loss_holds_a_chunk_of_logits():
    """Of 64 positions, 8 at a time: temporaries of forward and backward stay below half of all logits."""
    batch, length, width, vocab = 8, 64, 32, 4096
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    loss = lambda h, k, ids: token_loss(lambda h: h @ k, h, ids).loss.sum()
    args = shape(batch, length, width), shape(width, vocab), jax.ShapeDtypeStruct((batch, length), jnp.int32)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < batch * length * vocab * 4 / 2


def test_causal():
    ids, lengths = targets()
    inputs, bidirectional, counts, _ = corruptions.causal()(ids, lengths, DECODER, None)
    np.testing.assert_array_equal(inputs, np.concatenate([np.zeros((3, 1)), ids[:, :-1]], axis=1))
    assert bidirectional is None and counts is None


def test_parallel():
    """A share `rate` of captions is all mask tokens that see each other; the others are causal."""
    ids, lengths = targets(2000)
    inputs, bidirectional, counts, _ = corruptions.parallel(rate=0.75)(ids, lengths, DECODER, keys(2000))
    at_once = np.asarray((inputs == MASK).all(1))
    assert abs(at_once.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 2000)
    np.testing.assert_array_equal(bidirectional, np.broadcast_to(at_once[:, None], ids.shape))
    np.testing.assert_array_equal(inputs[~at_once], corruptions.causal()(ids, lengths, DECODER, None).inputs[~at_once])
    assert counts is None
    half = corruptions.parallel(rate=1.0, ratio=0.5)(ids, lengths, DECODER, keys(2000, 1)).inputs
    assert abs(np.mean(half == MASK) - 0.5) < 0.03
    np.testing.assert_array_equal(half[half != MASK], ids[half != MASK])


def test_prefix():
    """Input j holds token j - 1: of a prefix of n tokens, inputs 0..n are seen by all and tokens n.. count."""
    ids, lengths = targets(5)
    inputs, bidirectional, counts, _ = corruptions.prefix(rate=0.5)(ids, lengths, DECODER, None)
    cut = np.minimum(np.asarray(lengths) // 2, np.asarray(lengths) - 1)
    np.testing.assert_array_equal(inputs[:, 1:], ids[:, :-1])
    np.testing.assert_array_equal(np.asarray(bidirectional).sum(1), cut + 1)
    np.testing.assert_array_equal(np.asarray(counts).argmax(1), cut)
    drawn = corruptions.prefix()(*targets(5000), DECODER, keys(5000)).counts
    first = np.asarray(drawn)[::5].argmax(1)  # captions of six tokens
    np.testing.assert_allclose(np.bincount(first, minlength=6) / 1000, 1 / 6, atol=0.06)


def test_masked_spans():
    ids = jnp.ones((4000, 40), jnp.int32)
    lengths = jnp.full(4000, 40)
    corrupt = corruptions.masked_spans(rate=0.3, mean_span=3.0)
    inputs, bidirectional, counts, _ = corrupt(ids, lengths, DECODER, keys(4000))
    masked = np.asarray(counts)
    np.testing.assert_array_equal(inputs, np.where(masked, MASK, ids))
    assert bidirectional.all()
    assert abs(masked.mean() - 0.3) < 0.01
    begins = masked[:, 1:] & ~masked[:, :-1]
    assert abs(masked[:, 1:].sum() / begins.sum() - 3.0 / (1 - 1 / 40)) < 0.2  # spans at the edges are cut
    short = corruptions.masked_spans(rate=0.05)(*targets(500), DECODER, keys(500, 1)).counts
    assert np.asarray(short).any(1).all()
    assert not (np.asarray(short) & ~(np.arange(LENGTH) < np.asarray(targets(500)[1])[:, None])).any()


MIXTURE = dict(
    name="mixture",
    of=dict(S=("causal", 2), X=(dict(name="parallel", rate=1.0), 1), R=(dict(name="masked_spans", rate=0.3), 1)),
)


def test_mixture():
    """Every caption is as its part makes it, and parts come as often as their weights say."""
    ids, lengths = targets(4000)
    corrupt = corruptions.mixture(of=MIXTURE["of"])
    inputs, bidirectional, counts, kind = map(np.asarray, corrupt(ids, lengths, DECODER, keys(4000)))
    np.testing.assert_allclose(np.bincount(kind) / 4000, [0.5, 0.25, 0.25], atol=0.04)
    causal, parallel, spans = (kind == k for k in range(3))
    np.testing.assert_array_equal(inputs[causal], corruptions.causal()(ids, lengths, DECODER, None).inputs[causal])
    assert (
        (inputs[parallel] == MASK).all() and bidirectional[parallel | spans].all() and not bidirectional[causal].any()
    )
    assert counts[causal | parallel].all()
    np.testing.assert_array_equal(inputs[spans], np.where(counts[spans], MASK, ids[spans]))
    assert (np.asarray(corrupt(ids, lengths, DECODER, None).kind) == -1).all()


def test_metrics_of_the_parts_of_a_mixture(captioner):
    """What the batch has none of is NaN; together they make the whole."""
    model, params, batch = captioner
    objective = objectives.build(dict(name="captioning", mean="token", denoisers=["a", "b", "c"]), model)
    batch = batch | {"denoiser": jnp.array([2, 0, 2])}
    metrics = value(objective, model, params, batch)[1]
    assert np.isnan(metrics["b/perplexity"]) and np.isnan(metrics["b/token_accuracy"])
    tokens = np.array(targets()[1])
    tokens = np.array([tokens[1], tokens[0] + tokens[2]])
    parts = np.log([metrics["a/perplexity"], metrics["c/perplexity"]])
    np.testing.assert_allclose(np.log(metrics["perplexity"]), (parts * tokens).sum() / tokens.sum(), rtol=1e-5)
    drawn = objectives.build(dict(name="captioning", corruption=MIXTURE), model)
    metrics = value(drawn, model, params, batch)[1]
    assert {"S/perplexity", "X/perplexity", "R/token_accuracy"} < set(metrics)


@pytest.mark.parametrize("mean", ["caption", "token"])
def test_means(captioner, mean):
    """Padding never counts; the two means by their definitions."""
    model, params, batch = captioner
    objective = objectives.build(dict(name="captioning", mean=mean), model)
    loss, metrics = value(objective, model, params, batch)
    logits = model.apply({"params": params}, batch["image"], batch["token_ids"])
    log_p = np.asarray(jax.nn.log_softmax(logits))
    own = -np.take_along_axis(log_p, np.asarray(batch["token_ids"])[..., None], axis=2)[..., 0]
    real = np.asarray(batch["token_ids"]) != 0
    want = (own * real).sum() / real.sum() if mean == "token" else np.mean((own * real).sum(1) / real.sum(1))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], np.exp((own * real).sum() / real.sum()), rtol=1e-5)
    hits = (log_p.argmax(-1) == np.asarray(batch["token_ids"])) & real
    np.testing.assert_allclose(metrics["token_accuracy"], hits.sum() / real.sum(), rtol=1e-6)


@pytest.mark.parametrize("corruption", ["causal", "prefix", dict(name="parallel", rate=0.5), "masked_spans", MIXTURE])
def test_accumulated_as_whole(captioner, corruption):
    """With micro-batches the gradients are those of one piece, whatever is drawn, and all are finite."""
    model, params, batch = captioner
    objective = objectives.build(dict(name="captioning", corruption=corruption), model)
    both = lambda rng, k: objectives.value_and_grad(objective, model, params, batch, rng, accumulate=k)[:3:2]
    run = jax.jit(both, static_argnums=1)
    loss, grads = run(jax.random.key(0), 3)
    assert np.isfinite(loss) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(run(jax.random.key(0), 1)[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "decoder", "message"),
    [
        (dict(corruption="parallel"), dict(mask_token=False), "set config.model.decoder.mask_token=True"),
        (dict(corruption="magic"), {}, "corruption is `magic`; expected one of: causal, parallel"),
        (dict(mean="batch"), {}, "mean is `batch`"),
        (
            dict(corruption=dict(name="mixture", of=dict(S=("causal", 0)))),
            {},
            "expected name=.corruption, weight above 0",
        ),
        (dict(corruption=dict(name="masked_spans", rate=0.9, mean_span=1.0)), {}, "needs spans longer"),
    ],
)
def test_mistakes_are_named(section, decoder, message):
    decoder = dict(**SIZES, vocab_size=VOCAB, length=LENGTH, mask_token=True) | decoder
    model = models.build(dict(name="captioner", image=dict(**SIZES, patch=8), decoder=decoder))
    with pytest.raises(UserError, match=message):
        objectives.build(dict(name="captioning", **section), model)
