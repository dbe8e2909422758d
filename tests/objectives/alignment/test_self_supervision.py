"""Self-supervision: each equation as loops in fp64, within texts' views and across modalities; what must be equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup
from tests.support.models import initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment import sides
from vlm_jax.params.table import map_with_name

N, V, WIDTH, TABLE, K = 6, 2, 5, 32, 7
ROWS = np.arange(1, N + 1)
VIEWS, MORE = 7 + np.arange(N * V).reshape(N, V, 1), 20 + np.arange(N)[:, None, None]
BATCH = {"image": ROWS, "token_ids": ROWS[:, None], "views": VIEWS, "more": MORE}
WITHIN, ACROSS = ("views",), ("image", "text")
SMALL = dict(projector=dict(hidden=4, out=3, layers=2))
SECTIONS = {
    "simsiam": SMALL | dict(projector=dict(hidden=4, out=3), predictor=dict(hidden=2)),
    "byol": SMALL | dict(predictor=dict(hidden=4), teachers=dict(average=dict(decay=0.5))),
    "barlow_twins": SMALL | dict(redundancy=0.1),
    "vicreg": SMALL | dict(invariance=3.0, variance=2.0, covariance=0.7),
    "swav": SMALL | dict(prototypes=K),
    "projected_contrast": SMALL | dict(penalty=dict(name="softmax", label_smoothing=0.1)),
    "moco": SMALL | dict(size=10, temperature=0.5, teachers=dict(momentum=dict(decay=0.5))),
}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def draw(tree, seed):
    rng = np.random.default_rng(seed)
    return map_with_name(lambda name, x: name.endswith("scale") + 0.5 * rng.normal(size=x.shape), tree)


def begin(section, name):
    """(parameters, memory) of a term, drawn: a queue of two batches, of which one is filled."""
    model, tables = lookup.Lookup(TABLE, WIDTH), lookup.tables(size=TABLE, width=WIDTH)
    objective = objectives.build(section, model)
    shapes = jax.eval_shape(partial(objectives.make, objective, model), tables, BATCH, jax.random.key(0))
    params = tables | {"objective": draw(shapes[0].get("objective", {}), 1)}
    if shapes[1] is None:
        return params, None
    state = draw(shapes[1], 2)
    if "terms" in state and name in state["terms"]:
        queue = state["terms"][name]
        state["terms"][name] = queue | {"filled": np.arange(2 * N) < N, "next": np.int32(N)}
    return params, state


# The formulas.


def unit(x):
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def given(params, keys):
    """[(modality, vectors [N, WIDTH])] of each side."""
    of_key = {"image": lambda: [("image", params["image"][ROWS])], "text": lambda: [("text", params["text"][ROWS])]}
    views = lambda key: [("text", params["text"][BATCH[key][:, v, 0]]) for v in range(BATCH[key].shape[1])]
    return [side for key in keys for side in (of_key[key]() if key in of_key else views(key))]


def mlp(own, x):
    layers = [key for key in own if key.startswith("fc")]
    for i in range(1, len(layers) + 1):
        x = x @ own[f"fc{i}"]["kernel"] + own[f"fc{i}"]["bias"]
        if f"norm{i}" in own:
            columns = [(c - c.mean()) / np.sqrt(np.mean((c - c.mean()) ** 2) + 1e-5) for c in x.T]
            x = np.stack(columns, axis=1) * own[f"norm{i}"]["scale"] + own[f"norm{i}"]["bias"]
        x = x if i == len(layers) else np.maximum(x, 0)
    return x


def projected(params, name, keys):
    own = params["objective"][name]
    return [(side, mlp(own[f"{side}_projector"], x)) for side, x in given(params, keys)]


def pairs(count, sides):
    """Places (i, j): side i, which may be a further view, is compared with target j."""
    across = len({side for side, _ in sides[:count]}) > 1
    return [(i, j) for i in range(len(sides)) for j in range(count)
            if (sides[i][0] != sides[j][0] if across else i != j)]  # fmt: skip


def mean_pair(count, sides, loss, both=True):
    return np.mean([loss(i, j) for i, j in pairs(count, sides) if both or i < j])


def predicted(params, targets, name, keys, crops, of_cosine):
    """`targets`: parameters of what has no gradient."""
    own, count = projected(params, name, keys + crops), len(given(params, keys))
    aims, cosine = projected(targets, name, keys), lambda a, b: unit(a) @ unit(b)
    guess = [(side, mlp(params["objective"][name][f"{side}_predictor"], x)) for side, x in own]
    one = lambda i, j: np.mean([of_cosine(cosine(a, b)) for a, b in zip(guess[i][1], aims[j][1], strict=True)])
    return mean_pair(count, own, one)


def barlow(params, keys):
    own = projected(params, "barlow_twins", keys)

    def one(i, j):
        a, b = (own[k][1] - own[k][1].mean(0) for k in (i, j))
        total = 0.0
        for d in range(a.shape[1]):
            for e in range(a.shape[1]):
                c = sum(a[:, d] * b[:, e]) / np.sqrt(sum(a[:, d] ** 2) * sum(b[:, e] ** 2))
                total += (1 - c) ** 2 if d == e else 0.1 * c**2
        return total

    return mean_pair(len(own), own, one, both=False)


def vicreg(params, keys):
    own = projected(params, "vicreg", keys)

    def alone(z):
        covariance = np.cov(z.T)
        spread = [max(0.0, 1 - np.sqrt(covariance[d, d] + 1e-4)) for d in range(len(covariance))]
        off = [covariance[d, e] ** 2 for d in range(len(covariance)) for e in range(len(covariance)) if d != e]
        return np.mean(spread), sum(off) / len(covariance)

    def one(i, j):
        (a, b), (x, y) = (alone(own[k][1]) for k in (i, j)), (own[k][1] for k in (i, j))
        return 3 * np.mean((x - y) ** 2) + 2 * (a[0] + b[0]) / 2 + 0.7 * (a[1] + b[1])

    return mean_pair(len(own), own, one, both=False)


def swav(params, targets, keys, crops):
    def scores(params, keys):
        columns = unit(params["objective"]["swav"]["prototypes"]["kernel"].T)
        return [(side, unit(z) @ columns.T) for side, z in projected(params, "swav", keys)]

    def codes(x):
        q = np.exp(x / 0.05)
        for _ in range(3):
            q /= q.sum(0)
            q /= q.sum(1, keepdims=True)
        return q

    own, aims = scores(params, keys + crops), scores(targets, keys)
    log_softmax = lambda row: row / 0.1 - np.log(sum(np.exp(row / 0.1)))
    entropy = lambda rows, q: np.mean([-sum(a * log_softmax(b)) for a, b in zip(q, rows, strict=True)])
    return mean_pair(len(aims), own, lambda i, j: entropy(own[i][1], codes(aims[j][1])))


def moco(params, state, keys):
    made = lambda params: [(side, unit(z)) for side, z in projected(params, "moco", keys)]
    own, aims, queue = made(params), made(state["teachers"]["momentum"]), state["terms"]["moco"]

    def one(i, j):
        losses = []
        for q, k in zip(own[i][1], aims[j][1], strict=True):
            scores = [q @ k] + [q @ n for row in queue[aims[j][0]][:N] for n in row]
            losses.append(np.log(sum(np.exp(s / 0.5) for s in scores)) - scores[0] / 0.5)
        return np.mean(losses)

    return mean_pair(len(own), own, one)


def by_hand(name, state, fixed, keys, crops):
    return {
        "simsiam": lambda params, _: predicted(params, fixed, name, keys, crops, lambda c: -c),
        "byol": lambda params, _: (
            2 * predicted(params, state["teachers"]["average"], name, keys, crops, lambda c: 2 - 2 * c)
        ),
        "barlow_twins": lambda params, _: barlow(params, keys),
        "vicreg": lambda params, _: vicreg(params, keys),
        "swav": lambda params, _: swav(params, fixed, keys, crops),
        "moco": lambda params, _: moco(params, state, keys),
        "projected_contrast": lambda params, _: contrast(params, keys),
    }[name]


def contrast(params, keys):
    own = params["objective"]["projected_contrast"]
    made = [(side, unit(z)) for side, z in projected(params, "projected_contrast", keys)]

    def one(i, j):
        logits = np.exp(own["scale"]["log"]) * made[i][1] @ made[j][1].T
        return lookup.softmax(logits, logits.T, np.eye(N), np.eye(N), smoothing=0.1)

    return mean_pair(len(made), made, one, both=False)


CASES = [(name, keys) for name in SECTIONS for keys in (WITHIN, ACROSS) if keys == WITHIN or name != "vicreg"]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_the_equation(name, keys):
    """Values to 1e-10, gradients to 1e-6; further views within a modality, where a term has them."""
    crops = ("more",) if keys == WITHIN and name in ("simsiam", "byol", "swav") else ()
    section = dict(SECTIONS[name], name=name, of=keys) | (dict(crops=crops[0]) if crops else {})
    params, state = begin(section, name)
    got = lookup.differentiate(section, params, BATCH, state=state)
    lookup.check(got, by_hand(name, state, params, keys, crops), params, BATCH)
    assert np.any(got[2]["objective"][name]["text_projector"]["fc1"]["kernel"])


def test_a_teacher_that_is_the_model_makes_byol_of_simsiam():
    """4 + 4 simsiam, exactly: the squared distance of unit vectors, summed over both orders."""
    heads = dict(of=ACROSS, projector=dict(hidden=4, out=3, layers=2, last=False), predictor=dict(hidden=2))
    sections = {"simsiam": heads, "byol": heads | dict(teachers=dict(average=dict(decay=0.0)))}
    values = []
    for name, section in sections.items():
        params, state = begin(dict(section, name=name), name)
        state = state and state | {"teachers": {"average": params}}
        value, _, grads, _ = lookup.differentiate(dict(section, name=name), params, BATCH, state=state)
        values.append((value, grads["image"]))
    np.testing.assert_allclose(values[1][0], 4 + 4 * values[0][0], rtol=1e-13)
    np.testing.assert_allclose(values[1][1], 4 * values[0][1], rtol=1e-10, atol=1e-14)


def test_momentum_contrast_of_one_pair_is_the_queue_of_contrastive():
    """With one row the batch has no other keys: BriVL's loss on embeddings is that of `negatives="queue"`."""
    batch = {key: rows[:1] for key, rows in BATCH.items()}
    params, model = lookup.tables(size=TABLE, width=WIDTH), lookup.Lookup(TABLE, WIDTH)
    teacher, keys = lookup.tables(seed=1, size=TABLE, width=WIDTH), lookup.tables(seed=2, size=TABLE, width=WIDTH)
    bare = dict(name="moco", of=ACROSS, projector=dict(layers=0), size=8, temperature=0.2)
    queued = dict(name="contrastive", negatives=dict(name="queue", size=8))
    values = []
    for section, name, axis in ((bare, "{}", lambda x: x[:, None]), (queued, "key_{}", lambda x: x)):
        queue = {name.format(side): axis(keys[side][:8]) for side in ACROSS}
        state = {"teachers": {"momentum": teacher}, "terms": {}}
        state["terms"][section["name"]] = queue | {"filled": np.arange(8) < 5, "next": np.int32(5)}
        objective = objectives.build(section | dict(teachers=dict(momentum=dict(decay=0.5))), model)
        run = jax.jit(partial(objectives.value, objective, model))
        values.append(run(params, batch, None, state=state)[0])
    np.testing.assert_allclose(*values, rtol=1e-7)  # the tables' scale is 5; `unit` adds 1e-8 to norms


