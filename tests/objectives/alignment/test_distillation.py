"""Distillation: the formulas as loops, teachers of other widths, no gradient for the teacher, limiting cases."""

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import models
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
    texts = jnp.asarray(rng.integers(0, 14, (B, 3)))
    return {"image": pictures(), "other": pictures(), "token_ids": texts, "concept": jnp.array([0, 1, 0, 2])}


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


def softmax(x):
    return np.exp(x) / np.sum(np.exp(x))


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))


def attended(params, tower, side):
    """The attention [heads, L, L] of a tower's last block, from what its norm gave."""
    tokens = tower["blocks_1"]["norm1"]["__call__"][0]
    own, heads = params[side]["blocks_1"]["attn"], 2
    query, key = ((tokens @ own[name]["kernel"] + own[name]["bias"]) for name in ("query", "key"))
    split = lambda x: np.asarray(x, np.float64).reshape(*x.shape[:2], heads, -1)
    query, key = split(query), split(key)
    return [
        np.array([[softmax(q @ key[i, :, h].T / 4) for q in query[i, :, h]] for h in range(heads)])
        for i in range(len(tokens))
    ]


@pytest.mark.parametrize("side", ["image", "text"])
def test_attention_follows_a_teacher(side):
    """A loop over rows, heads and tokens; a teacher that is the model asks for nothing."""
    with jax.enable_x64(False):
        tiny = models.tiny("two_tower")
        teacher = jax.tree.map(jnp.add, tiny.params, models.drawn(tiny.params, scale=0.1))
        section = dict(name="attention_distillation", teacher="t", of=side, teachers=dict(t=dict(decay=0.9)))
        objective, batch = objectives.build(section, tiny.model), {"image": models.IMAGES, "token_ids": models.TOKENS}

        @partial(jax.jit, static_argnums=0)
        def run(model, params, teacher):
            state = {"teachers": {"t": teacher}}
            return objectives.value(objective, model, params, batch, None, state=state)[0]

        got = run(tiny.model, tiny.params, teacher)
        assert run(tiny.model, tiny.params, tiny.params) == 0
        found = []
        for params in (tiny.params, teacher):
            inputs = (models.IMAGES, None) if side == "image" else (None, models.TOKENS)
            _, seen = tiny.model.apply({"params": params}, *inputs, capture_intermediates=True)
            found.append(attended(params, seen["intermediates"][side], side))
    rows = []
    for i, (own, taught) in enumerate(zip(*found, strict=True)):
        counts = [side == "image" or models.TOKENS[i][n] != 0 for n in range(own.shape[1])]
        rows.append(np.mean([kl(t[n], s[n]) for s, t in zip(own, taught, strict=True) for n in np.flatnonzero(counts)]))
    np.testing.assert_allclose(got, np.mean(rows), rtol=1e-4)


def of_teachers(name, count=2, **options):
    """(objective, parameters, state with the teachers' parameters, (images, texts) of the model and of each teacher)"""
    names, batch = tuple(f"t{i}" for i in range(count)), rows()
    section = dict(name=name, teachers=names, **options)
    objective = objectives.build(dict(terms={name: section}, teachers={t: dict(decay=0.9) for t in names}), Towers())
    params = [towers(seed, batch) for seed in range(1, count + 2)]
    state = {"terms": {}, "teachers": dict(zip(names, params[1:], strict=True))}
    found = [Towers().apply({"params": p}, batch["image"], batch["token_ids"]) for p in params]
    return objective, params[0], state, [(np.asarray(f.image), np.asarray(f.text)) for f in found]


def evaluate(objective, params, state):
    return jax.jit(partial(objectives.value_and_grad, objective, Towers(), rng=None, state=state))(params, rows())[:3]


@pytest.mark.parametrize(("combine", "loss", "scale"), [("mean", "huber", 4.0), ("max", "kl", 3.0)])
def test_similarities_follow_teachers_combined(combine, loss, scale):
    objective, params, state, found = of_teachers("similarity_distillation", combine=combine, loss=loss, scale=scale)
    value, metrics, grads = evaluate(objective, params, state)
    own, *taught = (scale * np.array([[x @ y for y in texts] for x in images]) for images, texts in found)
    over = {"mean": np.mean, "max": np.max}[combine]
    t = np.array([[over([one[i, j] for one in taught]) for j in range(B)] for i in range(B)])
    if loss == "huber":
        far = [abs(own[i, j] - t[i, j]) for i in range(B) for j in range(B)]
        assert min(far) < 1 < max(far)  # both cases
        want = np.mean([d * d / 2 if d <= 1 else d - 0.5 for d in far])
    else:
        want = np.mean([kl(softmax(a), softmax(b)) for x, y in ((t, own), (t.T, own.T)) for a, b in zip(x, y)])  # noqa: B905
    np.testing.assert_allclose(value, want, rtol=1e-9)
    np.testing.assert_allclose(
        metrics["similarity_distillation/agreement"], np.mean(own.argmax(1) == t.argmax(1)), rtol=1e-12
    )
    assert np.any(grads["image_head"]["kernel"]) and np.any(grads["text_head"]["kernel"])


