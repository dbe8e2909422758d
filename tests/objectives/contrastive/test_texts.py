"""Terms on several texts of a picture, against loops in fp64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup
from tests.support.several_texts import BATCH, FIRST, GIVEN, IDS, SIZE, TEXTS, WIDTH, K, N, of_sets
from vlm_jax import objectives
from vlm_jax.errors import UserError


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    return lookup.tables(size=SIZE, width=WIDTH)


def logits_of(params, images, texts):
    return np.exp(params["logit_scale"]) * params["image"][images] @ params["text"][texts].T + params["logit_bias"]


KINDS = [("place", "softmax"), ("all", "softmax"), ("all", "sigmoid")]
TERMS = {f"{a}_{p}": dict(name="several_texts", among=a, penalty=p) for a, p in KINDS}


def several_by_hand(params, among, penalty):
    if among == "all":
        flat = np.flatnonzero(GIVEN)
        return of_sets(logits_of(params, IDS, flat + 1), IDS[:, None] == flat // K, penalty)
    values = []
    for k in range(K):
        rows = np.flatnonzero(GIVEN[:, k])
        values.append(len(rows) * of_sets(logits_of(params, rows, TEXTS[rows, k, 0]), np.eye(len(rows)) > 0, penalty))
    return np.sum(values) / GIVEN.sum()


def test_several_texts():
    """All four kinds at once: each value, and the gradient of their sum."""
    run = lookup.program(dict(terms=TERMS), tables())
    got = run(tables(), BATCH)
    lookup.check(got, lambda params, batch: sum(several_by_hand(params, *kind) for kind in KINDS), tables(), BATCH)
    for kind, name in zip(KINDS, TERMS, strict=True):
        np.testing.assert_allclose(got[1][f"{name}/loss"], several_by_hand(tables(), *kind), rtol=1e-12)
        np.testing.assert_allclose(got[1][f"{name}/texts"], GIVEN.sum() / N)
    padded = run(tables(), BATCH | {"texts": np.where(GIVEN[..., None], TEXTS, 0), "texts_mask": np.ones_like(GIVEN)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), padded[2], got[2])
    nothing = run(tables(), BATCH | {"texts_mask": np.zeros_like(GIVEN)})
    assert nothing[0] == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(nothing[2]))


def test_one_text_is_the_contrastive_term():
    targets = "concept"
    batch = FIRST | {"concept": np.array([0, 1, 0, 2, 3])}
    base = {f"base_{p}": dict(name="contrastive", penalty=p, targets=targets) for p in ("softmax", "sigmoid")}
    terms = base | {name: dict(options, targets=targets) for name, options in TERMS.items()}
    metrics = lookup.differentiate(dict(terms=terms), tables(), batch)[1]
    for (_, penalty), name in zip(KINDS, TERMS, strict=True):
        np.testing.assert_allclose(metrics[f"{name}/loss"], metrics[f"base_{penalty}/loss"], rtol=1e-13)
        accuracy = metrics[f"base_{penalty}/accuracy_image_to_text"]
        np.testing.assert_allclose(metrics[f"{name}/accuracy"], accuracy, rtol=1e-6)


PARAPHRASES = (("image", "texts:1"), ("text", "texts:0"), ("texts:0", "texts:1"))


def by_pairs(params, pairs, penalty):
    """The sum over pairs of the loss of the rows that have both."""
    total = 0.0
    of = {"image": (params["image"][IDS], IDS >= 0), "text": (params["text"][TEXTS[:, 0, 0]], IDS >= 0)}
    of |= {f"texts:{k}": (params["text"][TEXTS[:, k, 0]], GIVEN[:, k]) for k in range(K)}
    for first, second in pairs:
        rows = of[first][1] & of[second][1]
        logits = np.exp(params["logit_scale"]) * of[first][0][rows] @ of[second][0][rows].T + params["logit_bias"]
        total += of_sets(logits, np.eye(len(logits)) > 0, penalty)
    return total


class Pictures(lookup.Lookup):
    """With two class tokens."""

    outputs = lookup.Lookup.outputs | {
        "class_embeddings": lambda o: jnp.stack([o["image_embedding"], o.params["image"][o["image"] + N]], axis=1)
    }


def test_pairs():
    """Paraphrases; both class tokens with their captions; pictures and captions alone are the contrastive term."""
    pairs = (("image", "text"), ("image:1", "texts:1"))
    one = dict(pairs=(("image", "text"),))
    terms = dict(
        two=dict(name="two_captions", pairs=pairs),
        base=dict(name="contrastive"), one=dict(name="two_captions", **one), same=dict(name="paraphrases", **one),
    )  # fmt: skip

    terms |= {p: dict(name="paraphrases", penalty=p) for p in ("softmax", "sigmoid")}

    def by_hand(params, batch):
        second = params | {"image": params["image"][N:]}
        tips = by_pairs(params, pairs[:1], "softmax") + by_pairs(second, (("image", "texts:1"),), "softmax")
        rewritten = sum(by_pairs(params, PARAPHRASES, penalty) for penalty in ("softmax", "sigmoid"))
        return tips / 2 + 3 * by_pairs(params, pairs[:1], "softmax") + rewritten

    got = lookup.differentiate(dict(terms=terms), tables(), BATCH, model=Pictures(SIZE, WIDTH))
    lookup.check(got, by_hand, tables(), BATCH)
    for name in ("one", "same"):
        np.testing.assert_allclose(got[1][f"{name}/loss"], got[1]["base/loss"], rtol=1e-13)


def test_texts_are_encoded_once():
    """For all terms that read them."""
    calls, model = [], lookup.Lookup(SIZE, WIDTH)
    outputs = objectives.Outputs(model, tables(), BATCH)
    outputs.of("one").once("texts of texts", lambda o: calls.append(1))
    outputs.of("other").once("texts of texts", lambda o: calls.append(1))
    assert calls == [1]


@pytest.mark.parametrize(
    ("section", "batch", "message"),
    [
        (
            dict(key="sub_captions"),
            {},
            "`several_texts` needs `sub_captions`, which neither .* texts are made in data.ops",
        ),
        (dict(among="each"), {}, "config.objective.among is `each`; expected one of: place, all"),
        (dict(penalty="margin"), {}, "config.objective.penalty is `margin`; expected one of: softmax, sigmoid"),
        (dict(targets="cwcl"), {}, "config.objective.targets of several texts match or do not"),
        (dict(name="paraphrases", pairs=[("image",)]), {}, "config.objective.pairs is .*; expected pairs of names"),
        (
            dict(name="paraphrases", pairs=[("image", "texts:3")]),
            {},
            "names `texts:3`; there are 3 texts under `texts`",
        ),
        (dict(name="paraphrases", pairs=[("image", "audio")]), {}, "`paraphrases` needs `audio_embedding`"),
        ({}, {"texts": IDS}, r"`texts` is int64 \[5\]; expected token ids \[B, K, L\] or \[B, L\]"),
    ],
)
def test_what_lacks_is_named(section, batch, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(dict(name="several_texts") | section, tables(), BATCH | batch)
    assert "\n" not in str(error.value)
