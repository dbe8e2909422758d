"""Terms of one modality against loops in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.within import turned

N, WIDTH = 6, 5
IDS = np.arange(N)
CONCEPT = np.array([0, 1, 0, 2, -1, 1])
BATCH = {"image": IDS, "token_ids": IDS[:, None], "concept": CONCEPT}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables(classes=None):
    own = {}
    if classes:
        table = np.random.default_rng(4).normal(size=(classes, WIDTH))
        own = {"objective": {"arc_margin": {"prototypes": {"table": table}}}}
    return lookup.tables(size=N, width=WIDTH) | own


def cosine(a, b):
    return a @ b / np.sqrt(a @ a * (b @ b))


@pytest.mark.parametrize("of", [("image",), ("image", "text")])
def test_separation(of):
    anchor = np.random.default_rng(3).normal(size=(N, 4))

    def by_hand(params, batch):
        total, scale = 0.0, np.exp(params["logit_scale"])
        for z in (params[name] for name in of):
            for i in range(N):
                row = [(1 - cosine(anchor[i], anchor[j])) * z[i] @ z[j] for j in range(N)]
                row[i] = params["image"][i] @ params["text"][i]
                total += np.log(np.sum(np.exp(scale * np.array(row)))) - scale * row[i]
        return total / N / 2

    section, batch = dict(name="separation", of=of, anchor="anchor"), BATCH | {"anchor": anchor}
    lookup.check(lookup.differentiate(section, tables(), batch), by_hand, tables(), batch)


def test_separation_of_unrelated_texts_is_the_contrast_within_a_modality():
    """And of equal texts it pushes nothing apart."""
    params, section = tables(), dict(name="separation", of=("image",), anchor="anchor")
    logits = np.exp(params["logit_scale"]) * params["image"] @ params["image"].T
    np.fill_diagonal(logits, np.exp(params["logit_scale"]) * np.sum(params["image"] * params["text"], axis=1))
    got = lookup.differentiate(section, params, BATCH | {"anchor": np.eye(N)})
    np.testing.assert_allclose(got[0], lookup.cross_entropy(logits, np.eye(N)) / 2, rtol=1e-12)
    own = np.diag(logits)
    want = np.mean([np.log(np.exp(x) + N - 1) - x for x in own]) / 2
    np.testing.assert_allclose(
        lookup.differentiate(section, params, BATCH | {"anchor": np.ones((N, 1))})[0], want, rtol=1e-12
    )


def test_all_pairs():
    def by_hand(params, batch):
        z, values = params["image"], {1: [], 0: []}
        for i in range(N):
            for j in range(i):
                if min(CONCEPT[i], CONCEPT[j]) >= 0:
                    same = int(CONCEPT[i] == CONCEPT[j])
                    values[same].append((cosine(z[i], z[j]) - same) ** 2)
        return (np.mean(values[1]) + np.mean(values[0])) / 2

    lookup.check(lookup.differentiate(dict(name="class_pairs"), tables(), BATCH), by_hand, tables(), BATCH)


def test_drawn_pairs_are_of_the_row_s_class_or_of_others():
    """Two rows a class, two classes: the partner of the own class is known, the others are one of two."""
    batch = {key: value[:4] for key, value in BATCH.items()} | {"concept": np.array([0, 1, 0, 1])}
    z, section = tables()["image"], dict(name="class_pairs", draws=3)
    cosines = np.array([[cosine(a, b) for b in z] for a in z])
    objective = objectives.build(section, lookup.Lookup(N, WIDTH))
    run = jax.jit(lambda rng: objectives.value(objective, lookup.Lookup(N, WIDTH), tables(), batch, rng))
    lowest, highest = (f([cosines[i, j] for i, j in ((0, 1), (0, 3), (2, 1), (2, 3))]) for f in (min, max))
    values = []
    for seed in range(20):
        loss, metrics = run(jax.random.key(seed))
        np.testing.assert_allclose(metrics["class_pairs/positive"], (cosines[0, 2] + cosines[1, 3]) / 2, rtol=1e-12)
        assert lowest <= metrics["class_pairs/negative"] <= highest
        values.append(float(loss))
    assert len(set(values)) > 10
    np.testing.assert_allclose(
        np.mean(values), lookup.differentiate(dict(name="class_pairs"), tables(), batch)[0], rtol=0.1
    )


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_arc_margin(margin):
    section = dict(name="arc_margin", classes=3, margin=margin, scale=7.0)

    def by_hand(params, batch):
        table, values = params["objective"]["arc_margin"]["prototypes"]["table"], []
        for z, label in zip(params["image"], CONCEPT, strict=True):
            if label >= 0:
                angles = np.arccos([cosine(z, w) for w in table]) + margin * (np.arange(3) == label)
                assert angles.max() < np.pi
                logits = 7 * np.cos(angles)
                values.append(np.log(np.sum(np.exp(logits))) - logits[label])
        return np.mean(values)

    lookup.check(lookup.differentiate(section, tables(3), BATCH), by_hand, tables(3), BATCH)


def test_turning_by_nothing_changes_nothing_and_turning_lowers_everywhere():
    cosines = np.cos(np.linspace(0, np.pi, 41))
    assert turned(cosines, 0.0) is cosines
    after = turned(cosines, 0.5)
    assert np.all(np.diff(after) < 0) and np.all(after < cosines)
    np.testing.assert_allclose(after[:30], np.cos(np.arccos(cosines[:30]) + 0.5), atol=1e-6)
    assert np.all(np.isfinite(jax.vmap(jax.grad(lambda x: turned(x, 0.5)))(cosines)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="class_pairs", key="kind"), "config.objective: the key is `kind`, which the batch lacks"),
        (dict(name="class_pairs", draws=0), "draws is 0; expected at least 1"),
        (dict(name="arc_margin", classes=3, key="kind"), "the key is `kind`, which the batch lacks"),
        (dict(name="arc_margin", classes=3, margin=4.0), "margin is 4.0; expected an angle in radians"),
        (dict(name="separation", of=("audio",)), r"`of` is \['audio'\]; expected some of: image, text"),
        (dict(name="separation", anchor="meaning"), "`separation` needs `meaning`, which neither the batch nor"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(section, tables(), BATCH)
    assert "\n" not in str(error.value)


def test_a_class_without_prototype_stops_the_run():
    section = dict(name="arc_margin", classes=2)
    assert np.isnan(lookup.differentiate(section, tables(2), BATCH)[0])


Q = 2 * N
QUEUE = dict(size=10, teacher="momentum", teachers=dict(momentum=dict(decay=0.5)))


def memory():
    """A queue of two batches, of which one is filled, with two rows that have no class."""
    rng = np.random.default_rng(8)
    labels = rng.integers(-1, 3, Q)
    queue = {"kept": rng.normal(size=(Q, WIDTH)), "label": labels, "filled": np.arange(Q) < N, "next": np.int32(N)}
    return {"teachers": {"momentum": lookup.tables(seed=6, size=N, width=WIDTH)}, "terms": {"neighbours": queue}}


def leave_one_out(z, labels, bank, of_bank, k, temperature=0.1):
    losses = []
    for i in range(N):
        others = [(cosine(z[i], z[j]), labels[j]) for j in range(N) if j != i and labels[j] >= 0]
        others += [(cosine(z[i], x), y) for x, y in zip(bank, of_bank, strict=True) if y >= 0]
        same = [score for score, label in others if label == labels[i]]
        if labels[i] < 0 or not same:
            continue
        kth = sorted((score for score, _ in others), reverse=True)[: k or None][-1]
        near = [(s, y) for s, y in others if s >= kth or (y == labels[i] and s == max(same))]
        share = sum(np.exp(s / temperature) for s, y in near if y == labels[i])
        losses.append(-np.log(share / sum(np.exp(s / temperature) for s, _ in near)))
    return np.mean(losses)


@pytest.mark.parametrize("k", [1, 4, 50])
@pytest.mark.parametrize("options", [{}, QUEUE], ids=["batch", "queue"])
def test_neighbours(options, k):
    """Without and with a queue; k = 50 are all candidates: neighbourhood components."""
    state = memory() if options else None
    queue = memory()["terms"]["neighbours"]
    bank = (queue["kept"][:N], queue["label"][:N]) if options else ((), ())

    def by_hand(params, batch):
        return leave_one_out(params["image"], CONCEPT, *bank, k if k < 50 else 0)

    section = dict(name="neighbours", k=k, **options)
    got = lookup.differentiate(section, tables(), BATCH, state=state)
    lookup.check(got, by_hand, tables(), BATCH)
    assert 0 <= got[1]["neighbours/accuracy"] <= 1


def test_neighbours_of_one_class_cost_nothing():
    got = lookup.differentiate(dict(name="neighbours", k=2), tables(), BATCH | {"concept": np.zeros(N, int)})
    assert got[0] == 0 and not np.any(got[2]["image"])


def test_neighbours_keep_what_the_teacher_saw():
    section, state = dict(name="neighbours", **QUEUE), jax.tree.map(jax.numpy.asarray, memory())
    found = lookup.differentiate(section, tables(), BATCH, state=state)[3]
    objective = objectives.build(section, lookup.Lookup(N, WIDTH))
    queue = objectives.update(objective, state, tables(), found, None, 0)["terms"]["neighbours"]
    np.testing.assert_array_equal(queue["kept"][N:], state["teachers"]["momentum"]["image"])
    np.testing.assert_array_equal(queue["label"][N:], CONCEPT)
    with pytest.raises(UserError, match="k is 0, size is 0; expected at least 1 and at least 0"):
        objectives.build(dict(name="neighbours", k=0), lookup.Lookup(N, WIDTH))
