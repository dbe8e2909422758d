"""Packed pictures (NaFlex) in every term that reads pictures: as the dense path on squares; padding changes nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import SIZES, VOCAB, drawn, initial
from vlm_jax import models, objectives
from vlm_jax.errors import UserError
from vlm_jax.models import pooling
from vlm_jax.models.vit import patchify
from vlm_jax.objectives.contrastive.negatives import queue
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import Context
from vlm_jax.params.table import map_with_name

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((4, 8, 8, 3))
TEXTS = np.array([[3, 4, 5, 0], [6, 7, 0, 0], [8, 9, 10, 11], [2, 1, 0, 0]])
GRIDS = np.array([(1, 4), (2, 2), (3, 1), (1, 1)])  # of the table's 2 x 2, and others, larger ones among them
TERMS = dict(
    contrastive=dict(penalty="sigmoid"),
    captioning=dict(pad_id=0),
    matching=dict(fusion=dict(width=8, heads=2, dtype="float64"), pad_id=0),
)
SOFT = dict(name="soft_masks", fusion=dict(width=8, heads=2), pad_id=0)


def packed(grids, length):
    """Pictures of these grids in batches of a length: what they show does not depend on the length."""
    patches = np.zeros((4, length, 48))
    for own, grid, pixels in zip(patches, grids, np.random.default_rng(1).standard_normal((4, 4, 48)), strict=True):
        own[: np.prod(grid)] = pixels[: np.prod(grid)]
    return dict(patches=patches, grid=np.asarray(grids, np.int32))


@pytest.fixture(scope="module")
def ready():
    """(function of pictures: loss, metrics, gradients of parameters and pictures; objective, model, parameters)"""
    with jax.enable_x64(True):
        tower = SIZES | dict(depth=1)
        image, text = dict(tower, patch=4, pool="map", image_size=8), dict(tower, vocab_size=VOCAB, length=4)
        section = dict(name="two_tower_captioner", image=image, text=text, decoder=text, bias_init=-10.0)
        model = models.build(section | dict(dtype="float64"))
        objective, batch = objectives.build(dict(terms=TERMS), model), dict(image=IMAGES, token_ids=TEXTS)

        def begin():
            params = model.init(jax.random.key(0), IMAGES, TEXTS)["params"]
            return objectives.make(objective, model, params, batch, jax.random.key(0))

        shapes = jax.eval_shape(begin)[0]
        rng = np.random.default_rng(2)
        params = map_with_name(lambda _, leaf: 0.3 * rng.standard_normal(leaf.shape), shapes)

        @jax.jit
        def run(image):
            def loss(params, image):
                rows = dict(image=image, token_ids=TEXTS)
                return objectives.value(objective, model, params, rows, jax.random.key(3), train=True)

            floats = image["patches"] if isinstance(image, dict) else image
            with_grid = lambda x: dict(image, patches=x) if isinstance(image, dict) else x
            own = lambda params, x: loss(params, with_grid(x))
            (value, metrics), grads = jax.value_and_grad(own, (0, 1), has_aux=True)(params, floats)
            return value, metrics, *grads

        yield run, objective, model, params


def same(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_square_pictures_of_the_own_grid_are_the_dense_path(ready):
    run = ready[0]
    dense = run(IMAGES)
    patches = patchify(IMAGES, 4).reshape(4, 4, 48)
    found = run(dict(patches=patches, grid=np.full((4, 2), 2, np.int32)))
    same(found[:3], dense[:3])
    same(found[3], patchify(np.asarray(dense[3]), 4).reshape(4, 4, 48))
    assert all(np.isfinite(loss) and loss != 0 for name, loss in dense[1].items() if name.endswith("loss"))


def test_padding_changes_nothing_and_has_no_gradient(ready):
    run = ready[0]
    short, long = run(packed(GRIDS, 4)), run(packed(GRIDS, 7))
    same(long[:3], short[:3])
    same(long[3][:, :4], short[3])
    real = np.arange(7) < GRIDS.prod(1)[:, None]
    assert np.all(long[3][~real] == 0) and np.all(np.any(long[3][real] != 0, axis=-1))


def test_micro_batches_give_the_same_gradients(ready):
    _, objective, model, params = ready
    batch = dict(image=packed(GRIDS, 4), token_ids=TEXTS)
    own = dataclasses.replace(objective, terms=objective.terms[:1], selections=())
    with jax.enable_x64(True):
        grads = lambda k: jax.jit(
            lambda params: objectives.value_and_grad(own, model, params, batch, None, accumulate=k)[::2]
        )(params)
        same(grads(2), grads(1))


def test_soft_masks_fade_no_padding():
    rng = np.random.default_rng(3)
    tokens = rng.standard_normal((4, 7, 8)).astype(np.float32)
    words = rng.standard_normal((4, 4, 8)).astype(np.float32)
    real = np.arange(7) < GRIDS.prod(1)[:, None]
    (term,) = objectives.build(SOFT, SimpleNamespace(outputs={})).terms

    def logits(length, fusion=None):
        rows = dict(image_tokens=tokens[:, :length], image_mask=real[:, :length], text_tokens=words, token_ids=TEXTS)
        given = {} if fusion is None else {"objective": {"soft_masks": fusion}}
        made = {} if fusion is None else None
        outputs = Outputs(SimpleNamespace(), given, rows, rng=jax.random.key(0), made=made).of("soft_masks")
        return {name: term.features[name](outputs, Context(0, True)) for name in ("batch", "pairs")}, made

    shapes = jax.eval_shape(lambda: logits(4)[1]["soft_masks"])
    own = drawn(shapes, scale=0.3)
    short, long = (jax.jit(lambda own, n=length: logits(n, own)[0])(own) for length in (4, 7))
    for name, expected in short.items():
        np.testing.assert_allclose(long[name], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(short["batch"], short["pairs"])


def test_pools_leave_padding_out():
    """Those without parameters; the terms above have attention."""
    tower = models.ViT(**SIZES | dict(depth=1), patch=4, image_size=8, pool="all")
    params = {"params": initial(tower, packed(GRIDS, 4))}
    short, long = (jax.jit(tower.apply)(params, packed(GRIDS, length)) for length in (4, 7))
    for name in ("gap", "patches", "mean", "max", "first"):
        found, expected = (pooling.pool(name, one.tokens, one.mask) for one in (long, short))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(long.pooled[:, :4], short.pooled, rtol=1e-5, atol=1e-6)
    assert not np.any(long.pooled[:, 4:]) and not np.any(long.pooled[~np.asarray(long.mask)])


@pytest.mark.parametrize("pool", ["last", "concat"])
def test_pools_that_would_read_padding_are_named(pool):
    tower = models.ViT(**SIZES | dict(depth=1), patch=4, image_size=8, pool=pool)
    with pytest.raises(UserError, match=f"end with padding, which the pool `{pool}` would read"):
        jax.eval_shape(tower.init, jax.random.key(0), packed(GRIDS, 4))


def test_coca_pools_without_padding():
    words, tower = dict(vocab_size=VOCAB, length=4, start_id=1), SIZES | dict(depth=1)
    pool = dict(width=32, queries=3, heads=2)
    image = dict(tower, patch=4, image_size=8)
    model = models.build(
        dict(name="coca", image=image, pool=pool, text=tower | words, decoder=tower | words, out_dim=8)
    )
    short, long = packed(GRIDS, 4), packed(GRIDS, 7)
    params = {"params": initial(model, short, TEXTS)}
    embed = jax.jit(lambda images: model.apply(params, images, None))
    found, expected = embed(long), embed(short)
    np.testing.assert_allclose(found.image, expected.image, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.image_tokens, expected.image_tokens, rtol=1e-5, atol=1e-5)


def test_next_patches_of_several_sizes_are_refused():
    tower = SIZES | dict(depth=1)
    section = dict(
        name="next_patch_captioner",
        image=dict(tower, patch=4, image_size=8),
        decoder=dict(tower, vocab_size=VOCAB, length=4),
    )
    model = models.build(section)
    objective = objectives.build(dict(name="next_patch"), model)
    params, batch = initial(model, packed(GRIDS, 4), TEXTS), dict(image=packed(GRIDS, 4), token_ids=TEXTS)
    with pytest.raises(UserError, match="predicts patches of pictures of one size"):
        objectives.value(objective, model, params, batch, None)


def test_a_queue_takes_batches_of_several_sizes():
    """The oldest leave first, also where a batch reaches over the end."""
    memory = queue(size=6, teacher=None)
    rows = lambda first, count: {f"key_{kind}": jnp.arange(first, first + count)[:, None] for kind in ("image", "text")}
    state = memory.init(rows(0, 4))
    for first, count in ((0, 2), (2, 4), (6, 4)):
        state = memory.update(state, rows(first, count), None)
    assert len(state["filled"]) == 8 and bool(state["filled"].all()) and int(state["next"]) == 2
    assert state["key_text"][:, 0].tolist() == [8, 9, 2, 3, 4, 5, 6, 7]