def test_contrast_without_projector_is_contrastive():
    """At the model's scale, exactly."""
    params, model = lookup.tables(size=TABLE, width=WIDTH), lookup.Lookup(TABLE, WIDTH)
    bare = dict(name="projected_contrast", of=ACROSS, projector=dict(layers=0), targets="concept")
    batch = BATCH | {"concept": ROWS % 4}
    with_scale = params | {"objective": {"projected_contrast": {"scale": {"log": params["logit_scale"]}}}}
    value = lookup.differentiate(bare, with_scale, batch)[0]
    without_bias = params | {"logit_bias": np.float64(0)}
    want = lookup.differentiate(dict(targets="concept"), without_bias, batch, model=model)[0]
    np.testing.assert_allclose(value, want, rtol=1e-7)  # `unit` adds 1e-8 to norms


def test_momentum_contrast_remembers_the_keys():
    section = dict(SECTIONS["moco"], name="moco", of=ACROSS)
    params, state = begin(section, "moco")
    objective = objectives.build(section, lookup.Lookup(TABLE, WIDTH))
    found = lookup.differentiate(section, params, BATCH, state=state)[3]
    queue = objectives.update(objective, jax.tree.map(jnp.asarray, state), params, found, None, 0)["terms"]["moco"]
    want = dict(projected(state["teachers"]["momentum"], "moco", ACROSS))
    for side in ACROSS:
        np.testing.assert_allclose(queue[side][N:, 0], unit(want[side]), rtol=1e-10)
    assert np.all(queue["filled"]) and queue["next"] == 0


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_views_that_are_one(name):
    """Nothing is left of what asks for agreement; without a projector."""
    zero = dict(redundancy=0.0) if name == "barlow_twins" else dict(variance=0.0, covariance=0.0)
    section = dict(name=name, of=("views", "views"), projector=dict(layers=0)) | zero
    batch = BATCH | {"views": VIEWS[:, :1]}
    value = lookup.differentiate(section, begin(section, name)[0], batch)[0]
    np.testing.assert_allclose(value, 0, atol=1e-20)


