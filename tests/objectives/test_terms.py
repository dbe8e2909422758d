"""Terms over row sets: every kind in fp64, accumulated and in one piece; what is off, held, unreached, mistaken."""

import dataclasses
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.models.two_tower import EMBEDDINGS
from vlm_jax.objectives import Feature, Objective, Row, Selection, Teacher, Term

B, STOP = 8, jax.lax.stop_gradient


class Writer(Towers):
    """Towers that also score texts given a picture, and match pairs."""

    outputs: ClassVar = EMBEDDINGS | {"patches": lambda o: o["image_tokens"], "words": lambda o: o["text_tokens"]}


class Dense(nn.Module):
    """A term's own part."""

    size: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.size, param_dtype=x.dtype)(jnp.tanh(x))


def rows(n=B, seed=0):
    rng = np.random.default_rng(seed)
    pictures = lambda: jnp.asarray(rng.normal(size=(n, 4, 4, 3)))
    return {"image": pictures(), "local": pictures(), "token_ids": jnp.asarray(rng.integers(0, 14, (n, 3)))}


def pair(outputs, ctx):
    return {"image": outputs["image_embedding"], "text": outputs["text_embedding"]}


def clip_loss(outputs, features, rows, ctx):
    logits = outputs["scale"] * features["image"] @ features["text"].T
    own = lambda logits: -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))
    return (own(logits) + own(logits.T)) / 2, {"scale": outputs["scale"]}


def mean(outputs, features, rows, ctx):
    return jnp.mean(features), {}


CLIP = Term("contrastive", pair, clip_loss)
SIZES = Term("sizes", lambda outputs, ctx: jnp.sum(outputs["patches"] ** 2, (1, 2)), mean, weight=2.0)


def queue():
    """Memory: the candidates are a slow teacher's, of this and of earlier batches."""
    return objectives.build(
        dict(name="contrastive", negatives=dict(name="queue", size=16), teachers=dict(momentum=dict(decay=0.9))),
        Writer(),
    )


def self_distillation():
    """A teacher, a part of the term's own under both, a centre, and local against global views."""
    head = Dense(12)

    def features(outputs, ctx):
        local = outputs.apply("__call__", outputs["local"], None).image
        teacher = outputs.teacher("average")
        return {
            "student": outputs.part("head", head, local),
            "teacher": teacher.part("head", head, teacher["image_embedding"]),
        }

    def loss(outputs, features, rows, ctx):
        target = jax.nn.softmax((features["teacher"] - ctx.state) / 0.1)
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(features["student"]), -1)), {}

    centre = lambda state, features, ctx: 0.9 * state + 0.1 * jnp.mean(features["teacher"], 0)
    start = lambda features: jnp.zeros(12, features["teacher"].dtype)
    distillation = Term("distillation", features, loss, init=start, update=centre)
    return Objective((distillation, CLIP), teachers={"average": Teacher(decay=0.9)})


def mined_pairs(groups=1, again=False):
    """Matching on pairs that a selection draws; image tokens are looked up, or the pictures encoded again."""

    def select(features, rows, ctx):
        n = len(features["image"])
        scores = 10 * features["image"] @ features["text"].T - 1e9 * jnp.eye(n)
        i, texts = jnp.arange(n), jax.random.categorical(ctx.rng, scores)
        images, texts = jnp.concatenate([i, i]), jnp.concatenate([i, texts])
        found = {"image": Row("image", images)} if again else {"patches": Feature("patches", images)}
        return found | {"token_ids": Row("token_ids", texts), "match": jnp.arange(2 * n) < n}

    def features(outputs, ctx):
        fused = outputs["patches"].mean(1) @ jnp.ones((7, 6)) * outputs["words"].mean(1)
        return outputs.part("head", Dense(2), fused)

    def loss(outputs, features, rows, ctx):
        log_p = jax.nn.log_softmax(features)
        return -jnp.mean(jnp.take_along_axis(log_p, rows["match"][:, None].astype(int), 1)), {}

    seen = lambda outputs, ctx: pair(outputs, ctx) | ({} if again else {"patches": outputs["patches"]})
    matching = Term("matching", features, loss, on="pairs")
    return Objective((CLIP, matching), (Selection("pairs", seen, select, groups=groups),))


def sampled_texts():
    """A reward on texts that a selection draws with the rows' keys, and that ride with their rows."""

    def draw(outputs, ctx):
        ids = jax.vmap(lambda key: jax.random.randint(key, (2, 3), 0, 14))(outputs.keys)
        judge = outputs.teacher("judge")
        text = judge.apply("__call__", None, ids.reshape(-1, 3)).text.reshape(len(ids), 2, -1)
        return {"ids": ids, "reward": jnp.einsum("bkd,bd->bk", text, judge["image_embedding"])}

    def select(features, rows, ctx):
        advantage = features["reward"] - features["reward"].mean(1, keepdims=True)
        of = jnp.repeat(jnp.arange(len(advantage)), 2)
        return {
            "token_ids": features["ids"].reshape(-1, 3),
            "advantage": advantage.reshape(-1),
            "image": Row("image", of),
        }

    score = lambda outputs, ctx: jnp.sum(outputs["image_embedding"] * outputs["text_embedding"], -1)
    loss = lambda outputs, features, rows, ctx: (-jnp.mean(rows["advantage"] * features), {})
    reward = Term("reward", score, loss, on="samples")
    return Objective((reward,), (Selection("samples", draw, select),), {"judge": Teacher(decay=1.0)})


