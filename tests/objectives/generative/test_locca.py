"""LocCa: the equation as loops over tokens, prompts that do not count, captions that are predicted at once."""

from functools import partial
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from vlm_jax import models, objectives
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import Decoded
from vlm_jax.params import sharding

B, L, V = 8, 6, 9
TASKS = ("cap", "aref", "gcap")


class Sizes(NamedTuple):
    start_id: int = 0
    mask_id: int = V


class Writer(nn.Module):
    """Hidden states: the mean of the inputs that a position sees, plus the picture's mean. Compiles in a second."""

    decoder: Sizes = Sizes()
    outputs: ClassVar = {"context": lambda o: (o["image"], None)}

    def setup(self):
        self.embed, self.see, self.head = nn.Embed(V + 1, 5), nn.Dense(5), nn.Dense(V)

    def __call__(self, images, token_ids):
        return self.logits(self.decode(token_ids, images, bidirectional=token_ids > 0).hidden)

    def decode(self, token_ids, context, *, bidirectional, context_mask=None, train=False):
        seen = jnp.tril(jnp.ones((token_ids.shape[1],) * 2, bool)) | bidirectional[:, None]
        words = jnp.einsum("blk,bkd->bld", seen / seen.sum(-1, keepdims=True), self.embed(token_ids))
        return Decoded(jnp.tanh(words + self.see(context.mean(1))[:, None]), None)

    def logits(self, hidden):
        return self.head(hidden)


def batch():
    """Texts of one to six tokens after prompts of two; two pictures have no regions."""
    rng = np.random.default_rng(0)
    rows = {"image": rng.normal(size=(B, 3, 4))}
    for task in TASKS:
        ends = rng.integers(3, L + 1, B)
        at, real = np.arange(L), np.arange(L) < ends[:, None]
        real[:2] &= task == "cap"
        rows[f"{task}_token_ids"] = np.where(real, rng.integers(1, V, (B, L)), 0)
        rows[f"{task}_counts"] = real & (at >= 2)
    return jax.tree.map(jnp.asarray, rows)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def begin():
    params = initial(Writer(), np.zeros((1, 3, 4)), np.zeros((1, L), int))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)


def build(**options):
    return objectives.build(dict(name="locca", **options), Writer())


def loops(params, rows, mean, weights, at_once=()):
    """The equation, a token at a time; the inputs of the captions `at_once` are mask tokens, seen from everywhere."""
    table, head = params["embed"]["embedding"], params["head"]
    total = 0.0
    for task in TASKS:
        losses, counts = [], []
        for i in range(B):
            picture = jnp.mean(rows["image"][i], 0) @ params["see"]["kernel"] + params["see"]["bias"]
            ids = [int(one) for one in rows[f"{task}_token_ids"][i]]
            own = []
            for t in range(L):
                if rows[f"{task}_counts"][i, t]:
                    inputs = [V] * L if task == "cap" and i in at_once else [0, *ids[:t]]
                    words = sum(table[one] for one in inputs) / len(inputs)
                    scores = jnp.tanh(words + picture) @ head["kernel"] + head["bias"]
                    own.append(jnp.log(jnp.sum(jnp.exp(scores))) - scores[ids[t]])
            if own:
                losses.append(sum(own) / (len(own) if mean == "caption" else 1))
                counts.append(len(own))
        total = total + weights.get(task, 1.0) * sum(losses) / (len(losses) if mean == "caption" else sum(counts))
    return total


@pytest.mark.parametrize("mean", ["caption", "token"])
def test_the_equation(mean):
    """Values and gradients to 1e-9: in one piece, accumulated, and on eight devices."""
    params, rows = begin(), batch()
    tasks = dict(cap={}, aref=dict(weight=0.5), gcap={})
    run = jax.jit(
        lambda rows, k: objectives.value_and_grad(
            build(tasks=tasks, mean=mean), Writer(), params, rows, jax.random.key(0), accumulate=k
        )[:3],
        static_argnums=1,
    )
    want = jax.value_and_grad(loops)(params, rows, mean, dict(aref=0.5))
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        spread = run(sharding.to_global(jax.tree.map(np.asarray, rows), mesh, B), 2)
    for value, metrics, grads in (run(rows, 1), spread):
        jax.tree.map(close, (value, grads), want)
        parts = {task: loops(params, rows, mean, dict.fromkeys(TASKS, 0.0) | {task: 1.0}) for task in TASKS}
        jax.tree.map(close, {task: metrics[f"locca/{task}/loss"] for task in TASKS}, parts)


def test_half_of_the_captions_are_predicted_at_once():
    """Which ones is the same however the batch is cut; boxes and phrases are always predicted token by token."""
    params, rows, model = begin(), batch(), Writer()
    run = jax.jit(
        lambda key, k: objectives.value_and_grad(build(), model, params, rows, key, accumulate=k)[:3], static_argnums=1
    )
    key = jax.random.key(3)
    whole, cut = run(key, 1), run(key, 2)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), cut, whole)
    _, _, _, features = objectives.value_and_grad(build(), model, params, rows, key)
    plain = objectives.value_and_grad(build(tasks={task: {} for task in TASKS}), model, params, rows, key)[3]
    differs = {
        task: features["batch"]["locca"][task]["loss"] != plain["batch"]["locca"][task]["loss"] for task in TASKS
    }
    at_once = set(np.flatnonzero(differs["cap"]))
    assert 0 < len(at_once) < B and not differs["aref"].any() and not differs["gcap"].any()
    np.testing.assert_allclose(whole[0], loops(params, rows, "caption", {}, at_once), rtol=1e-9)
    evaluated = objectives.value(build(), model, params, rows, None)[0]
    np.testing.assert_allclose(evaluated, loops(params, rows, "caption", {}), rtol=1e-9)


def test_a_batch_without_regions_is_captions():
    rows = batch() | {f"{task}_counts": jnp.zeros((B, L), bool) for task in TASKS[1:]}
    value, metrics = objectives.value(build(), Writer(), begin(), rows, None)
    assert value == metrics["locca/cap/loss"] and np.isnan(metrics["locca/aref/loss"])


def test_what_cannot_write_is_named():
    towers = models.build(dict(image=None, text=dict(width=8, depth=1, heads=1, vocab_size=V, length=L)))
    for model, options, message in (
        (towers, {}, "a TwoTower has no decoder that attends to pictures: model.name"),
        (Writer(), dict(tasks={}), "tasks is empty; expected names of texts, such as cap, aref, gcap"),
        (Writer(), dict(mean="text"), "mean is `text`; expected one of: caption, token"),
        (Writer(), dict(tasks=dict(cap=dict(weigth=2.0))), "tasks.cap has no key `weigth`; did you mean `weight`"),
    ):
        with pytest.raises(UserError, match=message) as error:
            objectives.build(dict(name="locca", **options), model)
        assert "\n" not in str(error.value)