def test_divergence_is_the_cross_entropy_with_affinities_less_a_number():
    """And a teacher that is the model asks for nothing, within a modality too."""
    objective, params, state, _ = of_teachers("similarity_distillation", 1, loss="kl", scale=10.0)
    _, _, grads = evaluate(objective, params, state)
    targets = dict(name="affinities", teachers=("t0",), scale=10.0)
    section = dict(name="contrastive", targets=targets, teachers=dict(t0=dict(decay=0.9)))
    params = params | {"logit_scale": jnp.log(10.0)}
    _, _, want = evaluate(objectives.build(section, Towers()), params, state)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), grads, want | {"logit_scale": jnp.zeros(())}
    )
    objective, params, state, _ = of_teachers("similarity_distillation", 1, of=("image_embedding", "image_embedding"))
    value, metrics, _ = evaluate(objective, params, {"terms": {}, "teachers": {"t0": params}})
    assert abs(value) < 1e-20 and metrics["similarity_distillation/agreement"] == 1


@pytest.mark.parametrize(("targets", "k"), [("identity", 2), ("concept", 3)])
def test_negatives_and_weights_of_a_teacher(targets, k):
    """Each row, then each column: the K hardest others by the teachers' mean, weighted by both entropies."""
    scale, labels = 7.0, range(B) if targets == "identity" else rows()["concept"].tolist()
    given = dict(negatives=k, scale=scale, targets=targets)
    objective, params, state, found = of_teachers("dynamic_distillation", **given)
    value, metrics, _ = evaluate(objective, params, state)
    own, *taught = (np.array([[x @ y for y in texts] for x in images]) for images, texts in found)
    own, taught = np.exp(float(params["logit_scale"])) * own, scale * np.mean(taught, axis=0)
    entropy = lambda p: -sum(p * np.log(p)) / np.log(k + 1)
    sides = []
    for s, t in ((own, taught), (own.T, taught.T)):
        for i in range(B):
            others = sorted((j for j in range(B) if labels[j] != labels[i]), key=lambda j: -t[i, j])[:k]
            p, q = softmax(t[i, [i, *others]]), softmax(s[i, [i, *others]])
            u, v = entropy(p), entropy(q)
            sides.append(v * ((1 - u) * kl(p, q) - u * np.log(q[0])))
    np.testing.assert_allclose(value, np.mean(sides), rtol=1e-9)
    assert 0 < metrics["dynamic_distillation/teacher_uncertainty"] < 1


def test_all_negatives_without_weights_are_clip_and_its_distillation():
    given = dict(negatives=B - 1, dynamic=False, scale=10.0)
    objective, params, state, _ = of_teachers("dynamic_distillation", 1, **given)
    value, _, grads = evaluate(objective, params | {"logit_scale": jnp.log(10.0)}, state)
    terms = dict(contrastive={}, similarity_distillation=dict(teachers=("t0",), loss="kl", scale=10.0))
    both = objectives.build(dict(terms=terms, teachers=dict(t0=dict(decay=0.9))), Towers())
    want, _, of_both = evaluate(both, params | {"logit_scale": jnp.log(10.0)}, state)
    np.testing.assert_allclose(value, want, rtol=1e-9)
    np.testing.assert_allclose(grads["image_fc"]["kernel"], of_both["image_fc"]["kernel"], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("similarity_distillation", dict(combine="median"), r"combine is `median`; expected one of: mean, max"),
        ("similarity_distillation", dict(loss="mse"), r"loss is `mse`; expected one of: huber, kl"),
        ("similarity_distillation", dict(of=("image_embedding",)), "expected two outputs that are compared"),
        ("similarity_distillation", dict(of=("image_tokens",) * 2), r"got `image_tokens` \[4, 4, 7"),
        ("similarity_distillation", dict(teachers="t0"), "teachers is 't0'; expected names of teachers"),
        ("attention_distillation", dict(of="words"), "of is `words`; expected one of: image, text"),
        ("attention_distillation", dict(), "the image tower has no blocks of a transformer"),
        ("dynamic_distillation", dict(negatives=0), "negatives is 0; expected at least 1"),
        ("dynamic_distillation", dict(targets="cwcl"), "targets match or do not, such as `identity`; got soft ones"),
        ("dynamic_distillation", dict(negatives=B), "expected fewer than the 4 rows of a batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(name, options, message):
    teachers = dict(teacher="t0") if name == "attention_distillation" else dict(teachers=("t0",))
    section = dict(name=name) | teachers | options
    with pytest.raises(UserError, match=message) as error:
        objective = objectives.build(dict(terms={name: section}, teachers=dict(t0=dict(decay=0.9))), Towers())
        params = towers(1, rows())
        objectives.value(objective, Towers(), params, rows(), None, state={"teachers": {"t0": params}})
    assert "\n" not in str(error.value)