def chosen_rows():
    """The half of a batch that the model can learn most from, for two terms."""

    def scores(outputs, ctx):
        return {"learner": pair(outputs, ctx), "reference": pair(outputs.teacher("reference"), ctx)}

    def select(features, rows, ctx):
        each = lambda f: -jnp.diag(jax.nn.log_softmax(10 * f["image"] @ f["text"].T))
        chosen = jax.lax.top_k(each(features["learner"]) - each(features["reference"]), B // 2)[1]
        return {key: Row(key, chosen) for key in ("image", "token_ids")}

    terms = tuple(dataclasses.replace(term, on="learnable") for term in (CLIP, SIZES))
    return Objective(terms, (Selection("learnable", scores, select),), {"reference": Teacher(decay=1.0)})


def projected():
    """Gradients of two terms, of which one is projected on the other."""

    def project(grads, params):
        def one(g, h):
            dot = jnp.sum(g * h)
            return jnp.where(dot < 0, g - dot / (jnp.sum(h * h) + 1e-12) * h, g)

        return jax.tree.map(one, grads["sizes"], grads["contrastive"])

    return Objective((CLIP, SIZES), combine=project)


def two_reaches():
    heads = dataclasses.replace(CLIP, reaches="image_head/.*|logit_scale")
    return Objective((heads, dataclasses.replace(SIZES, reaches="image_fc/kernel")))


def alternating():
    at = lambda parity: lambda step: jnp.where(step % 2 == parity, 1.0, 0.0)
    return Objective((dataclasses.replace(CLIP, weight=at(0)), dataclasses.replace(SIZES, weight=at(1))))


def mixture():
    """Two row sets of different sizes, one of them texts alone, whose features draw."""

    def masked(outputs, ctx):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(outputs.keys)
        return outputs.apply("__call__", None, jnp.where(keep, outputs["token_ids"], 0)).text.sum(-1)

    return Objective((dataclasses.replace(CLIP, on="pairs"), Term("masked", masked, mean, on="texts")))


def coupled():
    """A term over pictures and class names, of which accumulation cuts only what it divides."""

    def loss(outputs, features, rows, ctx):
        logits = outputs["scale"] * features["batch"] @ features["classes"].T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), rows["batch"]["label"][:, None], 1)), {}

    two = {"batch": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["text_embedding"]}
    return Objective((Term("classes", two, loss),))


CASES = {
    "terms share outputs": lambda: Objective((CLIP, SIZES)), "queue": queue, "self-distillation": self_distillation,
    "mined pairs": mined_pairs, "mined pairs, in groups": partial(mined_pairs, 2),
    "mined pairs, encoded again": partial(mined_pairs, again=True), "sampled texts": sampled_texts,
    "chosen rows": chosen_rows, "projected": projected, "two reaches": two_reaches, "alternating": alternating,
    "mixture": mixture, "coupled": coupled,
}  # fmt: skip
BATCHES = {
    "mixture": lambda: {"pairs": rows(), "texts": {"token_ids": rows(16, 1)["token_ids"]}},
    "coupled": lambda: {
        "batch": rows() | {"label": jnp.arange(B) % 6}, "classes": {"token_ids": rows(6, 1)["token_ids"]},
    },
}  # fmt: skip


def begin(objective, batch, seed=1):
    """(model, parameters with the terms' own, memory), fp64; no two teachers alike."""
    model, rng = Writer(), jax.random.key(0)
    given = objectives.model_inputs(batch)
    shapes = jax.eval_shape(lambda: model.init(rng, *given)["params"])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), shapes)
    make = partial(objectives.make, objective, model)
    draw = np.random.default_rng(seed)
    random = lambda leaf: jnp.asarray(draw.normal(size=leaf.shape, scale=0.3), jnp.float64)
    shapes, memory = jax.eval_shape(make, shapes, batch, rng)
    params = jax.tree.map(random, shapes)
    if memory is None:
        return model, params, None
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory)
    return model, params, state | {"teachers": jax.tree.map(random, memory["teachers"])}


@pytest.mark.parametrize("name", CASES)
def test_accumulated_gradients_are_those_of_one_piece(name):
    """Every parameter, and the memory of two steps: 1e-6 in fp64 asked, 1e-9 reached."""
    with jax.enable_x64(True):
        objective, batch = CASES[name](), BATCHES.get(name, rows)()
        model, params, state = begin(objective, batch)

        @partial(jax.jit, static_argnums=2)
        def run(state, step, k):
            rng = jax.random.fold_in(jax.random.key(7), step)
            value, metrics, grads, features = objectives.value_and_grad(
                objective, model, params, batch, rng, step=step, state=state, accumulate=k
            )
            return (value, metrics, grads), objectives.update(objective, state, params, features, rng, step)

        for step in (0, 1) if state else (0,):
            one, after = run(state, step, 1)
            four, after_four = run(state, step, 4)
            for want, got in zip(jax.tree.leaves((one, after)), jax.tree.leaves((four, after_four)), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
            state = after
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(one[2]))
        assert sum(np.any(leaf) for leaf in jax.tree.leaves(one[2])) >= 2
