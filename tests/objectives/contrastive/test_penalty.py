"""Penalties: over blocks and around a ring as with all logits at hand; focal and margin against loops in fp64."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.support import lookup
from tests.support.lookup import Lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError

SIZE, WIDTH = 48, 16


def params():
    rng = np.random.default_rng(0)
    unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    image = rng.normal(size=(SIZE, WIDTH))
    text = image + rng.normal(size=(SIZE, WIDTH))
    return {"image": unit(image), "text": unit(text), "logit_scale": np.float32(2.3), "logit_bias": np.float32(-2.5)}


PARAMS, IDS = params(), np.arange(SIZE)
BATCH = {"image": IDS, "token_ids": IDS, "concept": IDS % 31}
PENALTIES = ("softmax", "sigmoid", {"name": "softmax", "label_smoothing": 0.1})


def run(batch, params=PARAMS, accumulate=1, **section):
    """(loss, metrics, gradients)"""
    objective = objectives.build(dict(name="contrastive", **section), Lookup())
    step = partial(objectives.value_and_grad, objective, Lookup(), rng=None, accumulate=accumulate)
    return jax.jit(lambda params, batch: step(params, batch)[:3])(params, batch)


def assert_close(got, want):
    """To 5e-6: the scale's gradient is ten times a difference of numbers near 1."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-6), got, want)


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_blocks_and_the_plain_form_agree(penalty, targets):
    section = dict(penalty=penalty, targets=targets)
    want = run(BATCH, **section)
    assert want[1]["contrastive/accuracy_image_to_text"] > 0.3
    assert_close(run(BATCH, **section, implementation="blockwise"), want)


@pytest.mark.parametrize("penalty", PENALTIES[:2])
def test_around_a_ring(penalty):
    """Micro-batches included."""
    want = run(BATCH, penalty=penalty, targets="concept")
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        assert_close(run(batch, penalty=penalty, targets="concept", accumulate=2), want)


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_masked_examples_do_not_exist(penalty, targets):
    """Whatever they hold."""
    section = dict(penalty=penalty, targets=targets)
    valid = IDS % 4 > 0
    want = run({key: value[valid] for key, value in BATCH.items()}, **section)
    others = PARAMS | {name: np.where(valid[:, None], PARAMS[name], 9) for name in ("image", "text")}
    got = run(BATCH | {"valid": valid}, others, **section, mask="valid", implementation="blockwise")
    assert_close(got, want)
    assert not any(np.any(got[2][name][~valid]) for name in ("image", "text"))


def test_a_mask_that_the_batch_lacks_is_named():
    with pytest.raises(UserError, match=r"config\.objective\.mask is `valid`, which the batch lacks"):
        run(BATCH, mask="valid")


# focal, margin: all logits are at hand


SMALL = {"image": IDS[:6], "token_ids": IDS[:6], "concept": np.array([0, 1, 0, 2, 0, 1])}


def by_loops(of_row, targets):
    """The loss of a batch of six: mean over rows and over columns of `of_row(logits, weights)`."""
    same = SMALL["concept"][:, None] == SMALL["concept"] if targets == "concept" else np.eye(6)

    def loss(params, batch):
        logits = lookup.logits_of(params, params["image"][:6], params["text"][:6])
        return [np.mean([of_row(x, w) for x, w in zip(one, same.astype(float), strict=True)]) for one in logits]

    return loss


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_focal(gamma, targets):
    def of_row(x, w):
        p = np.exp(x) / np.sum(np.exp(x))
        return (1 - np.sum(p[w > 0])) ** gamma * -np.sum(w / np.sum(w) * np.log(p))

    with jax.enable_x64(True):
        params = lookup.tables(size=SIZE, width=WIDTH)
        got = lookup.differentiate(dict(penalty=dict(name="focal", gamma=gamma), targets=targets), params, SMALL)
        lookup.check(got, lambda *given: 0.5 * sum(by_loops(of_row, targets)(*given)), params, SMALL)


@pytest.mark.parametrize("targets", ["identity", "concept", "cwcl"])
def test_focal_without_gamma_is_softmax(targets):
    with jax.enable_x64(True):
        params = lookup.tables(size=SIZE, width=WIDTH)
        focal, softmax = (
            lookup.differentiate(dict(penalty=penalty, targets=targets), params, SMALL)[:3]
            for penalty in (dict(name="focal", gamma=0), "softmax")
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-15), focal, softmax)


def test_focal_of_soft_targets_counts_less_what_is_told_apart():
    with jax.enable_x64(True):
        params = lookup.tables(size=SIZE, width=WIDTH)
        values = [
            lookup.differentiate(dict(penalty=dict(name="focal", gamma=g), targets="cwcl"), params, SMALL)[0]
            for g in (0.0, 0.5, 2.0)
        ]
        assert values[0] > values[1] > values[2] > 0


@pytest.mark.parametrize("targets", ["identity", "concept"])
@pytest.mark.parametrize("hardest", [True, False])
def test_margin(hardest, targets):
    def of_row(x, w):
        hinges = [max(0.0, 0.7 + x[j] - min(x[w > 0])) for j in range(len(x)) if w[j] == 0]
        return max(hinges) if hardest else sum(hinges)

    with jax.enable_x64(True):
        params = lookup.tables(size=SIZE, width=WIDTH)
        penalty = dict(name="margin", margin=0.7, hardest=hardest)
        got = lookup.differentiate(dict(penalty=penalty, targets=targets), params, SMALL)
        lookup.check(got, lambda *given: sum(by_loops(of_row, targets)(*given)), params, SMALL)
