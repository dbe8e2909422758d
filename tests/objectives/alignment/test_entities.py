"""Prompting entity modelling: the equation as loops in fp64, regions, one entity, names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import drawn, initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment import entities
from vlm_jax.objectives.outputs import fold

B, M = 5, 4
IDS = [[3, 4, 0], [5, 6, 0], [7, 0, 0], [8, 9, 2]]
FUSION = dict(width=8, heads=2, mlp_dim=8, dtype="float64")
SECTION = dict(name="entities", entities=IDS, fusion=FUSION, teachers=dict(prompter=dict(decay=0.5)))


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    return {"image": rng.normal(size=(B, 4, 4, 3)), "token_ids": rng.integers(1, 14, (B, 3))}


def begin(section, rows):
    """(objective, parameters, a prompter of other parameters)"""
    objective = objectives.build(section, Towers())
    params = initial(Towers(), rows["image"], rows["token_ids"])
    shapes = jax.eval_shape(partial(objectives.make, objective, Towers()), params, rows, jax.random.key(0))
    draw = lambda seed: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), drawn(shapes[0], seed, 0.5))
    return objective, draw(1), {"teachers": {"prompter": draw(2)}, "terms": {}}


def test_the_equation():
    """Row by row; the last, which no name fits, is left out."""
    rows, key = batch(), jax.random.key(3)
    keys = jax.vmap(lambda i: jax.random.fold_in(fold(key, "rows batch"), i))(jnp.arange(B))
    regions = np.asarray(entities._regions(keys, B, 2, (0.3, 0.5)))
    q, p = [], []

    def by_hand(params, prompter):
        seen = jax.jit(lambda params, image, ids: Towers().apply({"params": params}, image, ids))
        fused = jax.jit(partial(entities.Regions(**FUSION, depth=1, pool="none", entities=M).apply))
        texts = np.asarray(seen(prompter, None, jnp.asarray(IDS)).text)
        for i in range(B):
            alone = rows["image"][i].copy()
            for y in range(4):
                for x in range(4):
                    if not regions[i].reshape(2, 2)[y // 2, x // 2]:
                        alone[y, x] = 0
            found, own = (
                seen(prompter, alone[None], None),
                seen(params, rows["image"][i : i + 1], rows["token_ids"][i : i + 1]),
            )
            scores = [float(found.scale) * np.asarray(found.image[0]) @ text for text in texts]
            q.append(np.exp(scores) / sum(np.exp(scores)))
            logits = np.asarray(fused({"params": params["objective"]["entities"]["fusion"]}, own.text_tokens,
                                      own.image_tokens, jnp.ones((1, 3), bool), regions[i : i + 1]))[0]  # fmt: skip
            p.append(np.exp(logits) / sum(np.exp(logits)))

    objective, params, state = begin(SECTION, rows)
    by_hand(params, state["teachers"]["prompter"])
    least = np.sort(np.max(q, axis=1))[1] - 1e-6  # one of five is below
    kept = [i for i in range(B) if max(q[i]) >= least]
    want = -np.mean([sum(a * np.log(b) for a, b in zip(q[i], p[i], strict=True)) for i in kept])
    objective = objectives.build(SECTION | dict(least=float(least)), Towers())
    value, metrics, grads, _ = jax.jit(partial(objectives.value_and_grad, objective, Towers()))(
        params, rows, key, state=state
    )
    np.testing.assert_allclose(value, want, rtol=1e-9)
    np.testing.assert_allclose(metrics["entities/kept"], len(kept) / B)
    agree = np.mean([np.argmax(q[i]) == np.argmax(p[i]) for i in kept])
    np.testing.assert_allclose(metrics["entities/accuracy"], agree)
    assert len(kept) == B - 1 and np.any(grads["image_fc"]["kernel"]) and np.any(grads["embed"]["embedding"])


def test_one_entity_is_certain():
    rows = batch()
    objective, params, state = begin(SECTION | dict(entities=IDS[:1]), rows)
    run = jax.jit(partial(objectives.value_and_grad, objective, Towers()))
    value, metrics, grads, _ = run(params, rows, jax.random.key(0), state=state)
    assert value == 0 and metrics["entities/kept"] == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_regions_are_boxes_of_their_area():
    keys = jax.random.split(jax.random.key(0), 300)
    found = np.asarray(entities._regions(keys, 300, 6, (0.3, 0.5))).reshape(-1, 6, 6)
    for box in found:
        y, x = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert box.sum() == len(y) * len(x) == (np.ptp(y) + 1) * (np.ptp(x) + 1)
        assert 0.3 <= box.mean() <= 0.5
    assert np.all(np.abs(found.mean(0) - found.mean()) < 0.35) and len(np.unique(found, axis=0)) > 60
    np.testing.assert_array_equal(entities._regions(keys[7:9], 2, 6, (0.3, 0.5)).reshape(-1, 6, 6), found[7:9])


def test_names_become_prompts():
    tokenizer = tokenizers.build("emoji")
    context = objectives.Context(0, True, tokenizer=tokenizer)
    made = entities._prompts(("cat", "dog face"), ["a {}", "the {}"], "lower | tokenize(6)", context)
    assert made.shape == (2, 2, 6)
    np.testing.assert_array_equal(made[1, 1], tokenizer(["the dog face"], 6)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(area=(0.5, 0.3)), r"area is \(0.5, 0.3\); expected two shares of a picture, the smaller one first"),
        (dict(area=(0.6, 0.7)), "no box of 2 x 2 patches has an area of 0.6 to 0.7"),
        (dict(least=2), "least is 2; expected a probability, 0 to 1"),
        (dict(entities=["cat", "dog"]), "entities are names, and the run has no tokenizer; set config.tokenizer"),
        (dict(fusion=dict(wide=3)), "fusion has no key `wide`"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UserError, match=message) as error:
        begin(SECTION | options, batch())
    assert "\n" not in str(error.value)
