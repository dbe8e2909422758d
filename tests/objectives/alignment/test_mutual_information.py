"""Mixed pictures predict views, texts and classes: the sum as loops over rows, parts that are left out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.masked_tokens import TokenDecoder, parts
from vlm_jax.objectives.outputs import fold

B, N, CLASSES = 5, 4, 3
SIZES = dict(width=8, depth=1, heads=2, mlp_dim=8, dtype="float64")
WEIGHTS = dict(same_view=0.5, other_view=2.0, text=1.5, category=0.25)
KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    pictures = lambda: jnp.asarray(rng.normal(size=(B, 4, 4, 3)))
    texts = jnp.asarray(rng.integers(1, 14, (B, 3)))
    labels = jnp.array([0, 2, 1, 2, -1])
    return {"image": pictures(), "view": pictures(), "token_ids": texts, "concept": labels}


def begin(**options):
    """(objective, parameters, state), none of them as they begin."""
    section = dict(name="mutual_information", decoder=SIZES, teachers=dict(average=dict(decay=0.9)), **options)
    objective, given = objectives.build(section, Towers()), batch()
    params = initial(Towers(), given["image"], given["token_ids"])
    made = jax.eval_shape(partial(objectives.make, objective, Towers()), params, given, jax.random.key(0))
    rng = np.random.default_rng(1)
    return objective, *jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5), jnp.float64), made)


def unit(x):
    return np.asarray(x) / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def apply(params, images, texts=None):
    return Towers().apply({"params": {k: v for k, v in params.items() if k != "objective"}}, images, texts)


def surprise(logits, at):
    return np.log(np.sum(np.exp(logits))) - logits[at]


def by_hand(params, teacher, given):
    """{part: loss}: the sums over rows, targets and candidates."""
    shift = int(jax.random.randint(fold(KEY, "mixed"), (), 1, B))
    of_rows = fold(KEY, "rows mixed")
    hidden, kept = map(np.asarray, parts(jax.vmap(partial(jax.random.fold_in, of_rows))(jnp.arange(B)), B, N, 0.5))
    images, own = np.asarray(given["image"]), params["objective"]["mutual_information"]
    dense = lambda name, x: x @ np.asarray(own[name]["kernel"]) + np.asarray(own[name]["bias"])
    clean, views = apply(teacher, given["image"]), apply(teacher, given["view"])
    clean, views = unit(clean.image_tokens), unit(views.image_pooled)
    texts = np.asarray(apply(params, None, given["token_ids"]).text)
    decode = TokenDecoder(**SIZES, pool="none", out=clean.shape[-1])
    found = {name: [] for name in WEIGHTS}
    for i in range(B):
        j, mixed = (i + shift) % B, images[i].copy()
        for n in hidden[i]:  # 2 x 2 patches of 2 x 2 pixels
            y, x = 2 * (n // 2), 2 * (n % 2)
            mixed[y : y + 2, x : x + 2] = images[j, y : y + 2, x : x + 2]
        tokens = np.asarray(apply(params, mixed[None]).image_tokens[0])
        made = decode.apply({"params": own["decoder"]}, tokens[kept[i]][None], kept[i][None], N)[0]
        for n in hidden[i]:
            found["same_view"].append(surprise(10 * clean.reshape(B * N, -1) @ unit(made[n]), i * N + n))
        of_i, of_j = (np.mean(tokens[part], axis=0) for part in (kept[i], hidden[i]))
        found["other_view"].append(surprise(10 * views @ unit(dense("other_view", of_j)), j))
        for pooled, row in ((of_i, i), (of_j, j)):
            found["text"].append(2 * surprise(10 * texts @ unit(dense("text", pooled)), row))
            label = int(given["concept"][row])
            if label >= 0:
                found["category"].append(2 * surprise(dense("category", pooled), label))
    return {name: np.mean(losses) for name, losses in found.items()}


def test_mixed_pictures_predict_all_targets_of_both():
    given = batch()
    objective, params, state = begin(classes=CLASSES, weights=WEIGHTS)
    run = partial(objectives.value_and_grad, objective, Towers(), rng=KEY, state=state)
    value, metrics, grads, _ = jax.jit(run)(params, given)
    want = by_hand(params, state["teachers"]["average"], given)
    for name, one in want.items():
        np.testing.assert_allclose(metrics[f"mutual_information/{name}"], one, rtol=1e-9)
    np.testing.assert_allclose(value, sum(WEIGHTS[name] * one for name, one in want.items()), rtol=1e-9)
    assert np.any(grads["embed"]["embedding"]) and np.any(grads["image_fc"]["kernel"])


def test_parts_of_weight_0_are_left_out():
    """Texts alone, of one row: nothing is uncertain. Neither teacher's views nor labels are read."""
    objective, params, state = begin(weights=dict(same_view=0, other_view=0))
    assert list(params["objective"]["mutual_information"]) == ["text"]
    given = {name: rows[:1] for name, rows in batch().items() if name in ("image", "token_ids")}
    value, metrics = objectives.value(objective, Towers(), params, given, KEY, state=state)
    assert value == 0 and sorted(metrics) == ["loss", "mutual_information/loss", "mutual_information/text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights=dict(texts=1)), "weights has texts=1; expected numbers >= 0 for: same_view, other_view, text"),
        (dict(weights=dict(same_view=0, other_view=0, text=0)), "weights are all 0; at least one part has to count"),
        (dict(view="crop"), r"view is `crop`; expected a picture \[5, 4, 4, 3\]: op `view`"),
        (dict(share=1.0), "share is 1.0 of 4 tokens"),
        (dict(classes=3, key="label"), "key is `label`, which the batch lacks"),
    ],
)  # fmt: skip
def test_what_cannot_be_predicted_is_named(options, message):
    with pytest.raises(UserError, match=message):
        begin(**options)
