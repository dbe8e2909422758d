"""Selections: the rows of a super-batch that the paper's algorithm draws, and what a whole batch gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import lookup
from tests.support.lookup import Lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError

N, WIDTH = 20, 5
BATCH = {"image": np.arange(N), "token_ids": np.arange(N)[:, None], "concept": np.arange(N) % 13}


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def build(terms=None, **options):
    section = dict(
        terms=terms or dict(contrastive=dict(on="chosen")),
        selections=dict(chosen=dict(name="learnability", **options)),
        teachers=dict(reference=dict(decay=1.0)),
    )
    return objectives.build(section, Lookup(N, WIDTH))


def memory():
    return {"terms": {}, "teachers": {"reference": lookup.tables(seed=1, size=N, width=WIDTH)}}


def drawn(objective, rng):
    """The rows that the selection draws."""
    part = objectives.sum.Sum(objective, Lookup(N, WIDTH), BATCH, rng, state=memory())
    return np.asarray(part.encode_all(lookup.tables(size=N, width=WIDTH))[1]["chosen"]["image"].index)


def by_loops(share, chunks, rngs):
    """Algorithm 1 of arXiv:2406.17711 with a sigmoid loss, of one group; draws by Gumbel noise."""
    losses = []
    for params in (lookup.tables(size=N, width=WIDTH), memory()["teachers"]["reference"]):
        logits, _ = lookup.logits_of(params, params["image"], params["text"])
        losses.append([[np.logaddexp(0, -x if i == j else x) for j, x in enumerate(r)] for i, r in enumerate(logits)])
    scores, chosen = np.array(losses[0]) - np.array(losses[1]), []
    wanted = round(share * N)
    for chunk in range(chunks):
        gain = [scores[i, i] + sum(scores[i, j] + scores[j, i] for j in chosen) for i in range(N)]
        noisy = np.array(gain) + np.asarray(jax.random.gumbel(rngs[chunk], (N,), jnp.float64))
        left = [i for i in np.argsort(-noisy) if i not in chosen]
        chosen += [int(i) for i in left[: wanted // chunks + (chunk < wanted % chunks)]]
    return chosen


@pytest.mark.parametrize("share, chunks", [(0.2, 2), (0.5, 4), (0.5, 1)])
def test_learnability_draws_as_the_paper(share, chunks):
    objective, rng = build(share=share, chunks=chunks), jax.random.key(3)
    rngs = jax.random.split(objectives.outputs.fold(rng, "chosen"), chunks)
    np.testing.assert_array_equal(drawn(objective, rng), by_loops(share, chunks, rngs))


def test_more_rounds_than_rows():
    assert len(set(drawn(build(share=0.2, chunks=16), jax.random.key(0)))) == 4


def test_groups_draw_among_their_own_rows():
    """And the term sees these rows."""
    objective, rng = build(share=0.5, chunks=2, groups=2), jax.random.key(0)
    index = drawn(objective, rng).reshape(2, 5)
    assert index.max() < 10 and all(len(set(part)) == 5 for part in index)
    params = lookup.tables(size=N, width=WIDTH)
    run = jax.jit(partial(objectives.value_and_grad, objective, Lookup(N, WIDTH), params, state=memory()))
    _, _, grads, features = run(BATCH, rng)
    seen = np.asarray(features["chosen"]["contrastive"]["image"])
    rows = (index + np.array([[0], [10]])).reshape(-1)
    np.testing.assert_array_equal(seen, params["image"][rows])
    assert sorted(rows) == list(np.flatnonzero(np.any(grads["image"], axis=1)))  # no gradient by the choice


@pytest.mark.parametrize("targets", ["identity", "concept"])
def test_all_rows_in_another_order_are_the_batch(targets):
    """Labels included, which come along."""
    params, rng = lookup.tables(size=N, width=WIDTH), jax.random.key(0)
    objective = build(dict(contrastive=dict(on="chosen", targets=targets)), share=1.0)
    assert sorted(drawn(objective, rng)) == list(range(N)) != list(drawn(objective, rng))
    got = objectives.value_and_grad(objective, Lookup(N, WIDTH), params, BATCH, rng, state=memory())
    want = lookup.differentiate(dict(targets=targets), params, BATCH)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15), got[:3], want[:3])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(share=0), "config.objective.selections: share is 0; expected a number above 0, up to 1"),
        (dict(share=1.5), "share is 1.5; expected"),
        (dict(groups=3), "config.objective: the selection `chosen` has 3 groups, which do not divide 20 rows"),
        (dict(teacher="best"), "`chosen` asks for the teacher `best`; config.objective.teachers has: reference"),
        (dict(chunk=3), "config.objective.selections.chosen has no key `chunk`; did you mean `chunks`"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message) as error:
        drawn(build(**options), jax.random.key(0))
    assert "\n" not in str(error.value)
