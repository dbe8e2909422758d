"""A tiny two-tower model, pictures of three classes, and the few-shot task of naming them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import models
from vlm_jax.adapt.recipe import Extended, Masked
from vlm_jax.adapt.task import Shots, Task
from vlm_jax.adapt.tune import tune
from vlm_jax.data import tokenizers
from vlm_jax.models import insertion
from vlm_jax.objectives import Context
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained, class_embeddings

D, DEPTH = 16, 3
GIVEN = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 8), int)
NAMES = ("red", "green", "blue fish")


@functools.cache
def clip_like(scan):
    sizes = dict(width=D, depth=DEPTH, heads=2, mlp_dim=24, out_dim=D, scan=scan)
    text = dict(sizes, vocab_size=2985, length=8, pool="mean", pad_mask=True)
    section = dict(image=dict(sizes, patch=4), text=text)
    model = models.build(section)
    params = jax.jit(model.init)(jax.random.key(0), *GIVEN)["params"]
    tokenize, preprocess = "lower | tokenize(8, bos=False, eos=False)", "decode | resize(8) | normalize"
    config = dict(model=section, tokenizer="emoji", tokenize=tokenize, preprocess=preprocess)
    return Pretrained(model, params, tokenizers.build("emoji"), preprocess, tokenize, config)


def pictures():
    """(images [12, 8, 8, 3], labels [12]): a class is a channel that is bright."""
    labels = np.arange(12) % 3
    images = 0.1 * np.random.default_rng(0).standard_normal((12, 8, 8, 3)).astype(np.float32)
    images[np.arange(12), :, :, labels] += 1
    return images, labels


def few_shot_task(base, pictures):
    """(shots, validation, task with a pool) of `pictures`."""
    images, labels = pictures
    part = lambda rows: Shots(images[rows], base.embed_image_batch(images[rows]), labels[rows])
    text = class_embeddings(base.embed_texts, NAMES, ["{}"])
    pool = part(np.arange(6, 12))._replace(labels=np.full(6, -1))
    return part(np.arange(9)), part(np.arange(9, 12)), Task(NAMES, ("{}",), text, 10.0, 0, pool)


def count(base, recipe):
    """The number of parameters that train."""
    model, rng = insertion.inserted(base.model, *recipe.insertions(base.model, 0)), jax.random.key(0)
    begin = lambda rng: recipe.begin(rng, base.model, named_leaves(model.init(rng, *GIVEN)["params"]))
    return models.count(jax.eval_shape(begin, rng))


def params_with(base, recipe):
    """Parameters by name of the model with the recipe's insertions."""
    model = insertion.inserted(base.model, *recipe.insertions(base.model, 0))
    return named_leaves(insertion.begin(jax.random.key(0), model, base.params, *GIVEN))


def moved(base, adapted):
    """Names of the parameters that an adapted model has not from its base."""
    own = named_leaves(base.params)
    return {
        name
        for name, leaf in named_leaves(adapted.params).items()
        if name not in own or not np.array_equal(leaf, own[name])
    }


def tuned(pretrained, recipe, pictures, **changes):
    """The model after three steps by a recipe."""
    settings = dict(steps=3, batch_size=5, learning_rate=1e-2) | changes
    return tune(pretrained, recipe, *pictures, NAMES, **settings)


class Said(dict):
    """Outputs that say what is given, for the equations of a term."""

    keys, params = None, {}

    def __init__(self, base=None, **said):
        super().__init__(said)
        self.base = base

    def teacher(self, name):
        assert name == "base"
        return self.base

    def on(self, **rows):
        return self


def loss_of(term, said, rows, rng=None, scale=10.0):
    """The loss of a term of rows {set: dict} and outputs {set: Said}, float64."""
    context = Context(0, True, rng)
    with jax.enable_x64(True):
        features = {name: term.features_of(name)(said[name], context) for name in term.sets}
        return float(term.loss(Said(scale=scale), term.seen(features), term.seen(rows), context)[0])


def unit_rows(seed, *shape):
    """Unit-norm rows, float64 [*shape]."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def plain(recipe):
    """Whether a recipe tunes everything by the cross-entropy of the names, and nothing else: `full`, bit for bit."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Extended)}
    default = Extended(fields.pop("recipe"))
    return default.recipe == Masked(((".*", True),)) and fields.items() <= vars(default).items()
