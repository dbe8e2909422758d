"""Tags as classes, against loops in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError

N, WIDTH, V = 6, 5, 4
IDS = np.arange(N)
TAGS = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]], bool)
BATCH = {"image": IDS, "token_ids": IDS[:, None], "tags": TAGS}
SECTION = dict(name="tag_softmax", of="image_embedding")


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    rng = np.random.default_rng(3)
    head = {"kernel": rng.normal(size=(WIDTH, V)), "bias": rng.normal(size=V)}
    return lookup.tables(size=N, width=WIDTH) | {"objective": {"tag_softmax": {"head": head}}}


def losses_by_hand(params, tags):
    head, losses = params["objective"]["tag_softmax"]["head"], []
    for z, own in zip(params["image"], tags, strict=True):
        logits = z @ head["kernel"] + head["bias"]
        log_sum = np.log(sum(np.exp(x) for x in logits))
        losses.append(sum((log_sum - logits[c]) / own.sum() for c in np.flatnonzero(own)))
    return np.array(losses)


def test_tag_softmax():
    has = TAGS.any(1)
    got = lookup.differentiate(SECTION, tables(), BATCH)
    lookup.check(got, lambda params, batch: losses_by_hand(params, TAGS)[has].mean(), tables(), BATCH)
    np.testing.assert_allclose(got[1]["tag_softmax/tags"], TAGS.sum() / N, rtol=1e-14)
    assert not np.any(got[2]["image"][1]) and not np.any(got[2]["text"])


def test_one_tag_is_a_class():
    """The cross-entropy of a linear classifier, exactly."""
    labels, params = np.array([0, 1, 2, 3, 0, 1]), tables()
    got = lookup.differentiate(SECTION, params, BATCH | {"tags": np.eye(V, dtype=bool)[labels]})
    head = params["objective"]["tag_softmax"]["head"]
    logits = params["image"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(got[0], lookup.cross_entropy(logits, np.eye(V)[labels]), rtol=1e-12)


def test_rare_tags_weigh_more():
    """By the shares of all pictures so far, over two steps; the memory has no gradient."""
    section = SECTION | dict(resample=0.5, rare=0.9)
    model, params = lookup.Lookup(N, WIDTH), tables()
    objective = objectives.build(section, model)
    state = objectives.make(objective, model, params, BATCH, jax.random.key(0))[1]
    other = BATCH | {"tags": ~TAGS}
    counts, pictures, run = np.zeros(V), 0, lookup.program(section, params, model=model)
    for step, batch in enumerate((other, BATCH)):
        counts, pictures = counts + batch["tags"].sum(0), pictures + batch["tags"].any(1).sum()
        factor = np.maximum(1, np.sqrt(0.9 / (counts / pictures)))
        weight = np.array([max(factor[row], default=0) for row in batch["tags"]])

        def by_hand(params, batch, weight=weight):
            return weight @ losses_by_hand(params, batch["tags"]) / weight.sum()

        got = run(params, batch, state)
        lookup.check(got, by_hand, params, batch)
        assert weight.max() > 1.0
        state = objectives.update(objective, state, params, got[3], None, step)
    np.testing.assert_array_equal(state["terms"]["tag_softmax"]["counts"], counts)
    common = objectives.build(SECTION | dict(resample=0.5, rare=1e-6), model)  # none is rare
    value, _ = objectives.value(common, model, params, BATCH, None, state=state)
    np.testing.assert_allclose(value, losses_by_hand(params, TAGS)[TAGS.any(1)].mean(), rtol=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(resample=-1.0), "resample is -1.0, rare 0.001; expected at least 0, and above 0 to 1"),
        (dict(key="image"), r"`image` has shape \[6\]; expected tags, bool \[B, V\]"),
        (dict(key="hashtags"), "`tag_softmax` needs `hashtags`, which neither the batch nor the model has"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message):
        lookup.differentiate(SECTION | section, tables(), BATCH)
