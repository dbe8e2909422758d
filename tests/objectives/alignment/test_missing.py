"""Missing modalities: the fused classifier and VICReg as loops, both fills, the case in which nothing is missing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.missing import vicreg
from vlm_jax.objectives.alignment.sentences import Report

B, CLASSES, D = 6, 3, 5
SIZES = dict(width=8, depth=1, heads=2, mlp_dim=8)
HAS = {"image_present": [1, 1, 0, 1, 1, 0], "token_ids_present": [1, 0, 1, 1, 1, 1]}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 14, (B, 3))
    ids[1] = 0  # what `missing` leaves
    given = {"image": jnp.asarray(rng.normal(size=(B, 4, 4, 3))), "token_ids": jnp.asarray(ids)}
    labels = {"concept": jnp.array([0, 2, 1, 2, -1, 0])}
    return given | labels | {key: jnp.array(there, bool) for key, there in HAS.items()}


def build(**options):
    section = dict(name="missing_modality", classes=CLASSES, predictor=SIZES)
    return objectives.build(section | options, Towers())


def begin(**options):
    """(objective, parameters), none of them as they begin."""
    objective, given = build(**options), batch()
    params = initial(Towers(), given["image"], given["token_ids"])
    made = jax.eval_shape(partial(objectives.make, objective, Towers()), params, given, jax.random.key(0))[0]
    rng = np.random.default_rng(1)
    return objective, jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5), jnp.float64), made)


def regularized(x, y):
    """VICReg of all rows, dimension by dimension."""
    n, d = x.shape
    value = 25 * np.mean([np.mean((x[i] - y[i]) ** 2) for i in range(n)])
    for z in (x, y):
        cov = np.cov(z, rowvar=False)
        value += 12.5 * np.mean([max(0, 1 - np.sqrt(cov[k, k] + 1e-4)) for k in range(d)])
        value += sum(cov[k, m] ** 2 for k in range(d) for m in range(d) if k != m) / d
    return value


def by_hand(params, given, fill):
    model = {name: leaf for name, leaf in params.items() if name != "objective"}
    own, there = params["objective"]["missing_modality"], {key: np.asarray(given[key]) for key in HAS}
    found = Towers().apply({"params": model}, given["image"], given["token_ids"])
    real = [np.sqrt(D) * np.asarray(x) for x in (found.image, found.text)]
    made = []
    words = np.asarray(given["token_ids"]) != 0
    words[~words.any(axis=1)] = True
    sides = (("image", "text", found.text_tokens, words), ("text", "image", found.image_tokens, np.ones((B, 4), bool)))
    read = Report(sentences=4, pool="none", cross="inside", dtype="float64", **SIZES)
    for side, other, tokens, mask in sides:
        seen = np.asarray(read.apply({"params": own[f"read_{other}"]}, tokens, mask)).mean(axis=1)
        head = own[f"predict_{side}"]
        made.append(seen @ np.asarray(head["kernel"]) + np.asarray(head["bias"]))
    losses = []
    for i in range(B):
        has = there["image_present"][i], there["token_ids_present"][i]
        other = made if fill == "predicted" else [np.zeros((B, D))] * 2
        fused = np.concatenate([(real if has[k] else other)[k][i] for k in (0, 1)])
        logits = fused @ np.asarray(own["classifier"]["kernel"]) + np.asarray(own["classifier"]["bias"])
        if (label := int(given["concept"][i])) >= 0:
            losses.append(np.log(np.sum(np.exp(logits))) - logits[label])
    both = there["image_present"] & there["token_ids_present"]
    joint = np.mean([regularized(m[both], r[both]) for m, r in zip(made, real, strict=True)])
    return np.mean(losses), joint


@pytest.mark.parametrize("fill", ["predicted", "zeros"])
def test_the_classifier_and_the_joint_embedding(fill):
    objective, params = begin(fill=fill, prediction=0.5)
    run = partial(objectives.value_and_grad, objective, Towers(), rng=None, accumulate=2)
    value, metrics, grads, _ = jax.jit(run)(params, batch())
    losses, joint = by_hand(params, batch(), fill)
    np.testing.assert_allclose(metrics["missing_modality/joint"], joint, rtol=1e-9)
    np.testing.assert_allclose(value, losses + 0.5 * joint, rtol=1e-9)
    assert np.any(grads["objective"]["missing_modality"]["read_text"]["queries"])


def test_without_missing_rows_the_fills_are_equal():
    given, values = batch() | {key: jnp.ones(B, bool) for key in HAS}, []
    _, params = begin()
    for fill in ("predicted", "zeros"):
        objective = build(fill=fill, prediction=0.0)
        value, metrics = jax.jit(partial(objectives.value, objective, Towers(), rng=None))(params, given)
        values.append(value)
        assert np.isnan(metrics["missing_modality/missing"]) and "missing_modality/joint" not in metrics
        assert metrics["missing_modality/complete"] == metrics["missing_modality/accuracy"]
    assert values[0] == values[1]


def test_equal_rows_that_vary_are_asked_for_nothing():
    z = jnp.asarray(2 * np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], float))
    np.testing.assert_allclose(vicreg(z, z), 0, atol=1e-12)
    assert vicreg(z, z + 1, jnp.array([True, False, False, False])) == 0  # one row varies by nothing
    np.testing.assert_allclose(vicreg(z, z + 1, variance=0, covariance=0), 25, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(present=dict(audio="audio_present")), "present names image, text, audio; expected keys of the batch for"),
        (dict(fill="mean"), "fill is `mean`; expected one of: predicted, zeros"),
        (dict(present=dict(image="has_image")), "needs `has_image`, which neither the batch nor the model has"),
        (dict(key="label"), "key is `label`, which the batch lacks"),
        (dict(predictor=dict(hight=3)), "config.objective.predictor has no key `hight`"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(UserError, match=message):
        begin(**options)
