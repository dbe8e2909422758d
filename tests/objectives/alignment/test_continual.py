"""Terms that keep what the model before the stage knew, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError

B = 6


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def given():
    """(model, its parameters, those of the model before, batch with a second row set of texts)"""
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(B, 4, 4, 3)), "token_ids": rng.integers(0, 14, (B, 3))}
    shapes = jax.eval_shape(Towers().init, jax.random.key(0), batch["image"], batch["token_ids"])["params"]
    draw = lambda rng: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    new = draw(rng)
    old = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), new)
    return Towers(), new, old, {"batch": batch, "names": {"token_ids": rng.integers(0, 14, (4, 3))}}


def value(given, **section):
    """(loss, metrics, gradient) of a term; no gradient flows to the model before."""
    model, new, old, batch = given
    objective = objectives.build(dict(section, teachers=dict(before=dict(decay=1.0, refresh=True))), model)
    run = lambda new, old: objectives.value(objective, model, new, batch, None, state={"teachers": {"before": old}})
    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (loss, metrics), (grads, none) = run(new, old)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))
    (kept, _), (grads, _) = run(new, new)  # a model that has not changed has lost nothing
    assert abs(kept) < 1e-15 and all(np.max(np.abs(leaf), initial=0) < 1e-14 for leaf in jax.tree.leaves(grads))
    return loss, metrics


def embedded(given, texts="batch"):
    """Cosines of (new, old) by relation, and the scales, as the models themselves give them."""
    model, *both, batch = given
    found = []
    for params in both:
        run = lambda ids, params=params: model.apply({"params": params}, batch["batch"]["image"], ids)
        seen = run(batch["batch"]["token_ids"])
        x, y = seen.image, run(np.resize(batch[texts]["token_ids"], (B, 3))).text[: len(batch[texts]["token_ids"])]
        cosines = dict(image_to_text=x @ y.T, text_to_image=y @ x.T, image_to_image=x @ x.T, text_to_text=y @ y.T)
        found.append(({key: np.asarray(one) for key, one in cosines.items()}, float(seen.scale)))
    return found


def divergence(old, new, alone=False, rows=None):
    """The mean KL(softmax of a row of old | softmax of the row of new), by loops."""
    total = 0.0
    for i in range(len(old)) if rows is None else rows:
        js = [j for j in range(old.shape[1]) if not (alone and i == j)]
        p, q = ([np.exp(z[i, j]) / sum(np.exp(z[i, k]) for k in js) for j in js] for z in (old, new))
        total += sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(old)


@pytest.mark.parametrize("texts", ["batch", "names"])
def test_lwf(given, texts):
    (new, new_scale), (old, old_scale) = embedded(given, texts)
    key, t = "image_to_text", 3.0
    wanted = t**2 * divergence(old_scale * old[key] / t, new_scale * new[key] / t)
    loss, metrics = value(given, name="lwf", temperature=t, texts=texts)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(metrics["lwf/image_to_text"], wanted / t**2, rtol=1e-6)


def test_topology(given):
    (new, _), (old, _) = embedded(given)
    within = ("image_to_image", "text_to_text")
    each = {key: divergence(5 * old[key], 5 * new[key], alone=key in within) for key in new}
    loss, metrics = value(given, name="topology", scale=5.0)
    np.testing.assert_allclose(loss, sum(each.values()) / 2, rtol=1e-6)
    for key, one in each.items():
        np.testing.assert_allclose(metrics[f"topology/{key}"], one, rtol=1e-6)


def test_off_diagonal(given):
    (new, _), (old, _) = embedded(given)
    total, counts = 0.0, []
    for key in ("image_to_text", "text_to_image"):
        rows = [i for i in range(B) if old[key][i].argmax() == i]
        counts.append(len(rows) / B)
        total += divergence(2 * old[key], 2 * new[key], rows=rows) / 2
    assert 0 < sum(counts) < 2
    loss, metrics = value(given, name="off_diagonal", scale=2.0)
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    np.testing.assert_allclose(metrics["off_diagonal/understood"], sum(counts) / 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="lwf", temperature=0), "the temperature is 0; expected a number above 0"),
        (dict(name="topology", of=["image_to_txt"]), "`of` is .'image_to_txt'.; expected some of: image_to_text"),
        (dict(name="topology", teacher="after"), "`topology` asks for the teacher `after`; .* has: before"),
        (dict(name="lwf", texts="nams"), "`lwf` reads the row set `nams`, which neither the batch"),
    ],
)
def test_mistakes_are_named(given, section, message):
    with pytest.raises(UserError, match=message):
        value(given, **section)


def test_one_vector_each(given):
    with pytest.raises(UserError, match="`lwf` compares one vector each"):
        value((Towers(tokens=True), *given[1:]), name="lwf")


def test_a_compatible_momentum_model_follows_the_mean_of_model_and_anchor(given):
    """m theta_m + (1 - m) / 2 (theta + theta_old) for three steps, and the same without an anchor."""
    model, new, old, _ = given
    teachers = dict(before=dict(decay=1.0), momentum=dict(decay=0.9, anchor="before"), plain=dict(decay=0.9))
    objective = objectives.build(dict(name="topology", teachers=teachers), model)
    state = {"terms": {}, "teachers": dict(before=old, momentum=new, plain=new)}
    leaf = lambda tree: np.asarray(tree["image_fc"]["kernel"])
    momentum = plain = theta = leaf(new)
    for step in range(3):
        new = jax.tree.map(lambda p: jnp.asarray(p) * 1.1, new)
        theta = leaf(new)
        momentum = 0.9 * momentum + 0.1 / 2 * (theta + leaf(old))
        plain = 0.9 * plain + 0.1 * theta
        state = objectives.update(objective, state, new, {"topology": {}}, None, step)
    np.testing.assert_allclose(leaf(state["teachers"]["momentum"]), momentum, rtol=1e-12)
    np.testing.assert_allclose(leaf(state["teachers"]["plain"]), plain, rtol=1e-12)
    np.testing.assert_array_equal(leaf(state["teachers"]["before"]), leaf(old))


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        (dict(before=dict(decay=0.9, anchor="befor")), "the anchor `befor` is not another average"),
        (dict(before=dict(decay=0.9, anchor="before")), "the anchor `before` is not another average"),
        (dict(before=dict(decay=1.0), a=dict(decay=0.9, of="image.*", anchor="before")), "with `of` `image.*`"),
        (dict(before=dict(spec="x", refresh=True)), "has `refresh`, `True`, and `spec`"),
        (dict(before=dict(spec="x", anchor="y")), "has `anchor`, `y`, and `spec`"),
    ],
)
def test_mistakes_of_teachers_are_named(given, teachers, message):
    with pytest.raises(UserError, match=message):
        objectives.build(dict(name="topology", teachers=teachers), given[0], load=None)
