"""FILIP's similarity against loops over all tokens, its objective, and a model of it in use."""

import itertools
from contextlib import nullcontext
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from configs import filip
from tests.support import lookup
from vlm_jax import evaluators, objectives
from vlm_jax.models import Embeddings, build
from vlm_jax.models.two_tower import EMBEDDINGS
from vlm_jax.objectives.contrastive.similarity import multiple_instance, token_wise
from vlm_jax.params import sharding
from vlm_jax.pretrained import attention_maps
from vlm_jax.pretrained.similarity import similarity, similarity_of_pairs
from vlm_jax.train import train


def tokens(seed, count, length, padded=()):
    """Unit vectors [count, length, 5]; of those in `padded` the last two are padding."""
    z = np.random.default_rng(seed).normal(size=(count, length, 5)).astype(np.float32)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    z[list(padded), -2:] = 0
    return z


IMAGES, TEXTS = tokens(0, 6, 4), tokens(1, 6, 3, padded=(1, 4))


def by_hand(a, b):
    """mean over a's tokens of the best product with b's, [n, m]; in loops, over the tokens that are there."""
    real = lambda z: z[np.any(z != 0, axis=-1)].astype(np.float64)
    return np.array([[np.mean([max(p @ q for q in real(y)) for p in real(x)]) for y in b] for x in a])


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_scores_are_the_equations(chunk):
    scores = token_wise(chunk=chunk).scores
    of_images, of_texts = jax.jit(scores)({"image": IMAGES, "text": TEXTS})
    np.testing.assert_allclose(of_images, by_hand(IMAGES, TEXTS), atol=1e-6)
    np.testing.assert_allclose(of_texts, by_hand(TEXTS, IMAGES).T, atol=1e-6)
    np.testing.assert_allclose(similarity(IMAGES, TEXTS), by_hand(IMAGES, TEXTS), atol=1e-6)
    np.testing.assert_allclose(similarity_of_pairs(IMAGES, TEXTS), np.diag(by_hand(IMAGES, TEXTS)), atol=1e-6)


def pooled_by_hand(images, texts, pool, b, non_local):
    """Scores of `multiple_instance` [n, m], in loops, over the tokens that are there."""
    real = lambda z: z[np.any(z != 0, axis=-1)].astype(np.float64)
    soften = lambda x: np.exp(b * x) / np.sum(np.exp(b * x))
    pools = {
        "max": np.max,
        "mean": np.mean,
        "lse": lambda x: np.log(np.mean(np.exp(b * x))) / b,
        "attention": lambda x: soften(x) @ x,
    }
    found = np.zeros((len(images), len(texts)))
    for i, patches in enumerate(map(real, images)):
        for j, words in enumerate(map(real, texts)):
            for word in words:
                products = patches @ word
                alike = soften(patches @ patches[np.argmax(products)])
                found[i, j] += (pools[pool](products) + non_local * (alike @ patches) @ word) / len(words)
    return found


