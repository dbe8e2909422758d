"""Multi-tag classification against loops in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from tests.support.several_texts import FIRST, GIVEN, IDS, SIZE, WIDTH, N
from vlm_jax import objectives
from vlm_jax.data import tokenizers
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.tags import first_equal

TAGS = np.array([[3, 5, 3], [5, 9, 7], [0, 0, 0], [2, 3, 9], [8, 9, 9]])  # picture 0 has tag 3 twice; picture 2 none
BATCH = {"image": IDS, "token_ids": IDS[:, None], "tags": TAGS[..., None], "tags_mask": GIVEN}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    return lookup.tables(size=SIZE, width=WIDTH)


def by_hand(params, scale):
    own = [{TAGS[i, k] for k in range(3) if GIVEN[i, k] and TAGS[i, k]} for i in range(N)]
    classes, losses = sorted(set().union(*own)), []
    for i in range(N):
        scores = {c: scale * params["image"][i] @ params["text"][c] for c in classes}
        log_sum = np.log(sum(np.exp(x) for x in scores.values()))
        if own[i]:
            losses.append(np.mean([log_sum - scores[c] for c in own[i]]))
    return np.mean(losses), own, classes


def test_tags():
    """Equal tags of the batch are one class; the learned and a given scale."""
    terms = dict(own=dict(name="tags"), given=dict(name="tags", scale=9.0))
    value = lambda params, batch: by_hand(params, np.exp(params["logit_scale"]))[0] + by_hand(params, 9.0)[0]
    run = lookup.program(dict(terms=terms), tables())
    got = run(tables(), BATCH)
    lookup.check(got, value, tables(), BATCH)
    _, own, classes = by_hand(tables(), 1.0)
    np.testing.assert_allclose(got[1]["own/tags"], np.mean(list(map(len, own))))
    assert got[1]["own/classes"] == len(classes)
    nothing = run(tables(), BATCH | {"tags": np.zeros_like(BATCH["tags"])})
    assert nothing[0] == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(nothing[2]))


def test_one_tag_is_the_half_of_the_contrastive_term():
    terms = dict(tags=dict(key="texts"), locked=dict(name="tags", key="texts", locked=True))
    loss, metrics, grads, _ = lookup.differentiate(dict(terms=terms), tables(), FIRST)
    params = tables()
    logits = np.exp(params["logit_scale"]) * params["image"][IDS] @ params["text"][FIRST["texts"][:, 0, 0]].T
    np.testing.assert_allclose(metrics["tags/loss"], lookup.cross_entropy(logits, np.eye(N)), rtol=1e-12)
    np.testing.assert_allclose(metrics["locked/loss"], metrics["tags/loss"], rtol=1e-14)
    np.testing.assert_allclose(loss, 2 * metrics["tags/loss"])
    of_texts = np.einsum("ij,id->jd", (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(N)) / N,
                         np.exp(params["logit_scale"]) * params["image"][IDS])  # fmt: skip
    np.testing.assert_allclose(grads["text"][FIRST["texts"][:, 0, 0]], of_texts, atol=1e-12)  # not twice: one is locked


def test_equal_rows():
    ids = np.array([[1, 2], [3, 1], [1, 2], [3, 1], [1, 3], [1, 2]])
    np.testing.assert_array_equal(first_equal(ids, np.ones(6, bool)), [0, 1, 0, 1, 4, 0])
    np.testing.assert_array_equal(first_equal(ids, np.array([0, 1, 1, 1, 1, 1], bool)), [2, 1, 2, 1, 4, 2])


def words(vocabulary, batch, tokenizer="emoji"):
    """(loss, metrics) of tags by the emoji's tokenizer, whose ids are rows of a table."""
    tokenizer = tokenizer and tokenizers.build(tokenizer)
    model = lookup.Lookup(3000, WIDTH)
    section = dict(name="tags", vocabulary=vocabulary, bos=False, eos=False)
    objective = objectives.build(section, model, tokenizer=tokenizer)
    value = jax.jit(lambda params, batch: objectives.value(objective, model, params, batch, None))
    return value(lookup.tables(size=3000, width=WIDTH), batch)


def test_a_vocabulary_has_more_classes():
    tokenizer = tokenizers.build("emoji")
    names = ["red", "big", "fox"]
    ids = tokenizer(names, 1, bos=False, eos=False)
    batch = {"image": IDS[:2], "token_ids": IDS[:2, None], "tags": ids[[[0], [1]]]}
    params = lookup.tables(size=3000, width=WIDTH)
    loss, metrics = words(names, batch)
    logits = np.exp(params["logit_scale"]) * params["image"][:2] @ params["text"][ids[:, 0]].T
    np.testing.assert_allclose(loss, lookup.cross_entropy(logits, np.eye(2, 3)), rtol=1e-12)
    assert metrics["tags/classes"] == 3


@pytest.mark.parametrize(
    ("vocabulary", "tokenizer", "message"),
    [
        (["red", "red"], "emoji", "config.objective.vocabulary: `red` has the tokens of `red`; leave one out"),
        (["red", ""], "emoji", "the tokenizer knows no word of the tag ``; leave it out"),
        (["red"], None, "config.objective.vocabulary needs the run's tokenizer; set config.tokenizer"),
    ],
)
def test_vocabularies_that_do_not_fit_are_named(vocabulary, tokenizer, message):
    batch = {"image": IDS[:2], "token_ids": IDS[:2, None], "tags": np.ones((2, 1, 1), int)}
    with pytest.raises(UserError, match=message) as error:
        words(vocabulary, batch, tokenizer)
    assert "\n" not in str(error.value)


def test_fields_that_lack_are_named():
    with pytest.raises(
        UserError, match="`tags` needs `tags`, which neither the batch nor the model has; the batch has: image, texts"
    ):
        lookup.differentiate(dict(name="tags"), tables(), FIRST)
