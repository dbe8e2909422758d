"""Sentences and patches against loops in fp64."""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from tests.support import lookup
from tests.support.several_texts import GIVEN, SIZE, TEXTS, WIDTH, K, N
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.sentences import Painter, Report, _hidden

P, M, WIDE = 4, 3, dict(width=4, heads=2, depth=1, mlp_dim=4)
FIELDS = WIDE | dict(pool="none", cross="after", dtype="float64")
REPORT, PAINTER = Report(**FIELDS, sentences=K), Painter(**FIELDS, pixels=12)


@jax.jit
def decoded(own, patches, real, hidden, said):
    """What `Report` and `Painter` make of all rows."""
    drawn = REPORT.apply({"params": own["report"]}, patches, real)
    return drawn, PAINTER.apply({"params": own["painter"]}, patches, hidden, said, GIVEN)


IMAGES = np.random.default_rng(7).normal(size=(N, 4, 4, 3))
IMAGES[:, 0, 0, 0] = np.arange(N)  # what a picture is looked up by
BATCH = {"image": IMAGES, "token_ids": TEXTS[:, 0], "texts": TEXTS, "texts_mask": GIVEN}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


class Tower(NamedTuple):
    patch: int = 2


class Pictures(lookup.Lookup):
    """With four patches each, of the table `patches` [size, P, width]."""

    image: Any = Tower()
    outputs = lookup.Lookup.outputs | {
        "patch_embeddings": lambda o: o.params["patches"][o["image"][:, 0, 0, 0].astype(int)]
    }