@pytest.mark.parametrize(("pool", "non_local"), [("lse", 1.0), ("attention", 0.0), ("max", 0.5), ("mean", 0.0)])
def test_pools_of_patches(pool, non_local):
    """Scores against loops in fp64, and their gradient against differences of the loops."""
    images, texts = IMAGES.astype(np.float64), TEXTS.astype(np.float64)
    images[2, 3:] = 0
    weights = np.random.default_rng(2).normal(size=(6, 6))
    move = [np.where(z != 0, np.random.default_rng(3).normal(size=z.shape), 0) for z in (images, texts)]
    value = lambda *z: np.sum(weights * pooled_by_hand(*z, pool, 3.0, non_local))
    with jax.enable_x64(True):
        similarity = multiple_instance(pool=pool, sharpness=3.0, non_local=non_local, chunk=4)
        scores = lambda image, text: similarity.scores({"image": image, "text": text})
        of_images, of_texts = jax.jit(scores)(images, texts)
        np.testing.assert_allclose(of_images, pooled_by_hand(images, texts, pool, 3.0, non_local), rtol=1e-12)
        np.testing.assert_array_equal(of_texts, of_images)
        grads = jax.jit(jax.grad(lambda *z: jnp.sum(weights * scores(*z)[0]), (0, 1)))(images, texts)
        shuffled = jax.jit(scores)(images[:, [2, 0, 3, 1]], texts)[0]
    moved = [value(*(z + s * m for z, m in zip((images, texts), move, strict=True))) for s in (1e-6, -1e-6)]
    slope = sum(np.vdot(g, m) for g, m in zip(grads, move, strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / 2e-6, rtol=1e-6)
    np.testing.assert_allclose(shuffled, of_images, rtol=1e-14)  # the order of patches says nothing


def test_limits_of_pools():
    """The maximum is FILIP's, bit for bit; the mean is that of mean vectors; lse lies between, and reaches both."""
    scores = lambda **options: multiple_instance(non_local=0, **options).scores({"image": IMAGES, "text": TEXTS})[0]
    filip = token_wise().scores({"image": IMAGES, "text": TEXTS})[1]
    np.testing.assert_array_equal(scores(pool="max"), filip)
    words = np.sum(TEXTS, axis=1) / np.sum(np.any(TEXTS != 0, axis=2), axis=1)[:, None]
    np.testing.assert_allclose(scores(pool="mean"), IMAGES.mean(1) @ words.T, atol=1e-6)
    np.testing.assert_array_equal(scores(pool="lse", sharpness=0), scores(pool="mean"))
    np.testing.assert_allclose(scores(pool="attention", sharpness=0), scores(pool="mean"), atol=1e-6)
    for pool in ("lse", "attention"):
        np.testing.assert_allclose(scores(pool=pool, sharpness=1e6), filip, atol=1e-5)
    between = scores(pool="lse", sharpness=2.0)
    assert np.all(between >= scores(pool="mean") - 1e-6) and np.all(between <= filip + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pool="median"), "similarity.pool is `median`; expected one of: max, mean, lse, attention"),
        (dict(sharpness=-1), "similarity.sharpness is -1; expected at least 0"),
    ],
)
def test_pools_that_do_not_exist_are_named(options, message):
    with pytest.raises(vlm_jax.UserError, match=message):
        multiple_instance(**options)


class Distributions(lookup.Lookup):
    """Rows of tables: `image` and `text` are means, `image_sigma` and `text_sigma` standard deviations."""

    outputs: ClassVar = lookup.Lookup.outputs | {
        "image_parts": lambda o: {"sigma": o.params["image_sigma"][o["image"]]},
        "text_parts": lambda o: {"sigma": o.params["text_sigma"][o["token_ids"]]},
    }


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_wasserstein(penalty):
    ids = np.arange(6)
    batch, section = {"image": ids, "token_ids": ids}, dict(similarity="wasserstein", penalty=penalty)
    sigmas = np.random.default_rng(8).uniform(0.1, 0.6, size=(2, 6, 5))
    with jax.enable_x64(True):
        means = lookup.tables(size=6, width=5)
        params = means | {"image_sigma": sigmas[0], "text_sigma": sigmas[1]}

        def by_hand(params, batch):
            logits = np.zeros((6, 6))
            for i, j in itertools.product(ids, ids):
                square = np.sum((params["image"][i] - params["text"][j]) ** 2)
                square += np.sum((params["image_sigma"][i] - params["text_sigma"][j]) ** 2)
                logits[i, j] = -np.exp(params["logit_scale"]) * square + params["logit_bias"]
            return lookup.LOSSES[penalty](logits, logits.T, np.eye(6), np.eye(6))

        run = lambda params, **more: lookup.differentiate(section | more, params, batch, model=Distributions(6, 5))
        lookup.check(run(params), by_hand, params, batch)
        close = lambda *found: jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), *found)
        close(run(params)[::2], run(params, implementation="blockwise")[::2])
        # without width, or with one width for all: the Euclidean score, which for CLIP is half the scale
        points = params | {"image_sigma": 0 * sigmas[0], "text_sigma": 0 * sigmas[1]}
        same = params | {"image_sigma": sigmas[0] * 0 + 0.3, "text_sigma": sigmas[1] * 0 + 0.3}
        np.testing.assert_allclose(run(same)[0], run(points)[0], rtol=1e-12)
        if penalty == "softmax":
            half = params | {"logit_scale": params["logit_scale"] - np.log(2)}
            half |= {"image_sigma": 0 * sigmas[0], "text_sigma": 0 * sigmas[1]}
            np.testing.assert_allclose(run(half)[0], lookup.differentiate({}, means, batch)[0], rtol=1e-12)


