"""Texts and images that match beside the own ones, against loops in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from tests.support.several_texts import GIVEN, IDS, SIZE, TEXTS, WIDTH, N
from vlm_jax.errors import UserError

RIGHT, WRONG = TEXTS[:, 1:], TEXTS[::-1, :1]
OTHERS = (np.arange(2 * N) + N).reshape(N, 2)
BATCH = {
    "image": IDS, "token_ids": TEXTS[:, 0], "paraphrases": RIGHT, "paraphrases_mask": GIVEN[:, 1:], "texts": WRONG,
    "similar": OTHERS[..., None, None, None],
}  # fmt: skip


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    return lookup.tables(size=SIZE, width=WIDTH)


def sets(params, images):
    """(of images [B, M], their matches, of texts [B, M'], their matches), of what counts."""
    own = np.arange(N)
    right = RIGHT.reshape(-1)[GIVEN[:, 1:].reshape(-1)]
    rows = np.repeat(own, 2)[GIVEN[:, 1:].reshape(-1)]
    texts = np.concatenate([TEXTS[:, 0, 0], WRONG.reshape(-1), right])
    of = np.concatenate([own, np.full(N, -1), rows])
    pictures, of_pictures = np.concatenate([IDS, OTHERS.reshape(-1)]), np.concatenate([own, np.repeat(own, 2)])
    if not images:
        pictures, of_pictures = IDS, own
    scores = lookup.logits_of(
        params, params["image"][IDS], params["text"][TEXTS[:, 0, 0]], params["text"][texts], params["image"][pictures]
    )
    return scores[0], own[:, None] == of, scores[1], own[:, None] == of_pictures


def any_by_hand(logits, own):
    return np.mean([np.log(np.sum(np.exp(x)) / np.sum(np.exp(x[m]))) for x, m in zip(logits, own, strict=True)])


def by_hand(params, penalty, images):
    of_images, own, of_texts, own_texts = sets(params, images)
    if penalty == "any_positive":
        return 0.5 * (any_by_hand(of_images, own) + any_by_hand(of_texts, own_texts))
    return lookup.LOSSES[penalty](of_images, of_texts, 1.0 * own, 1.0 * own_texts)


def test_rewritten():
    """Each penalty, softmax through the kernels too, with and without images."""
    kinds = {
        "any": ("any_positive", "similar"), "softmax": ("softmax", "similar"), "sigmoid": ("sigmoid", "similar"),
        "blocks": ("softmax", "similar"), "texts": ("sigmoid", None), "text_blocks": ("softmax", None),
    }  # fmt: skip
    terms = {
        name: dict(name="contrastive", penalty=penalty, negatives=dict(name="rewritten", images=images))
        for name, (penalty, images) in kinds.items()
    }
    for name in ("blocks", "text_blocks"):
        terms[name]["implementation"] = "blockwise"
    got = lookup.differentiate(dict(terms=terms), tables(), BATCH)
    lookup.check(got, lambda params, batch: sum(by_hand(params, *kind) for kind in kinds.values()), tables(), BATCH)
    for name, kind in kinds.items():
        np.testing.assert_allclose(got[1][f"{name}/loss"], by_hand(tables(), *kind), rtol=1e-12)
    for key in ("accuracy_image_to_text", "accuracy_text_to_image"):
        np.testing.assert_allclose(got[1][f"blocks/{key}"], got[1][f"softmax/{key}"], rtol=1e-6)


def test_without_keys_and_with_one_positive_it_is_the_contrastive_term():
    rewritten = lambda **options: dict(negatives=dict(name="rewritten", positives=None, **options))
    terms = dict(
        base={}, nothing=rewritten(negatives=None), texts=dict(negatives="texts"), wrong=rewritten(),
        any=dict(penalty="any_positive"),
    )  # fmt: skip
    terms = {name: dict(name="contrastive") | options for name, options in terms.items()}
    metrics = lookup.differentiate(dict(terms=terms), tables(), BATCH)[1]
    assert metrics["nothing/loss"] == metrics["base/loss"] and metrics["wrong/loss"] == metrics["texts/loss"]
    np.testing.assert_allclose(metrics["any/loss"], metrics["base/loss"], rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(positives="synonyms"), "`contrastive` needs `synonyms`, which"),
        (dict(images="texts"), r"`texts` has the shape \(5, 1, 1\); expected \[B, R, h, w, 3\]"),
    ],
)
def test_what_lacks_is_named(options, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(dict(negatives=dict(name="rewritten", **options)), tables(), BATCH)
    assert "\n" not in str(error.value)
