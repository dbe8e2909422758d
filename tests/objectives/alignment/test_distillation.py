"""Distillation: the distances of the formula, teachers of other widths, no gradient for the teacher."""

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError

B = 4


class Wide(nn.Module):
    """A teacher with outputs of its own: embeddings of width 9 and two tokens."""

    outputs: ClassVar = {
        "image_embedding": lambda o: o.apply("__call__", o["image"]),
        "image_tokens": lambda o: o["image_embedding"].reshape(-1, 3, 3),
    }

    @nn.compact
    def __call__(self, images):
        return nn.Dense(9, name="image_fc", param_dtype=images.dtype)(images.reshape(len(images), -1))


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def rows():
    rng = np.random.default_rng(0)
    pictures = lambda: jnp.asarray(rng.normal(size=(B, 4, 4, 3)))
    return {"image": pictures(), "other": pictures(), "token_ids": jnp.asarray(rng.integers(0, 14, (B, 3)))}


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.3), jnp.float64), shapes)


def towers(seed, batch):
    return draw(jax.eval_shape(Towers().init, jax.random.key(0), batch["image"], batch["token_ids"])["params"], seed)


def wide(batch):
    return draw(jax.eval_shape(Wide().init, jax.random.key(0), batch["image"])["params"], 3)


def build(teacher=None, **options):
    section = dict(name="feature_distillation", teacher="t", teachers=dict(t=teacher or dict(decay=0.9)), **options)
    loaded = SimpleNamespace(model=Wide(), params=wide(rows()))
    return objectives.build(section, Towers(), load=lambda spec: loaded)


def test_the_formula():
    """|s - t|^2 of every row, of tokens their mean; what the teacher says is constant."""
    batch, of = rows(), ("image_embedding", "text_embedding", "image_tokens")
    objective, params, teacher = build(of=of), towers(1, batch), towers(2, batch)

    def loss(params, teacher):
        state = {"terms": {}, "teachers": {"t": teacher}}
        return objectives.value(objective, Towers(), params, batch, None, state=state)

    (got, metrics), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, teacher)
    found = [Towers().apply({"params": p}, batch["image"], batch["token_ids"]) for p in (params, teacher)]
    for name, field in zip(of, ("image", "text", "image_tokens"), strict=True):
        own, want = (np.asarray(getattr(one, field)).reshape(B, -1, np.shape(getattr(one, field))[-1]) for one in found)
        loops = [np.mean([sum((s - t) ** 2) for s, t in zip(*row, strict=True)]) for row in zip(own, want, strict=True)]
        np.testing.assert_allclose(metrics[f"feature_distillation/{name}"], np.mean(loops), rtol=1e-12)
    np.testing.assert_allclose(got, sum(metrics[f"feature_distillation/{name}"] for name in of), rtol=1e-12)
    assert np.any(grads[0]["image_fc"]["kernel"]) and not any(np.any(leaf) for leaf in jax.tree.leaves(grads[1]))


def test_a_teacher_that_is_the_model_asks_for_nothing():
    batch = rows()
    params = towers(1, batch)
    run = partial(objectives.value_and_grad, build(), Towers(), params, batch, None)
    loss, _, grads, _ = run(state={"teachers": {"t": params}})
    assert loss == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_a_teacher_of_another_width_is_met_by_a_map_of_the_term_s_own():
    batch, objective = rows(), build(dict(spec="wide", inputs=dict(image="other")), of=("image_embedding",))
    frozen = objectives.frozen(objective)
    params, state = objectives.make(objective, Towers(), towers(1, batch), batch, jax.random.key(0), frozen)
    own = params["objective"]["feature_distillation"]
    assert state is None and jax.tree.map(jnp.shape, own) == {"image_embedding": {"kernel": (5, 9), "bias": (9,)}}
    assert own["image_embedding"]["kernel"].dtype == jnp.float64

    def loss(params, frozen):
        return objectives.value(objective, Towers(), params, batch, None, frozen=frozen)[0]

    got, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, frozen)
    model = {name: leaf for name, leaf in params.items() if name != "objective"}
    image = np.asarray(Towers().apply({"params": model}, batch["image"], None).image)
    mapped = image @ np.asarray(own["image_embedding"]["kernel"]) + np.asarray(own["image_embedding"]["bias"])
    taught = np.asarray(Wide().apply({"params": frozen["t"]}, batch["other"]))
    np.testing.assert_allclose(got, np.mean(np.sum((mapped - taught) ** 2, 1)), rtol=1e-12)
    assert np.any(grads[0]["objective"]["feature_distillation"]["image_embedding"]["kernel"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[1]))


@pytest.mark.parametrize(
    "options, teacher, message",
    [
        (dict(), dict(spec="wide"), "`feature_distillation` needs `text_embedding`, which neither the batch nor the t"),
        (dict(of=("depth",)), None, "`feature_distillation` needs `depth`, which neither the batch nor the model has"),
        (dict(of=("image_tokens",)), dict(spec="wide"), r"has the shape \(4, 4, 7\), the teacher's \(4, 3, 3"),
        (dict(of=("image_embedding",)), dict(spec="wide", inputs=dict(image="depth")), "teachers.t reads `depth`; the"),
        (dict(of=("image_embedding",)), dict(spec="wide", inputs=dict(image="small")), "`t` cannot read these rows"),
        (dict(), dict(decay=0.9, spec="wide"), "is an average, `decay=0.999`, or a checkpoint, `spec=...`: give one"),
        (dict(), dict(decays=0.9), "config.objective.teachers.t has no key `decays`; did you mean `decay`"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_fit_are_named(options, teacher, message):
    batch = rows() | {"small": jnp.zeros((B, 2, 2, 3))}
    with pytest.raises(UserError, match=message) as error:
        objective = build(teacher, **options)
        objectives.make(objective, Towers(), towers(1, batch), batch, jax.random.key(0), objectives.frozen(objective))
    assert "\n" not in str(error.value)
