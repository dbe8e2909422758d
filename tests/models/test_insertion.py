"""Inserted modules: outputs unchanged at init, the published counts, and what each of them computes."""

import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial, run
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.kernels import attention
from vlm_jax.models.insertion import NEW, TABLE, begin, inserted, merge
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.prefix import Prefix
from vlm_jax.models.insertions.prompts import Context, Prompt
from vlm_jax.models.layers import Attention, KeyValues
from vlm_jax.params import optim
from vlm_jax.params.table import map_with_name, named_leaves

D, DEPTH, HEADS, HIDDEN = 32, 2, 4, 48
IMAGES = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
TEXTS = jnp.array([[1, 5, 6, 7, 8, 2, 0, 0], [1, 5, 6, 3, 2, 0, 0, 0], [1, 4, 4, 4, 4, 4, 4, 2]])


def towers(scan):
    sizes = dict(width=D, depth=DEPTH, heads=HEADS, mlp_dim=HIDDEN, out_dim=16, scan=scan)
    text = dict(sizes, vocab_size=12, length=8, causal=True, pool="eos", eos_id=2)
    return models.build(dict(image=dict(sizes, patch=8, pool="tok"), text=text))


@pytest.fixture(scope="module")
def base():
    """(model, params, embeddings), blocks in a scan."""
    model = towers(scan=True)
    params = initial(model, IMAGES, TEXTS)
    return model, params, embed(model, params)


@functools.partial(jax.jit, static_argnames="model")
def embed(model, params):
    found = model.apply({"params": params}, IMAGES, TEXTS)
    return found.image, found.text


def randomised(params):
    """What is new, moved away from where it began."""
    draw = lambda name, leaf: leaf + 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape)
    return map_with_name(lambda name, leaf: draw(name, leaf) if re.fullmatch(NEW, name) else leaf, params)


def new(params):
    return {name: leaf for name, leaf in named_leaves(params).items() if re.fullmatch(NEW, name)}


BOTH = 2 * DEPTH  # blocks of both towers
COUNTS = [
    (Adapter(width=5), BOTH * (2 * D * 5 + 5 + D)),
    (Adapter(where=r"image/.*/(attn|mlp)", width=5, form="parallel", scale=0.1), 2 * DEPTH * (2 * D * 5 + 5 + D)),
    (LowRank(rank=3), BOTH * 2 * 3 * (D + D)),
    (LowRank(where=r".*/mlp/fc[12]", rank=3, alpha=6), BOTH * 2 * 3 * (D + HIDDEN)),
    (LowRank(rank=3, magnitude=True), BOTH * 2 * (3 * (D + D) + D)),
    (Prefix(where=r"text/.*/attn", length=3), DEPTH * 2 * 3 * D),
    (Prompt(length=5), 5 * D),
    (Prompt(where="text", length=5, depth=None), DEPTH * 5 * D),
    (Context(length=3), 3 * D),
]


@pytest.mark.parametrize(("insertion", "count"), COUNTS, ids=lambda value: type(value).__name__)
def test_counts_and_what_changes(base, insertion, count):
    """The published counts; the rest is the model's, bit for bit; adapters and low rank begin as nothing."""
    model, params, (image, text) = base
    adapted = inserted(model, insertion)
    begun = begin(jax.random.key(2), adapted, params, IMAGES, TEXTS)
    assert sum(leaf.size for leaf in new(begun).values()) == count
    own = named_leaves(begun)
    assert all(own[name] is leaf for name, leaf in named_leaves(params).items())
    before = embed(adapted, begun)
    if isinstance(insertion, Adapter | LowRank):
        np.testing.assert_array_equal(before[0], image)
        np.testing.assert_array_equal(before[1], text)
    after = embed(adapted, randomised(begun))
    towers = [tower for tower in ("image", "text") if any(name.startswith(tower) for name in new(begun))]
    for tower, got, want in zip(("image", "text"), after, (image, text), strict=True):
        same = np.array_equal(got, want)
        assert same == (tower not in towers), tower
    np.testing.assert_array_equal(embed(model, params)[0], image)  # the model itself is as it was


LOW_RANKS = {
    "plain": dict(),
    "importance": dict(weights="importance"),
    "selection": dict(weights="selection"),
    "singular": dict(weights="singular", stabilised=True),
    "magnitude": dict(magnitude=True, weights="importance"),
}