def test_views_of_pictures_are_pictures():
    """Views in one key, or in several; `image` shares its pass."""
    rng, model = np.random.default_rng(0), Towers()
    pictures = rng.normal(size=(3, N, 4, 4, 3))
    rows = {"image": pictures[0], "two": np.moveaxis(pictures[:2], 0, 1), "one": pictures[1]}
    params = jax.tree.map(jnp.float64, initial(model, rows["image"], np.ones((N, 3), int)))
    values = []
    for of in (("two",), ("image", "one")):
        objective = objectives.build(dict(name="vicreg", of=of, projector=dict(layers=0)), model)
        values.append(jax.jit(partial(objectives.value, objective, model))(params, rows, None))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), *values)


def test_collapse():
    """Against eigenvalues; all in one direction; even in all directions."""
    x = np.random.default_rng(0).normal(size=(400, 8)) * np.arange(1, 9)
    found, z = sides.collapse(jnp.asarray(x)), lookup.unit(x)
    values = np.linalg.eigvalsh(np.cov(z.T, bias=True))
    np.testing.assert_allclose(found["effective_rank"], values.sum() ** 2 / (values**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(found["spread"], 8**0.5 * z.std(0).mean(), rtol=1e-10)
    line = sides.collapse(jnp.outer(jnp.asarray([-1.0, 2.0, -3.0, 4.0]), jnp.arange(1.0, 9.0)))
    np.testing.assert_allclose(line["effective_rank"], 1, rtol=1e-10)
    same = sides.collapse(jnp.ones((4, 8)))
    assert same["spread"] < 1e-12
    even = sides.collapse(jnp.concatenate([jnp.eye(8), -jnp.eye(8)]))
    np.testing.assert_allclose((even["spread"], even["effective_rank"]), (1, 8), rtol=1e-10)


@pytest.mark.parametrize(
    "section, message",
    [
        (dict(name="vicreg", of=("image",)), "one view is compared with nothing; give two views, or a picture and a"),
        (dict(name="swav", of=("crops",)), "`swav` needs `crops`, which neither the batch nor the model has"),
        (dict(name="byol", of=("views",)), "`byol` asks for the teacher `average`"),
        (dict(name="simsiam", projector=dict(norm="group")), "norm is `group`; expected one of: batch, layer, none"),
        (dict(name="simsiam", predictor=dict(hiden=3)), "predictor has no key `hiden`; did you mean `hidden`"),
        (dict(name="moco", projector=dict(norm="batch")), "norm is `batch`, which tells queries from keys"),
        (
            dict(name="projected_contrast", targets="cwcl"),
            "targets should be `identity` or a key of the batch, not soft",
        ),
        (dict(name="vicreg", of=("concept",)), r"`concept` has the shape \(6,\); expected pictures \[B, V, h, w, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        model = lookup.Lookup(TABLE, WIDTH)
        batch, tables = BATCH | {"concept": ROWS}, lookup.tables(size=TABLE, width=WIDTH)
        make = partial(objectives.make, objectives.build(section, model), model)
        jax.eval_shape(make, tables, batch, jax.random.key(0))
    assert "\n" not in str(error.value)