def test_wasserstein_of_points_is_named():
    ids = np.arange(6)
    for section, message in (
        (dict(similarity="wasserstein"), "`wasserstein` needs normal distributions: model.space=gaussian"),
        (dict(similarity="wasserstein", negatives="queue"), "negatives need a similarity of one vector each"),
    ):
        with pytest.raises(vlm_jax.UserError, match=message):
            lookup.differentiate(section, lookup.tables(size=6, width=5), {"image": ids, "token_ids": ids})


def test_chunks_have_the_gradients_of_the_whole():
    def dense(image, text):
        products = jnp.einsum("ikd,jrd->ijkr", image, text, precision="highest")
        products = jnp.where(jnp.any(text != 0, -1)[None, :, None], products, -1)
        count = jnp.sum(jnp.any(text != 0, -1), -1)
        of_texts = jnp.sum(jnp.where(jnp.any(text != 0, -1), jnp.max(products, 2), 0), -1) / count
        return jnp.mean(jnp.max(products, 3), 2), of_texts

    chunked = lambda image, text: token_wise(chunk=2).scores({"image": image, "text": text})
    of = lambda scores: lambda *z: sum(jnp.sum(jnp.sin(3 * s + i)) for i, s in enumerate(scores(*z)))
    for want, got in zip(*(jax.grad(of(scores), (0, 1))(IMAGES, TEXTS) for scores in (dense, chunked)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_prompts_are_averaged_and_blocks_change_nothing(monkeypatch):
    prompts = np.stack([TEXTS, TEXTS[::-1]], axis=1)
    want = (by_hand(IMAGES, TEXTS) + by_hand(IMAGES, TEXTS[::-1])) / 2
    np.testing.assert_allclose(similarity(IMAGES, prompts), want, atol=1e-6)
    whole = similarity(IMAGES, TEXTS)
    monkeypatch.setattr("vlm_jax.pretrained.similarity.BLOCK", 1)
    np.testing.assert_array_equal(similarity(IMAGES, TEXTS), whole)


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_images_and_texts_each_have_their_own_logits(penalty):
    class Lookup(nn.Module):
        outputs: ClassVar = EMBEDDINGS

        def __call__(self, images, token_ids):
            return Embeddings(images, token_ids, None, None, jnp.float32(7.0), jnp.float32(-2.0))

    objective = objectives.build(dict(name="contrastive", penalty=penalty, similarity="token_wise"), Lookup())
    batch = {"image": IMAGES, "token_ids": TEXTS}
    loss, metrics = objectives.value(objective, Lookup(), {}, batch, None)
    logits = [7 * by_hand(IMAGES, TEXTS) - 2, 7 * by_hand(TEXTS, IMAGES) - 2]  # a query a row
    if penalty == "softmax":
        want = np.mean([np.log(np.exp(x).sum(1)) - np.diag(x) for x in logits])
    else:
        sign = 2 * np.eye(6) - 1
        want = np.mean([np.log1p(np.exp(-sign * x)).sum(1) for x in logits])
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    best = [np.mean(np.argmax(x, axis=1) == np.arange(6)) for x in logits]
    np.testing.assert_allclose(
        [metrics[f"contrastive/accuracy_{way}"] for way in ("image_to_text", "text_to_image")], best
    )


def test_pool_all_projects_every_token_and_leaves_padding_zero():
    tower = dict(width=16, depth=1, heads=2, out_dim=8, pool="all")
    model = build(
        dict(image=dict(patch=8, **tower), text=dict(vocab_size=9, length=4, pad_mask=True, **tower), bias_init=None)
    )
    images, token_ids = jax.random.normal(jax.random.key(0), (2, 16, 24, 3)), jnp.array([[3, 4, 5, 6], [7, 8, 0, 0]])
    params = model.init(jax.random.key(1), images, token_ids)["params"]
    params["text"]["head"]["bias"] += 1.0
    out = model.apply({"params": params}, images, token_ids)
    assert out.image.shape == (2, 6, 8) and out.text.shape == (2, 4, 8)
    np.testing.assert_allclose(jnp.linalg.norm(out.image, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(out.text, axis=-1), [[1, 1, 1, 1], [1, 1, 0, 0]], atol=1e-5)
    head = params["text"]["head"]
    want = out.text_tokens @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(out.text[0], want[0] / jnp.linalg.norm(want[0], axis=-1, keepdims=True), atol=1e-5)


def test_a_trained_model_is_evaluated_by_its_own_similarity(tmp_path):
    config = filip.get_config("smoke")
    config.update(dict(duration="2 steps", batch_size=16))
    config.evals = {}
    train(config, tmp_path)
    model = vlm_jax.load(tmp_path)
    pictures, names = [np.full((32, 32, 3), c, np.uint8) for c in (0, 99, 200)], ["cat", "red apple"]
    images, texts = model.embed_images(pictures), model.embed_texts(names)
    assert images.shape == (3, 16, 128) and texts.shape == (2, 8, 128)
    logits = np.exp(float(model.params["logit_scale"])) * by_hand(images, texts)
    np.testing.assert_allclose(model.logits(pictures, names), logits, rtol=1e-5)
    maps = attention_maps.word_patch(model, pictures, names)  # of the mean word
    words = [text[np.any(text != 0, axis=1)].mean(0) for text in texts]
    np.testing.assert_allclose(maps.reshape(3, 2, 16), np.einsum("nkd,md->nmk", images, words), atol=1e-6)
    data = dict(uri="tfds:emoji", split="unseen_style", where=dict(style=["noto"], subgroup=["animal-mammal"]))
    found = evaluators.build(dict(type="zeroshot", classes="emoji:seen", label="concept", gallery=2, **data))(model)
    # a model of two steps names no better than by chance, but every picture has been ranked among all names
    ranks = found.artifacts["predictions"]["rank_of_label"]
    assert len(ranks) == found.metrics["examples"] > 5 and found.metrics["top5"] == np.mean(ranks < 5)
    both = evaluators.build(dict(type="retrieval", captions="name/en", gallery=2, **data))(model)
    assert len(both.artifacts["ranks"]["text_to_image"]) == len(ranks)
    with pytest.raises(vlm_jax.errors.UserError, match="one vector for each picture"):
        few = dict(type="few_shot", methods=["gda"], classes="emoji:seen", label="concept", shots=1)
        evaluators.build(few | data)(model)


def test_a_mesh_and_accumulation_change_nothing():
    tower = dict(width=16, depth=1, heads=2, out_dim=8, pool="all")
    model = build(dict(image=dict(patch=8, **tower), text=dict(vocab_size=9, length=4, pad_mask=True, **tower)))
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(16, 16, 16, 3)).astype(np.float32), "token_ids": rng.integers(0, 9, (16, 4))}
    params = model.init(jax.random.key(1), batch["image"], batch["token_ids"])["params"]
    mesh = sharding.make_mesh(2, 2, 2)
    found = []
    for where, accumulate in ((None, 1), (mesh, 1), (mesh, 2)):
        objective = objectives.build(dict(name="contrastive", similarity="token_wise"), model)
        step = jax.jit(partial(objectives.value_and_grad, objective, model, accumulate=accumulate))
        with jax.set_mesh(mesh) if where else nullcontext():
            given = sharding.to_global(batch, mesh, 16) if where else batch
            loss, metrics, grads, _ = step(params, given, jax.random.key(0))
        found.append((loss, metrics["contrastive/accuracy_image_to_text"], grads))
    for other in found[1:]:
        for want, got in zip(*map(jax.tree.leaves, (found[0], other)), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "section, message",
    [
        (dict(similarity="token_wise"), 'give image and text pool "all"'),
        (dict(similarity="cosine", pool="all"), 'another pool than "all"'),
        (dict(similarity="token_wise", pool="all", mask="real"), "need the kernels, which support no similarity"),
        (dict(similarity="token_wise", image_pool="all"), 'give both "all"'),
    ],
)
def test_pools_that_do_not_fit_are_named(section, message):
    pool = section.pop("pool", "gap")
    tower = dict(width=16, depth=1, heads=2, out_dim=8)
    image = dict(patch=8, pool=section.pop("image_pool", pool), **tower)
    text = dict(vocab_size=9, length=4, pool={"gap": "mean"}.get(pool, pool), **tower)
    batch = {"image": np.zeros((2, 16, 16, 3), np.float32), "token_ids": np.ones((2, 4), np.int32)}
    model = build(dict(image=image, text=text))
    with pytest.raises(vlm_jax.UserError, match=message):
        params = model.init(jax.random.key(0), batch["image"], batch["token_ids"])["params"]
        objectives.value(objectives.build(dict(name="contrastive", **section), model), model, params, batch, None)
