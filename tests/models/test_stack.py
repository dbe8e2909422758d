"""What a stack of blocks returns and reads on request: outputs of layers, and a context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close
from tests.support.models import IMAGES, TOKENS, initial
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import inserted
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.models.layers import Norm

SIZES = dict(width=32, depth=3, heads=2, mlp_dim=24)
CONTEXT = np.random.default_rng(1).standard_normal((3, 5, 20)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="layers")
def encode(model, params, inputs, layers=(), **given):
    return model.apply({"params": params}, inputs, layers=layers, **given)


def scanned(params):
    """The same parameters for a scan of blocks."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"blocks_{i}"] for i in range(3)))
    return {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")} | {"blocks": blocks}


@pytest.fixture(scope="module")
def vit():
    model = models.ViT(**SIZES, patch=8, pool="tok")
    return model, initial(model, IMAGES)


def test_layers_are_the_outputs_of_shorter_towers(vit):
    model, params = vit
    encoded = encode(model, params, IMAGES, layers=(0, 1, -1))
    norm = lambda x: Norm().apply({"params": params["norm"]}, x)
    for depth, tokens in enumerate(encoded.aux["layers"], 1):
        close(norm(tokens), encode(model.clone(depth=depth), params, IMAGES).tokens)
    assert encode(model, params, IMAGES).aux == {}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_of_a_scan(vit, remat):
    model, params = vit
    want = encode(model, params, IMAGES, layers=(2, 0))
    close(encode(model.clone(scan=True, remat=remat), scanned(params), IMAGES, layers=(2, 0)), want)


def test_layers_have_no_prompts(vit):
    model = models.TwoTower(image=vit[0].clone(scan=True), text=None)
    with_prompts = inserted(model, Prompt(length=2, depth=None))
    run = lambda model, images: model.image(images, layers=(0,)).aux["layers"][0]
    own = jax.eval_shape(with_prompts.init, jax.random.key(0), IMAGES, None)
    found = jax.eval_shape(functools.partial(with_prompts.apply, method=run), own, IMAGES)
    assert found.shape == (3, 5, 32)


def test_a_layer_that_is_not_there_is_named(vit):
    with pytest.raises(UserError, match="layers asks for block 3 of 3; expected 0 to 2, or -3 to -1"):
        encode(*vit, IMAGES, layers=(3,))


@pytest.fixture(scope="module", params=["inside", "after"])
def reader(request):
    """A text tower that can attend to a context, and its parameters."""
    model = models.TextTransformer(**SIZES, vocab_size=14, length=8, cross=request.param, context_width=20)
    return model, initial(model, TOKENS)


def test_a_tower_reads_a_context(reader):
    model, params = reader
    shapes = jax.eval_shape(functools.partial(model.init, context=CONTEXT), jax.random.key(0), TOKENS)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)  # made without a context
    seen = np.arange(5) < np.array([[5], [2], [3]])
    read = encode(model, params, TOKENS, context=CONTEXT, context_mask=seen).tokens
    padding = np.where(seen[..., None], CONTEXT, 9)
    close(encode(model, params, TOKENS, context=padding, context_mask=seen).tokens, read)
    moved = CONTEXT * np.array([-1, 1, 1], np.float32)[:, None, None]  # the first row's
    other = encode(model, params, TOKENS, context=moved, context_mask=seen).tokens
    close(other[1:], read[1:])
    assert float(jnp.abs(other[0] - read[0]).max()) > 1e-2
    close(encode(model.clone(scan=True), scanned(params), TOKENS, context=CONTEXT, context_mask=seen).tokens, read)


def test_without_a_context_the_tower_is_the_plain_one(reader):
    model, params = reader
    plain = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    for i in range(3):
        block = params[f"blocks_{i}"].items()
        plain[f"blocks_{i}"] = {name: leaf for name, leaf in block if not name.startswith(("cross", "context"))}
    assert jax.tree.structure(plain) != jax.tree.structure(params)
    want = encode(model.clone(cross=None), plain, TOKENS).tokens
    np.testing.assert_array_equal(encode(model, params, TOKENS).tokens, want)


def test_an_image_tower_reads_a_context():
    model = models.ViT(**SIZES, patch=8, cross="inside", context_width=20)
    params = initial(model, IMAGES)
    found = encode(model, params, IMAGES, context=CONTEXT).tokens
    assert float(jnp.abs(found - encode(model, params, IMAGES).tokens).max()) > 1e-2


def test_what_cannot_read_a_context_says_so(vit):
    with pytest.raises(UserError, match='got a context, but has no cross-attention; build it with cross="inside"'):
        encode(*vit, IMAGES, context=CONTEXT)
    with pytest.raises(UserError, match="cross is `before`; expected one of: inside, after, None"):
        models.ViT(**SIZES, patch=8, cross="before").init(jax.random.key(0), IMAGES)