def tables(**parts):
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.normal(size=shape)
    dense = lambda a, b: {"kernel": draw(a, b), "bias": draw(b)}
    sides = [f"{side}_{part}" for side in ("sentence", "patch") for part in ("query", "key", "value")]
    own = {"cross": {name: dense(WIDTH, WIDTH) for name in sides}}
    own["predictor"] = {"fc1": dense(WIDTH, WIDTH // 2), "fc2": dense(WIDTH // 2, WIDTH)}
    own |= parts
    patches = lookup.unit(draw(SIZE, P, WIDTH))
    return lookup.tables(size=SIZE, width=WIDTH) | {"patches": patches, "objective": {"sentences": own}}


def decoders():
    """Drawn parameters of `Report` and `Painter`, and a bank."""
    rng, real = np.random.default_rng(3), np.ones((1, P), bool)
    patches, words = np.zeros((1, P, WIDTH)), np.zeros((1, K, WIDTH))
    made = {
        "report": jax.eval_shape(REPORT.init, jax.random.key(0), patches, real),
        "painter": jax.eval_shape(PAINTER.init, jax.random.key(0), patches, real, words, real[:, :K]),
    }
    drawn = {
        name: jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / 2, one["params"]) for name, one in made.items()
    }
    return drawn | {"bank": {"table": rng.normal(size=(M, WIDTH))}}


def dense(x, own):
    return x @ own["kernel"] + own["bias"]


def soft(x):
    return np.exp(x) / np.sum(np.exp(x))


def cross_by_hand(own, x, y):
    """What each row of x sees of y, x and y named."""
    (a, x), (b, y) = x, y
    seen = np.zeros((0, WIDTH))
    for row in x:
        q = dense(row, own[f"{a}_query"])
        weights = [1 / (1 + np.exp(-q @ dense(other, own[f"{b}_key"]) / WIDTH**0.5)) for other in y]
        values = [w * dense(other, own[f"{b}_value"]) for w, other in zip(weights, y, strict=True)]
        seen = np.vstack([seen, sum(values, np.zeros(WIDTH))])
    return seen


def parts_by_hand(params, constants, prototypes=False):
    """The parts, in loops; what `constants` say passes no gradient."""
    found = {name: [] for name in ("sentences", "patches", "bank", "report", "kl", "picture")}
    scale = np.exp(params["logit_scale"])

    def of_row(params, i):
        own, words = params["objective"]["sentences"], params["text"][TEXTS[i, GIVEN[i], 0]]
        said = words
        if prototypes:
            table = own["bank"]["table"]
            said = np.array([soft(table @ s / 0.9) @ table for s in words]).reshape(words.shape)
        patches = params["patches"][i]
        sides = ("sentence", said), ("patch", patches)
        return own, words, said, patches, cross_by_hand(own["cross"], *sides), cross_by_hand(own["cross"], *sides[::-1])

    own, rows = params["objective"]["sentences"], [i for i in range(N) if GIVEN[i].any()]
    if prototypes:
        padded, real = np.zeros((N, K, WIDTH)), np.ones((N, P), bool)
        for i in rows:
            padded[i, GIVEN[i]] = of_row(params, i)[2]
        hidden = np.asarray(_hidden(None, real, 0.5))
        decoders = {name: own[name] for name in ("report", "painter")}
        drawn_all, painted = map(np.asarray, decoded(decoders, params["patches"][:N], real, hidden, padded))
    for i in rows:
        own, words, said, patches, of_said, of_patches = of_row(params, i)
        _, _, _, still, _, of_still = of_row(constants, i)
        predict = lambda x, own=own: dense(np.maximum(dense(x, own["predictor"]["fc1"]), 0), own["predictor"]["fc2"])
        cosine = lambda a, b: a @ b / np.sqrt(a @ a * (b @ b))
        pairs = [(patches[n], of_still[n]) for n in range(P)] + [(of_patches[n], still[n]) for n in range(P)]
        found["patches"].append(-sum(cosine(predict(x), y) for x, y in pairs) / (2 * P))
        logits = scale * np.array([[cosine(a, b) for b in of_said] for a in said])
        both = [lookup.cross_entropy(x, np.eye(len(said))) for x in (logits, logits.T)]
        found["sentences"].append(np.mean(both))
        if not prototypes:
            continue
        found["bank"] += [np.mean(np.abs(a - b)) for a, b in zip(said, words, strict=True)]
        order = min(itertools.permutations(range(K)), key=lambda o: np.abs(drawn_all[i][list(o)] - padded[i]).sum())
        drawn = drawn_all[i][list(order)]
        found["report"].append(np.mean(np.abs(drawn - padded[i])))
        for s, q in zip(words, drawn[GIVEN[i]], strict=True):
            wanted, again = soft(own["bank"]["table"] @ s), soft(own["bank"]["table"] @ q)
            found["kl"].append(np.sum(wanted * np.log(wanted / again)))
        pixels = [IMAGES[i, r : r + 2, c : c + 2].reshape(-1) for r in (0, 2) for c in (0, 2)]
        pixels = [(x - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-6) for x in pixels]
        found["picture"].append(
            np.mean([np.mean(np.abs(painted[i, n] - pixels[n])) for n in np.flatnonzero(hidden[i])])
        )
    return {name: np.mean(values) for name, values in found.items() if values}


def test_prototypes_and_reconstruction():
    section = dict(name="sentences", prototypes=M, report=10.0, picture=1.0, decoder=WIDE)
    params = tables(**decoders())

    def value(moved, batch):
        parts = parts_by_hand(moved, params, prototypes=True)
        return (
            parts["sentences"]
            + parts["patches"]
            + 10 * parts["bank"]
            + 10 * parts["report"]
            + parts["kl"]
            + parts["picture"]
        )

    got = lookup.differentiate(section, params, BATCH, model=Pictures(SIZE, WIDTH))
    lookup.check(got, value, params, BATCH)


def test_alignment_and_a_bank_of_the_sentences():
    """Without prototypes; and at a low temperature each sentence is its own prototype, which changes nothing."""
    params = tables()
    bank = {"bank": {"table": params["text"]}}
    own = params["objective"]["sentences"]
    run = lambda section, params: lookup.differentiate(section, params, BATCH, model=Pictures(SIZE, WIDTH))
    base = run(dict(name="sentences"), params)
    lookup.check(base, lambda moved, batch: sum(parts_by_hand(moved, params).values()), params, BATCH)
    same = params | {"objective": {"sentences": own | bank}}
    got = run(dict(name="sentences", prototypes=SIZE, temperature=1e-4), same)
    np.testing.assert_allclose(got[0], base[0], rtol=1e-12)
    assert got[1]["sentences/bank"] < 1e-12


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(share=0.0), "config.objective.share is 0.0; expected a share of the patches"),
        (dict(temperature=0.0), "config.objective.temperature is 0.0; expected a number above 0"),
        (dict(decoder=dict(layers=2)), "config.objective.decoder has no key `layers`"),
        (dict(key="report"), "`sentences` needs `report`, which neither the batch nor the model has"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(dict(name="sentences") | section, tables(), BATCH, model=Pictures(SIZE, WIDTH))
    assert "\n" not in str(error.value)
