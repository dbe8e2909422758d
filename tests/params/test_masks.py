import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.objectives import Objective, Term, value_and_grad
from vlm_jax.params import masks
from vlm_jax.params.table import named_leaves

WIDTH, DEPTH, OUT, MLP = 32, 3, 16, 64
SIZES = dict(width=WIDTH, depth=DEPTH, heads=2, mlp_dim=MLP)
IMAGES, TOKENS = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 6), jnp.int32)


def shapes(section):
    model = models.build(section)
    return jax.eval_shape(model.init, jax.random.key(0), IMAGES, TOKENS)["params"]


@functools.cache
def two_tower(scan):
    image = dict(**SIZES, patch=8, out_dim=OUT, scan=scan)
    text = dict(**SIZES, vocab_size=50, length=6, out_dim=OUT, scan=scan)
    return shapes(dict(name="two_tower", image=image, text=text, bias_init=-10.0))


@functools.cache
def coca():
    text = dict(**SIZES, vocab_size=50, length=6)
    pool = dict(width=WIDTH, queries=5, heads=2)
    image = dict(**SIZES, patch=8)
    return shapes(dict(name="coca", image=image, pool=pool, text=text, decoder=text, out_dim=OUT))


def trained(params, spec):
    """Names of what trains, at least in part."""
    return [name for name, m in named_leaves(masks.trainable(params, spec)).items() if np.any(m)]


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)


BLOCK_BIASES = 4 * WIDTH + MLP + WIDTH + 2 * WIDTH  # attention, MLP, two norms
BLOCK = 4 * WIDTH**2 + 2 * WIDTH * MLP + BLOCK_BIASES + 2 * WIDTH
HEAD = WIDTH * OUT + OUT


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "spec, expected",
    [
        ("bias", 2 * (DEPTH * BLOCK_BIASES + WIDTH + OUT) + WIDTH),  # final norms, heads; the patch embedding
        ("norm", 2 * (2 * DEPTH + 1) * 2 * WIDTH),
        ("head", 2 * HEAD),
        ("last_0", 2 * (2 * WIDTH + HEAD) + 2),  # final norms, heads; scale and bias of the logits
        ("last_2", 2 * (2 * BLOCK + 2 * WIDTH + HEAD) + 2),
        ("last_3", 2 * (3 * BLOCK + 2 * WIDTH + HEAD) + 2),
        (((r"text/.*/query/kernel", True), (".*", False)), DEPTH * WIDTH**2),
    ],
)
def test_counts(spec, scan, expected):
    params = two_tower(scan)
    assert masks.count(masks.trainable(params, spec), params) == expected


def test_cross_attention_and_everything():
    params = coca()
    names = trained(params, "cross_attention")
    assert len(names) == DEPTH * 8 and all(n.startswith("decoder/blocks_") and "/cross_attn/" in n for n in names)
    assert trained(params, "head") == ["head/bias", "head/kernel", "image_head/kernel", "text_head/kernel"]
    everything = masks.trainable(params, ((".*", True),))
    assert masks.count(everything, params) == models.count(params)


def test_the_last_blocks_and_what_follows_them():
    assert {name.split("/")[0] for name in trained(coca(), "last_0")} == {
        *("image", "pool", "text", "decoder", "head", "image_head", "text_head", "logit_scale")
    }
    before = set(named_leaves(two_tower(False))) - set(trained(two_tower(False), f"last_{DEPTH}"))
    assert before == {
        *("image/patch_embed/kernel", "image/patch_embed/bias", "image/pos_embed"),
        *("text/token_embed/embedding", "text/pos_embed"),
    }
    mask = masks.trainable(two_tower(True), "last_1")
    layers = mask["image"]["blocks"]["attn"]["query"]["kernel"]
    np.testing.assert_array_equal(layers, np.array([False, False, True]).reshape(3, 1, 1))
    assert mask["image"]["norm"]["scale"] is True and mask["image"]["pos_embed"] is False


def test_apply_zeroes_what_does_not_train():
    params = two_tower(True)
    mask = masks.trainable(params, "last_1")
    nan_where_frozen = jax.tree.map(lambda m, s: np.where(m, np.ones(s.shape, s.dtype), np.nan), mask, params)
    gradients = jax.tree.map(np.asarray, jax.jit(lambda g: masks.apply(mask, g))(nan_where_frozen))
    assert sum(np.sum(g) for g in jax.tree.leaves(gradients)) == masks.count(mask, params)
    assert {x for g in jax.tree.leaves(gradients) for x in np.unique(g)} == {0.0, 1.0}
    assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda s: s.dtype, params)
    as_argument = jax.jit(masks.apply)(mask, nan_where_frozen)  # and so the masks are traced
    jax.tree.map(np.testing.assert_array_equal, as_argument, gradients)


