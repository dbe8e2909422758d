"""Few-shot tuning: what trains and how much of it, small files that give the adapted model back, the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from tests.support.few_shot import DEPTH, NAMES, D, clip_like, count, few_shot_task, pictures, tuned
from tests.support.models import SIZES, initial
from vlm_jax import models
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.prompts.maple import Coupled
from vlm_jax.adapt.prompts.upt import Unified
from vlm_jax.adapt.recipe import Extended, Inserted, Masked
from vlm_jax.adapt.tune import tune
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.objectives import Term
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.adapters import save_adapter

EVERYTHING = ((".*", True),)


def test_counts(base):
    """The formulas of the papers."""
    of = lambda recipe: count(base, recipe)
    assert of(Coupled(length=2, depth=9)) == DEPTH * 2 * D + DEPTH * (D * D + D)
    assert of(Coupled(length=2, depth=2)) == 2 * 2 * D + 2 * (D * D + D)
    unify = 7 * D + 4 * (D * D + D) + 4 * D + 2 * D * 6 + 6 + D + D * D + D
    assert of(Unified(3, 4, hidden=6, heads=2)) == unify
    conditional = Context(length=3, image_width=D)
    assert of(Inserted((conditional,))) == 3 * D + D * 1 + 1 + 1 * D + D
    block = 4 * (D * D + D) + 2 * 2 * D + 2 * D * 24 + 24 + D
    after = 2 * (2 * D + D * D + D)  # the final norm and the head of both towers
    assert of(Masked("last_1")) == 2 * block + after + 1
    assert of(Masked(EVERYTHING)) == models.count(base.params)


@pytest.mark.parametrize("recipe", [Masked("head"), Inserted((Context(length=2),))], ids=["head", "coop"])
def test_it_learns(base, pictures, recipe):
    images, labels = pictures
    before = base.class_logits(images, NAMES).argmax(1)
    adapted = tuned(base, recipe, pictures, steps=60, batch_size=12)
    assert np.mean(adapted.class_logits(images, NAMES).argmax(1) == labels) > max(np.mean(before == labels), 0.6)


def test_what_is_wrong_is_named(base, pictures, tmp_path):
    adapted = tuned(base, Inserted((LowRank(rank=2),)), pictures)
    save_adapter(tmp_path / "a.safetensors", base, adapted)
    other = dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf + 1, base.params))
    with pytest.raises(UserError, match="is of another model: load the one that it was made from"):
        vlm_jax.load_adapter(tmp_path / "a.safetensors", other)
    from vlm_jax.zoo.readers.safetensors_files import write_safetensors

    write_safetensors(tmp_path / "b.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="is no adapter"):
        vlm_jax.load_adapter(tmp_path / "b.safetensors", base)
    with pytest.raises(UserError, match="classify needs labels: this model was not adapted"):
        base.classify([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(UserError, match="2 templates, but the recipe changes the text tower; give one"):
        tuned(base, Inserted((Context(length=2),)), pictures, templates=("{}", "a {}"))
    with pytest.raises(UserError, match="an option of the method has no key `ranks`; did you mean `rank`"):
        fit("lora")(base, *few_shot_task(base, pictures), ranks=2)
    with pytest.raises(UserError, match=r"the loss is nan after 3 steps; a smaller learning_rate"):
        tuned(base, Masked(EVERYTHING), pictures, learning_rate=1e30)
    with pytest.raises(UserError, match="`begin` has not the names and shapes of the recipe's own parameters"):
        tuned(base, Inserted((LowRank(rank=2),)), pictures, begin={"inserted_nonsense": np.zeros(2)})
    with pytest.raises(UserError, match="the recipe's head is `probe`; no term of that name has a part `head`"):
        tuned(base, Extended(Masked(EVERYTHING), head="probe"), pictures)
    conv = models.build(dict(image=dict(type="efficientnet", variant="lite0"), text=None))
    with pytest.raises(UserError, match="prompts of both towers stand in two transformers; this model's text tower"):
        Coupled().insertions(conv, 0)


def test_blocks_that_both_towers_share_train(pictures):
    sizes = dict(width=D, depth=1, heads=2, mlp_dim=24, out_dim=D)
    section = dict(
        shared=True,
        image=dict(sizes, patch=4, image_size=8, pool="gap"),
        text=dict(sizes, vocab_size=2985, length=8, pool="mean", pad_mask=True),
    )
    model = models.build(section)
    params = initial(model, np.zeros((1, 8, 8, 3), np.float32), np.ones((1, 8), np.int32))
    ops = "decode | resize(8) | normalize", "lower | tokenize(8, bos=False, eos=False)"
    base = Pretrained(model, params, tokenizers.build("emoji"), *ops)
    adapted = tuned(base, Masked(((r"trunk/.*", True), (".*", False))), pictures)
    assert np.any(adapted.class_logits(pictures[0], NAMES) != base.class_logits(pictures[0], NAMES))


def test_a_captioner_adapts():
    """By the log-likelihood of each name, as it classifies."""
    tokenizer, tokenize = tokenizers.build("emoji"), "lower | tokenize(8, bos=False)"
    decoder = dict(SIZES, vocab_size=tokenizer.vocab_size, length=8)
    model = models.build(dict(name="captioner", image=dict(SIZES, patch=8), decoder=decoder))
    images, labels = pictures()
    images = images.repeat(2, axis=1).repeat(2, axis=2)
    base = Pretrained(
        model, initial(model, images[:1], np.zeros((1, 8), int)), tokenizer, "decode | resize(16) | normalize", tokenize
    )
    adapted = tune(base, Masked("head"), images, labels, NAMES, steps=30, batch_size=6, learning_rate=3e-2)
    share = lambda model: np.mean(model.class_logits(images, NAMES).argmax(1) == labels)
    assert share(adapted) > max(share(base), 0.6)


def test_augmentation_and_pool():
    """Augmentation that is the model's own preprocessing changes nothing; a term sees the pool's pictures."""
    base, seen = clip_like(scan=True), []
    images, labels = pictures()
    raw = [Image.fromarray(np.uint8(np.clip(127 + 40 * image, 0, 255))) for image in images]
    options = dict(steps=2, batch_size=4, learning_rate=1e-2)
    once = tune(base, Masked("bias"), raw, labels, NAMES, **options)
    again = tune(base, Masked("bias"), raw, labels, NAMES, augment=base.preprocess, **options)
    jax.tree.map(np.testing.assert_array_equal, again.params, once.params)
    brightness = lambda outputs, ctx: jnp.mean(outputs["image"], (1, 2, 3))
    collect = lambda outputs, features, rows, ctx: (
        jax.debug.callback(seen.append, features) or 0.0 * jnp.sum(features),
        {},
    )
    recipe = Extended(Masked("bias"), (Term("pool", brightness, collect, on="pool"),))
    with pytest.raises(UserError, match="the recipe has a term on pictures without labels; give `pool`"):
        tune(base, recipe, images, labels, NAMES)
    with pytest.raises(UserError, match="augment reads pictures before preprocessing; give `pool` as a list"):
        tune(base, recipe, raw, labels, NAMES, pool=images, augment=base.preprocess)
    tune(base, recipe, images, labels, NAMES, pool=np.full((9, 8, 8, 3), 0.25, np.float32), **options)
    np.testing.assert_allclose(seen[-1], np.full(4, 0.25))