@pytest.mark.parametrize("fields", LOW_RANKS.values(), ids=LOW_RANKS)
def test_merged_is_unmerged(base, fields):
    """Two insertions, folded at once; they begin as the model, bit for bit."""
    model, params, before = base
    first = LowRank(where=r".*/(query|value|out)", rank=3, alpha=6, **fields)
    adapted = inserted(model, first, LowRank(where=r"text/.*/fc[12]", rank=2))
    begun = begin(jax.random.key(2), adapted, params, IMAGES, TEXTS)
    jax.tree.map(np.testing.assert_array_equal, embed(adapted, begun), before)
    jax.tree.map(np.testing.assert_array_equal, merge(begun, adapted.insertions), params)
    trained = randomised(begun)
    merged = merge(trained, adapted.insertions)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for got, want in zip(embed(model, merged), embed(adapted, trained), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="is no change of kernels; merge folds LowRank"):
        merge(trained, (Adapter(),))
    with pytest.raises(UserError, match=r"one insertion for each kernel; `\S+/attn/\w+` has 2"):
        merge(trained, (first, LowRank(where=".*")))


@pytest.mark.parametrize("fields", LOW_RANKS.values(), ids=LOW_RANKS)
def test_low_rank_updates_by_loops_over_ranks(fields):
    """The kernel of the paper's equation, column by column, in float64."""
    insertion = LowRank(rank=3, alpha=6, **fields)
    rng = np.random.default_rng(0)
    new = {"a": rng.normal(size=(5, 3)), "b": rng.normal(size=(3, 4)), "magnitude": rng.normal(size=4)}
    new |= {name: rng.normal(size=3) for name in ("importance", "selection", "singular")}
    kernel = rng.normal(size=(5, 4))
    weights = new.get(insertion.weights, np.ones(3))
    if insertion.weights == "selection":
        weights = np.exp(weights) / np.exp(weights).sum()
    want = kernel.copy()
    for i in range(3):
        want += 6 / (3**0.5 if insertion.stabilised else 3) * weights[i] * np.outer(new["a"][:, i], new["b"][i])
    if insertion.magnitude:
        for j in range(4):
            length = np.sqrt(np.sum(kernel[:, j] ** 2)) + new["magnitude"][j]
            want[:, j] *= length / np.sqrt(np.sum(want[:, j] ** 2))
    with jax.enable_x64(True):
        np.testing.assert_allclose(insertion.merged(jnp.asarray(kernel), new), want, rtol=1e-12)


def test_the_lengths_of_an_update_are_constants_to_the_gradient():
    """d/db of sum(y^2) / 2, y = x V s: the length |W + a b| in s is held (DoRA), in float64."""
    insertion, model = LowRank(where="", rank=2, magnitude=True), nn.Dense(4)
    with jax.enable_x64(True):
        x, kernel, a, b = (
            jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(6, 3), (3, 4), (3, 2), (2, 4)])
        )
        params = {"kernel": kernel, "bias": jnp.arange(4.0), "inserted_a": a, "inserted_b": b}
        params["inserted_magnitude"] = jnp.array([0.1, -0.2, 0.3, 0.0])
        loss = lambda params: jnp.sum(jnp.square(inserted(model, insertion).apply({"params": params}, x))) / 2
        found = jax.grad(loss)(params)
        turned = (kernel + a @ b) / jnp.linalg.norm(kernel + a @ b, axis=0)
        length = jnp.linalg.norm(kernel, axis=0) + params["inserted_magnitude"]
        y = length * (x @ turned) + params["bias"]
        scale = length / jnp.linalg.norm(kernel + a @ b, axis=0)
        np.testing.assert_allclose(found["inserted_b"], (x @ a).T @ (scale * y), rtol=1e-6)
        np.testing.assert_allclose(found["inserted_magnitude"], (y * (x @ turned)).sum(0), rtol=1e-6)