def test_a_step_with_a_mask_moves_only_what_trains():
    params = {"w": jnp.arange(6.0).reshape(3, 2), "frozen": jnp.ones(2)}
    mask = {"w": np.array([[False], [False], [True]]), "frozen": False}
    whole = masks.trainable_leaves(mask)
    assert whole == {"w": True, "frozen": False}
    product = lambda outputs, ctx: outputs["x"] @ (outputs.params["w"] * outputs.params["frozen"])
    objective = Objective((Term("sum", product, lambda outputs, features, rows, ctx: (jnp.sum(features), {})),))
    _, _, grads, _ = value_and_grad(objective, None, params, {"x": jnp.ones((4, 3))}, None, trainable=whole)
    np.testing.assert_array_equal(grads["w"], np.full((3, 2), 4.0))
    tx = optax.masked(optax.adamw(0.1, weight_decay=0.1), whole)

    @jax.jit
    def step(params):
        updates, _ = tx.update(masks.apply(mask, grads), tx.init(params), params)
        return optax.apply_updates(params, masks.apply(mask, updates))

    new = step(params)
    np.testing.assert_array_equal(new["frozen"], params["frozen"])
    np.testing.assert_array_equal(new["w"][:2], params["w"][:2])
    assert np.all(np.asarray(new["w"][2] != params["w"][2]))


def test_sparse_masks():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)}
    tuned = {"a": np.array([[1, -5, 0], [2, 0, -3]], np.float32), "b": np.array([2, 0, 4, -2], np.float32)}
    for k, expected in {
        1: [0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        3: [0, 1, 0, 0, 0, 1, 0, 0, 1, 0],
        5: [0, 1, 0, 1, 0, 1, 1, 0, 1, 0],  # of the three that moved by 2, the first two
        10: [1] * 10,
    }.items():
        mask = masks.largest_moves(base, tuned, k)
        np.testing.assert_array_equal(np.concatenate([mask["a"].ravel(), mask["b"]]), expected)
        assert masks.count(mask, base) == k
    params = two_tower(True)
    first, again, other = (masks.random_mask(jax.random.key(seed), params, 500) for seed in (0, 0, 1))
    assert masks.count(first, params) == masks.count(other, params) == 500
    jax.tree.map(np.testing.assert_array_equal, first, again)
    drawn = {name: int(m.sum()) for name, m in named_leaves(first).items()}
    share = drawn["image/blocks/mlp/fc1/kernel"] / 500
    assert abs(share - DEPTH * WIDTH * MLP / models.count(params)) < 0.05
    flat = lambda mask: np.concatenate([m.ravel() for m in jax.tree.leaves(mask)])
    assert np.sum(flat(first) & flat(other)) < 50  # 500 * 500 / 60,000 are expected


STACK = {"blocks": {"w": np.zeros((2, 3), np.float32)}, "b": np.zeros(3, np.float32)}


def test_mistakes_are_named():
    params = two_tower(False)
    for spec, message in {
        "biases": "trainable is `biases`; expected a table or one of: bias, norm, cross_attention, head, last_<k>",
        "cross_attention": "matches no parameter",
        "last_4": "`image/blocks` has 3 blocks",
        (("image/.*", True),): "no rule matches `logit_bias`",
    }.items():
        with pytest.raises(UserError, match=message):
            masks.trainable(params, spec)
    with pytest.raises(UserError, match="no parameter is in `blocks`"):
        masks.trainable({"w": np.zeros(3)}, "last_1")
    with pytest.raises(UserError, match="`blocks/w` is in one and not in another"):
        masks.count({"b": True}, STACK)
    with pytest.raises(UserError, match=r"the mask of `b` is \[2\]; expected to broadcast to \[3\]"):
        masks.apply({"blocks": {"w": True}, "b": np.ones(2, bool)}, STACK)
    with pytest.raises(UserError, match="`b` moved by NaN"):
        masks.largest_moves(STACK, STACK | {"b": np.full(3, np.nan, np.float32)}, 1)
    for k in (0, 10):
        with pytest.raises(UserError, match=f"k = {k} scalars of 9"):
            masks.largest_moves(STACK, STACK, k)
