"""Targets: labels and soft weights against loops in fp64, and where they are the identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax.errors import UserError

N, WIDTH = 6, 5
IDS = np.arange(N)
BATCH = {"image": IDS, "token_ids": IDS[:, None]}
CONCEPT = np.array([0, 1, 0, 2, 0, 1])


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    return lookup.tables(size=N, width=WIDTH)


@pytest.mark.parametrize("penalty", lookup.LOSSES)
def test_labels(penalty):
    section = dict(targets=dict(name="labels", key="concept"), penalty=lookup.PENALTIES[penalty])
    params, batch = tables(), BATCH | {"concept": CONCEPT}
    same = np.array([[float(a == b) for b in CONCEPT] for a in CONCEPT])

    def by_hand(params, batch):
        return lookup.LOSSES[penalty](*lookup.logits_of(params, params["image"], params["text"]), same, same)

    got = lookup.differentiate(section, params, batch)
    lookup.check(got, by_hand, params, batch)
    by_name = lookup.differentiate(section | {"targets": "concept"}, params, batch)
    jax.tree.map(np.testing.assert_array_equal, by_name, got)


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_null_image(penalty):
    """Rows 1, 3 and 4 have the NULL image and texts that show nothing; all of them match."""
    visual = np.array([True, False, True, False, False, True])
    params, batch = tables(), BATCH | {"visual": visual}
    params["image"][~visual] = params["image"][1]
    same = np.array([[float(i == j or not (visual[i] or visual[j])) for j in IDS] for i in IDS])

    def by_hand(params, batch):
        return lookup.LOSSES[penalty](*lookup.logits_of(params, params["image"], params["text"]), same, same)

    section = dict(targets="null_image", penalty=penalty)
    lookup.check(lookup.differentiate(section, params, batch), by_hand, params, batch)


def test_a_null_image_for_no_text_is_the_identity():
    batch = BATCH | {"visual": np.ones(N, bool)}
    found = [lookup.differentiate(section, tables(), batch) for section in (dict(targets="null_image"), {})]
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize("penalty", ["softmax", "sigmoid"])
def test_cwcl(penalty):
    """Equation 4: the weights are similarities of what the anchor says, of any length."""
    anchor = np.random.default_rng(3).normal(size=(N, 4))
    section = dict(targets=dict(name="cwcl", anchor="anchor"), penalty=penalty)
    params, batch = tables(), BATCH | {"anchor": anchor}
    cosine = lambda p, q: sum(p * q) / np.sqrt(sum(p * p) * sum(q * q))
    weights = np.array([[(1 + cosine(p, q)) / 2 for q in anchor] for p in anchor])

    def by_hand(params, batch):
        of_images, of_texts = lookup.logits_of(params, params["image"], params["text"])
        return lookup.LOSSES[penalty](of_images, of_texts, weights, np.eye(N))

    lookup.check(lookup.differentiate(section, params, batch), by_hand, params, batch)


def test_the_weights_of_cwcl_have_no_gradient():
    """The anchors are the images' embeddings: the gradient is that of constant weights."""
    params = tables()
    own = lookup.differentiate(dict(targets="cwcl"), params, BATCH)
    section = dict(targets=dict(name="cwcl", anchor="anchor"))
    given = lookup.differentiate(section, params, BATCH | {"anchor": params["image"]})
    jax.tree.map(np.testing.assert_array_equal, own[:3], given[:3])


def test_cwcl_of_opposite_pictures_is_the_identity():
    params = lookup.tables(size=2, width=3)
    batch = {"image": IDS[:2], "token_ids": IDS[:2, None], "anchor": np.array([[1.0, 0], [-1, 0]])}
    soft = lookup.differentiate(dict(targets=dict(name="cwcl", anchor="anchor")), params, batch)
    hard = lookup.differentiate({}, params, batch)
    jax.tree.map(np.testing.assert_array_equal, soft[::2], hard[::2])
    for key in ("accuracy_image_to_text", "accuracy_text_to_image"):
        assert soft[1][f"contrastive/{key}"] == hard[1][f"contrastive/{key}"]


def test_accuracy_under_soft_weights_counts_the_text_that_fits_best():
    params = tables()
    shares = [
        lookup.differentiate(section, params, BATCH)[1]["contrastive/accuracy_image_to_text"]
        for section in ({}, dict(targets="cwcl"))
    ]
    of_images = params["image"] @ params["text"].T
    assert shares[0] < 1
    np.testing.assert_allclose(shares, np.mean(np.argmax(of_images, 1) == IDS), rtol=1e-6)


@pytest.mark.parametrize(
    "section, more, message",
    [
        (dict(targets="concept"), {}, "targets is `concept`, which the batch lacks; expected `identity` or one of: im"),
        (dict(targets="null_image"), {}, "targets is `visual`, which the batch lacks; expected `identity` or one of"),
        (dict(targets="concept"), {"concept": jnp.zeros((N, 2))}, r"`concept` has shape \(6, 2\) in the batch; expect"),
        (
            dict(targets=dict(name="cwcl", anchor="depth")),
            {},
            "`contrastive` needs `depth`, which neither the batch no",
        ),
        (dict(targets=dict(name="cwcl", teacher="dino")), {}, "asks for the teacher `dino`; config.objective.teachers"),
        (
            dict(targets=dict(name="cwcl", anchors="depth")),
            {},
            "config.objective.targets has no key `anchors`; did you",
        ),
    ],
)
def test_what_lacks_is_named(section, more, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(section, tables(), BATCH | more)
    assert "\n" not in str(error.value)


SAYS = {
    f"{name}/{output}": lookup.unit(np.random.default_rng(seed).normal(size=(N, width)))
    for name, width, seeds in (("a", 4, (7, 8)), ("b", 3, (9, 10)))
    for output, seed in zip(("image_embedding", "text_embedding"), seeds, strict=True)
}


def taught(scale):
    return dict(
        targets=dict(name="affinities", teachers=("a", "b"), scale=scale),
        teachers={name: dict(spec="x", stored=True) for name in "ab"},
    )


def test_affinities():
    """Targets are the mean of the teachers' softmaxes, over texts for each image and over images for each text."""
    params, batch = tables(), BATCH | SAYS
    weights = np.zeros((2, N, N))
    for name in "ab":
        logits = 7 * SAYS[f"{name}/image_embedding"] @ SAYS[f"{name}/text_embedding"].T
        for i in IDS:
            for j in IDS:
                weights[0, i, j] += np.exp(logits[i, j]) / np.exp(logits[i]).sum() / 2
                weights[1, i, j] += np.exp(logits[i, j]) / np.exp(logits[:, j]).sum() / 2

    def by_hand(params, batch):
        logits = lookup.logits_of(params, params["image"], params["text"])
        return lookup.softmax(*logits, weights[0], weights[1].T)

    lookup.check(lookup.differentiate(taught(7.0), params, batch), by_hand, params, batch)


def test_affinities_of_teachers_without_a_doubt_are_the_identity():
    batch = BATCH | {key: np.eye(N) for key in SAYS}
    certain, plain = (lookup.differentiate(section, tables(), batch) for section in (taught(1e6), {}))
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-13), certain[0], plain[0])
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-15), certain[2], plain[2])


def test_a_stored_teacher_that_said_nothing_is_named():
    with pytest.raises(
        UserError, match=r"teachers\.a is stored, and the batch has no `a/\.\.\.`, from config\.data\.rein"
    ):
        lookup.differentiate(taught(7.0), tables(), BATCH)