def test_adapters_compute_the_unified_view():
    """h + s act(x down + b) up + c of one MLP, in numpy."""
    model = models.layers.Mlp(width=HIDDEN)
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, D)))
    params = initial(model, x)
    h = np.asarray(run(model, params, x))
    for form, source in (("serial", h), ("parallel", x)):
        adapted = inserted(model, Adapter(where="", width=4, form=form, scale=0.5))
        trained = randomised(begin(jax.random.key(2), adapted, params, jnp.asarray(x)))
        down, down_bias, up, up_bias = (trained[f"inserted_{n}"] for n in ("down", "down_bias", "up", "up_bias"))
        want = h + 0.5 * (np.maximum(source @ down + down_bias, 0) @ up + up_bias)
        np.testing.assert_allclose(run(adapted, trained, x), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_is_seen_by_all(causal):
    """Attention to prefix and tokens, with a mask and a bias, against the plain function on what is joined."""
    model = Attention(HEADS, causal=causal)
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])[:, None, None]
    bias = jax.random.normal(jax.random.key(1), (1, HEADS, 5, 5))
    params = initial(model, x)
    prefix = KeyValues(*jax.random.normal(jax.random.key(3), (2, 3, HEADS, D // HEADS)))
    got, _ = run(model, params, x, mask=mask, logits_bias=bias, prefix=prefix)
    heads = lambda name: (x @ params[name]["kernel"] + params[name]["bias"]).reshape(2, 5, HEADS, D // HEADS)
    q, k, v = map(heads, ("query", "key", "value"))
    k, v = (jnp.concatenate([jnp.stack([own] * 2), rest], axis=1) for own, rest in zip(prefix, (k, v), strict=True))
    seen = jnp.concatenate([jnp.ones((2, 1, 5, 3), bool), jnp.broadcast_to(mask, (2, 1, 5, 5))], axis=-1)
    if causal:
        seen = seen & jnp.concatenate([jnp.ones((5, 3), bool), jnp.tril(jnp.ones((5, 5), bool))], axis=-1)
    out = attention(q, k, v, mask=seen, bias=jnp.pad(bias, ((0, 0),) * 3 + ((3, 0),)), implementation="reference")
    want = out.reshape(2, 5, D) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_context_of_the_words_themselves_changes_nothing(base):
    """The vectors of the tokens that stand there, in their place."""
    model, params, (_, text) = base
    same = TEXTS.at[:, 1:4].set(jnp.array([5, 6, 7]))
    adapted = inserted(model, Context(length=3))
    begun = begin(jax.random.key(2), adapted, params, IMAGES, TEXTS)
    begun["text"]["token_embed"]["inserted_context"] = params["text"]["token_embed"]["embedding"][5:8]
    got = run(adapted, begun, None, TEXTS).text
    np.testing.assert_allclose(got, run(model, params, None, same).text, rtol=1e-5, atol=1e-6)
    assert not np.allclose(got, text)


def test_several_at_once_in_a_loop_and_in_a_scan(base):
    """The same embeddings; every inserted array has a gradient, one that is not zero."""
    model, params, _ = base
    adapted = inserted(model, Adapter(width=4), Prompt(length=2, depth=None), Context(length=2), LowRank())
    adapted = inserted(adapted, Prefix(length=2))
    assert len(adapted.insertions) == 5
    begun = randomised(begin(jax.random.key(2), adapted, params, IMAGES, TEXTS))
    _, groups, _ = optim.build(dict(name="sgd", lr=0.1, params=TABLE), begun, total_steps=1)
    assert {name for name, group in groups.items() if group != "frozen"} == new(begun).keys()

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        found = adapted.apply({"params": params}, IMAGES, TEXTS)
        return jnp.sum(jnp.square(found.image @ found.text.T - jnp.eye(3))), (found.image, found.text)

    (_, want), grads = jax.jit(loss)(begun)
    assert all(np.any(leaf) for leaf in new(grads).values())
    loop = {}
    for name, leaf in named_leaves(begun).items():
        layers = range(DEPTH) if "/blocks/" in name else [None]
        loop |= {name.replace("blocks", f"blocks_{i}"): leaf if i is None else leaf[i] for i in layers}
    loop = flax.traverse_util.unflatten_dict(loop, sep="/")
    for got, own in zip(embed(inserted(towers(scan=False), *adapted.insertions), loop), want, strict=True):
        np.testing.assert_allclose(got, own, rtol=1e-5, atol=1e-6)


def test_low_rank_of_a_vit_b16():
    """q and v of 12 blocks, rank 4: 12 * 2 * 4 * (768 + 768)."""
    model = models.build(dict(image=dict(variant="B/16", image_size=224, scan=True), text=None))
    shapes = jax.eval_shape(inserted(model, LowRank()).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)), None)
    assert models.count(new(shapes["params"])) == 147_456


def test_what_does_not_fit_is_named(base):
    model, params, _ = base
    with pytest.raises(UserError, match=r"Adapter.*changes nothing"):
        begin(jax.random.key(0), inserted(model, Adapter(where="image/mlp")), params, IMAGES, TEXTS)
    with pytest.raises(UserError, match=r"`text/\S+` is in one and not in another; expected parameters of one model"):
        alone = models.build(dict(image=None, text=dict(width=D, depth=1, heads=HEADS, vocab_size=12, length=8)))
        begin(jax.random.key(0), inserted(alone, Adapter()), params, None, TEXTS)
    for wrong, message in (
        (Adapter(form="both"), "the form of an adapter is `both`; expected one of: serial, parallel"),
        (Adapter(activation="x"), "the activation of an adapter is `x`; expected"),
    ):
        with pytest.raises(UserError, match=message):
            begin(jax.random.key(0), inserted(model, wrong), params, IMAGES, TEXTS)
    with pytest.raises(UserError, match="a context of 8 from token 1 on does not fit: texts have 8 tokens"):
        begin(jax.random.key(0), inserted(model, Context(length=8)), params, IMAGES, TEXTS)
