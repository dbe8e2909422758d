import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import models
from vlm_jax.errors import UserError

IMAGE = dict(width=32, depth=2, heads=2, patch=8, out_dim=16)
TEXT = dict(width=32, depth=2, heads=2, vocab_size=50, length=6, out_dim=16)
KEY = jax.random.key(0)
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((3, 24, 16, 3)), jnp.float32)
TOKENS = jnp.array([[7, 9, 4, 2, 0, 0], [5, 2, 0, 0, 0, 0], [8, 6, 3, 1, 9, 2]])


def build(image=(), text=(), **fields):
    return models.build(dict(name="two_tower", image=IMAGE | dict(image), text=TEXT | dict(text), **fields))


def shapes(model):
    return jax.eval_shape(model.init, KEY, IMAGES, TOKENS)["params"]


def random_params(model):
    """Every parameter random, biases and scales included; the logit scale as it starts."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape), s.dtype), shapes(model))
    return params | {"logit_scale": jnp.log(10.0)}


def value_and_grad(model, params, token_ids=TOKENS):
    def score(p):
        out = model.apply({"params": p}, IMAGES, token_ids)
        other = jnp.eye(3, 16) if out.text is None else out.text
        return jnp.sum(jnp.tanh(out.scale * out.image @ other.T))

    return jax.jit(jax.value_and_grad(score))(params)


def stacked(params):
    """The loop layout as the scan layout: blocks_0, blocks_1 -> blocks with a leading layer axis."""
    out = {}
    for name, tower in params.items():
        if isinstance(tower, dict):
            blocks = [tower[f"blocks_{i}"] for i in range(2)]
            tower = {k: v for k, v in tower.items() if not k.startswith("blocks_")}
            tower["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        out[name] = tower
    return out


def assert_trees_close(got, want, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, want)


@pytest.fixture(scope="module")
def loop():
    model = build()
    params = random_params(model)
    return params, value_and_grad(model, params)


def test_parameter_names(loop):
    params, _ = loop
    assert set(params) == {"image", "text", "logit_scale"}
    assert set(params["image"]) == {"patch_embed", "pos_embed", "blocks_0", "blocks_1", "norm", "head"}
    assert set(params["text"]) == {"token_embed", "pos_embed", "blocks_0", "blocks_1", "norm", "head"}
    assert set(params["image"]["blocks_0"]) == {"norm1", "attn", "norm2", "mlp"}
    assert params["image"]["patch_embed"]["kernel"].shape == (8 * 8 * 3, 32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert models.count(params) == sum(np.size(leaf) for leaf in jax.tree.leaves(params))


def test_embeddings(loop):
    params, _ = loop
    apply = jax.jit(build().apply)
    out = apply({"params": params}, IMAGES, TOKENS)
    for z in (out.image, out.text):
        assert z.shape == (3, 16) and z.dtype == jnp.float32
        np.testing.assert_allclose(jnp.linalg.norm(z, axis=-1), 1.0, atol=1e-6)
    assert out.image_tokens.shape == (3, 6, 32) and out.text_tokens.shape == (3, 6, 32)
    np.testing.assert_allclose(out.scale, 10.0, rtol=1e-6)
    assert out.bias is None
    alone = apply({"params": params}, IMAGES, None)
    assert alone.text is None and alone.text_tokens is None
    np.testing.assert_allclose(alone.image, out.image, atol=1e-6)
    np.testing.assert_allclose(apply({"params": params}, None, TOKENS).text, out.text, atol=1e-6)


def test_scan_is_the_loop(loop):
    params, (value, grads) = loop
    tower = dict(scan=True)
    scan_value, scan_grads = value_and_grad(build(tower, tower), stacked(params))
    np.testing.assert_allclose(scan_value, value, rtol=1e-5)
    assert_trees_close(scan_grads, stacked(grads))


@pytest.fixture(scope="module")
def image_only(loop):
    params, _ = loop
    return value_and_grad(build(), params, token_ids=None)


@pytest.mark.parametrize(("remat", "scan"), [("full", False), ("dots", True), ("dots_no_batch", False)])
def test_remat_changes_nothing(loop, image_only, remat, scan):
    params, _ = loop
    value, grads = image_only
    layout = stacked if scan else lambda tree: tree
    tower = dict(remat=remat, scan=scan)
    remat_value, remat_grads = value_and_grad(build(tower, tower), layout(params), token_ids=None)
    np.testing.assert_allclose(remat_value, value, rtol=1e-5)
    assert_trees_close(remat_grads, layout(grads))


def test_remat_keeps_less(loop):
    params, _ = loop

    def saved(remat):
        model = build(dict(remat=remat))
        pull = lambda p: jax.vjp(lambda p: model.apply({"params": p}, IMAGES, None).image, p)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pull, params)))

    assert saved("full") < saved("dots_no_batch") < saved("none")


def test_bf16_is_close(loop):
    params, _ = loop
    want, got = (
        jax.jit(build(dtype=dtype).apply)({"params": params}, IMAGES, TOKENS) for dtype in ("float32", "bfloat16")
    )
    assert got.image.dtype == got.text.dtype == jnp.float32
    assert got.image_tokens.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.image, want.image, atol=0.02)
    np.testing.assert_allclose(got.text, want.text, atol=0.02)
    np.testing.assert_allclose(jnp.linalg.norm(got.image, axis=-1), 1.0, atol=1e-6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes(build(dtype="bfloat16"))))


def test_scale_and_bias_are_parameters():
    out, variables = build(scale_init=20.0, bias_init=-10.0).init_with_output(KEY, None, None)
    assert set(variables["params"]) == {"logit_scale", "logit_bias"}  # a tower without an input has no parameters
    np.testing.assert_allclose(variables["params"]["logit_scale"], np.log(20.0), rtol=1e-6)
    np.testing.assert_allclose([out.scale, out.bias], [20.0, -10.0], rtol=1e-6)
    assert out.image is None and out.text is None


def test_compiles_once_for_equal_models(loop):
    params, _ = loop
    traces = []

    @jax.jit(static_argnums=0)
    def embed(model, params, images):
        traces.append(1)
        return model.apply({"params": params}, images, None).image

    embed(build(), params, IMAGES)
    embed(build(), params, IMAGES + 1)
    assert len(traces) == 1


def test_zero_features_have_finite_gradients():
    value, grad = jax.value_and_grad(lambda x: models.two_tower.unit(x).sum())(jnp.zeros((2, 4)))
    assert value == 0 and np.all(np.isfinite(grad))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="two_towers"), "config.model.name is `two_towers`"),
        (dict(image=IMAGE | dict(widht=3)), "did you mean `width`"),
        (dict(image=IMAGE | dict(variant="Z/16")), "variant is `Z`"),
        (dict(image=dict(variant="B/x")), "`B/x`"),
        (dict(text=TEXT | dict(variant="B/16")), "but the tower has none"),
        (dict(image=dict(variant="B")), "lacks the key `patch`"),
    ],
)
def test_build_names_the_mistake(section, message):
    with pytest.raises(UserError, match=message):
        models.build(dict(name="two_tower", image=IMAGE, text=TEXT) | section)


def test_variants():
    model = models.build(
        dict(image=dict(variant="So400m/14", depth=2), text=dict(variant="B", vocab_size=9, length=4, causal=True))
    )
    image, text = model.image, model.text
    assert (image.width, image.depth, image.mlp_dim, image.heads, image.patch) == (1152, 2, 4304, 16, 14)
    assert (text.width, text.depth, text.mlp_dim, text.heads) == (768, 12, 3072, 12)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (dict(out_dim=8), {}, "image embeddings have 8 dimensions, text embeddings 16"),
        (dict(pool="none", out_dim=None), {}, 'image tower has pool "none"'),
        (dict(pool="none"), {}, "leave out_dim"),
        (dict(pool="eos"), {}, "pool `eos`"),
        (dict(pool="sum"), {}, "pool is `sum`"),
        (dict(remat="half"), {}, "remat is `half`"),
        (dict(norm="batch"), {}, "norm is `batch`"),
        (dict(activation="swish"), {}, "activation is `swish`"),
        (dict(heads=5), {}, "does not divide into 5 heads"),
        (dict(posemb="rope"), {}, "posemb is `rope`"),
        (dict(implementation="magic"), {}, "attention implementation is `magic`"),
        ({}, dict(pool="eos"), "needs eos_id"),
    ],
)
def test_unknown_choices_name_the_field(image, text, message):
    model = build(image, text)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(model.init, KEY, IMAGES, TOKENS)
