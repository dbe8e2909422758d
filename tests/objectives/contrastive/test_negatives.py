"""Negatives: more texts and a queue, against loops in fp64, without any, and through the kernels."""

from functools import partial

import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax import objectives
from vlm_jax.errors import UserError

N, WIDTH, TABLE = 6, 5, 48
ROWS = np.arange(1, N + 1)  # row 0 of the table of texts is padding
BATCH = {"image": ROWS, "token_ids": ROWS[:, None], "texts": np.arange(7, 7 + 2 * N).reshape(N, 2, 1)}
BATCH["texts"][2, 1] = BATCH["texts"][4] = 0
TEXTS = dict(negatives=dict(name="texts", key="texts"))
MOMENTUM = dict(momentum=dict(decay=0.5))
QUEUE = dict(negatives=dict(name="queue", size=10), teachers=MOMENTUM)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables(seed=0, **options):
    return lookup.tables(seed, size=TABLE, width=WIDTH, **options)


def memory(section, params, batch):
    """(objective, model, memory at the start)"""
    model = lookup.Lookup(TABLE, WIDTH)
    objective = objectives.build({"name": "contrastive", **section}, model)
    return objective, model, objectives.make(objective, model, params, batch, jax.random.key(0))[1]


def filled(params, batch):
    """A queue whose first batch is full, and a teacher that is another than the model."""
    state = memory(QUEUE, params, batch)[2]
    teacher, one = tables(seed=1), state["terms"]["contrastive"]
    queue = {
        key: one[key].at[:N].set(tables(seed=2)[key.removeprefix("key_")][:N]) for key in ("key_image", "key_text")
    }
    queue |= {"filled": one["filled"].at[:N].set(True), "next": one["next"] + N}
    return {"terms": {"contrastive": queue}, "teachers": {"momentum": teacher}}


@pytest.mark.parametrize("penalty", lookup.LOSSES)
def test_texts(penalty):
    """Wrong for every image; those of padding alone do not count."""
    params, ids = tables(), BATCH["texts"].reshape(-1)
    own, none = np.eye(N), np.zeros((N, 2 * N))

    def by_hand(params, batch):
        images, texts = params["image"][ROWS], params["text"][ROWS]
        candidates = np.concatenate([texts, params["text"][ids]])
        of_images, of_texts = lookup.logits_of(params, images, texts, candidates)
        of_images[:, N:][:, ids == 0] = -np.inf
        return lookup.LOSSES[penalty](of_images, of_texts, np.concatenate([own, none], 1), own)

    got = lookup.differentiate(TEXTS | {"penalty": lookup.PENALTIES[penalty]}, params, BATCH)
    lookup.check(got, by_hand, params, BATCH)
    assert not np.any(got[2]["text"][0]) and np.all(got[2]["text"][7])


@pytest.mark.parametrize("penalty", [*lookup.PENALTIES.values(), "focal", "margin"], ids=str)
@pytest.mark.parametrize("targets", ["identity", "cwcl"])
def test_texts_of_padding_alone_are_none(penalty, targets):
    """Soft targets included, whose weights are multiplied by what does not count."""
    section, params = dict(penalty=penalty, targets=targets), tables()
    if (penalty, targets) == ("margin", "cwcl"):
        with pytest.raises(UserError, match="penalty needs targets that match or do not, such as `identity`, not soft"):
            lookup.differentiate(section, params, BATCH)
        return
    batch = BATCH | {"texts": np.zeros_like(BATCH["texts"])}
    want = lookup.differentiate(section, params, batch)
    got = lookup.differentiate(section | TEXTS, params, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15), got[:3], want[:3])


@pytest.mark.parametrize("penalty", lookup.LOSSES)
def test_queue(penalty):
    """Images and texts against the teacher's of this batch and of earlier ones."""
    params = tables()
    state, own, none = filled(params, BATCH), np.eye(N), np.zeros((N, 2 * N))
    teacher, queue = state["teachers"]["momentum"], state["terms"]["contrastive"]
    assert queue["filled"].shape == (2 * N,)  # whole batches

    def by_hand(params, batch):
        keys = {kind: np.concatenate([teacher[kind][ROWS], queue[f"key_{kind}"]]) for kind in ("image", "text")}
        given = params["image"][ROWS], params["text"][ROWS], keys["text"], keys["image"]
        logits = lookup.logits_of(params, *given)
        for one in logits:
            one[:, 2 * N :] = -np.inf  # not filled yet
        weights = np.concatenate([own, none], 1)
        return lookup.LOSSES[penalty](*logits, weights, weights)

    section = QUEUE | {"penalty": lookup.PENALTIES[penalty]}
    lookup.check(lookup.differentiate(section, params, BATCH, state=state), by_hand, params, BATCH)


@pytest.mark.parametrize("penalty", lookup.PENALTIES.values(), ids=str)
def test_an_empty_queue_of_the_model_s_own_is_the_batch(penalty):
    """A teacher that is the model at every step, and a queue that is empty: the value of in_batch, exactly."""
    section, params = dict(penalty=penalty), tables()
    own = QUEUE | section | {"teachers": dict(momentum=dict(decay=0.0))}
    state = memory(own, params, BATCH)[2]
    got, want = lookup.differentiate(own, params, BATCH, state=state), lookup.differentiate(section, params, BATCH)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-14), got[:2], want[:2])
    alone = section | {"negatives": dict(name="queue", size=10, teacher=None)}  # no teacher: the gradients as well
    got = lookup.differentiate(alone, params, BATCH, state={"terms": state["terms"]})
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15), got[:3], want[:3])


def test_the_ring_of_three_steps():
    """The queue holds the last batches as the teacher saw them, the oldest is overwritten; the teacher follows."""
    params, batches = tables(), [BATCH | {"image": ROWS + 8 * i, "token_ids": ROWS[:, None] + 8 * i} for i in range(3)]
    objective, model, state = memory(QUEUE, params, BATCH)
    teacher, seen = params, []
    for step, batch in enumerate(batches):
        found = objectives.value_and_grad(objective, model, params, batch, None, state=state)
        params = tables(seed=step + 1)
        seen.append({kind: teacher[kind][batch["image"]] for kind in ("image", "text")})
        state = objectives.update(objective, state, params, found[3], None, step)
        teacher = jax.tree.map(lambda a, p: (a + p) / 2, teacher, params)
    queue = state["terms"]["contrastive"]
    for kind in ("image", "text"):
        np.testing.assert_allclose(queue[f"key_{kind}"], np.concatenate([seen[2][kind], seen[1][kind]]), rtol=1e-12)
    assert queue["next"] == N and np.all(queue["filled"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), state["teachers"]["momentum"], teacher)


@pytest.mark.parametrize("negatives", ["texts", "queue"])
@pytest.mark.parametrize("penalty", lookup.PENALTIES.values(), ids=str)
def test_kernels_and_the_plain_form_agree(penalty, negatives):
    """With labels; gradients and accuracies as well."""
    params, batch = tables(dtype=np.float32), BATCH | {"concept": ROWS % 4}
    section = dict(penalty=penalty, targets="concept") | (TEXTS if negatives == "texts" else QUEUE)
    with jax.enable_x64(False):
        state = None
        if negatives == "queue":
            state = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, filled(params, batch))
        want = lookup.differentiate(section, params, batch, state=state)
        run = partial(lookup.differentiate, section | {"implementation": "blockwise"}, params, batch, state=state)
        if (penalty, negatives) == ("sigmoid", "queue"):
            with pytest.raises(
                UserError, match="support no sigmoid whose images and texts have candidates of their own"
            ):
                run()
            return
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=5e-6), run()[:3], want[:3])


def test_masked_examples_do_not_exist_beside_texts():
    """The mask is of the batch; more texts of examples that do not count are candidates all the same."""
    valid = ROWS % 3 > 0
    params, batch = tables(dtype=np.float32), BATCH | {"valid": valid}
    batch["texts"] = np.where(valid[:, None, None], batch["texts"], 0)
    with jax.enable_x64(False):
        want = lookup.differentiate(TEXTS, params, {key: rows[valid] for key, rows in batch.items()})
        got = lookup.differentiate(TEXTS | {"mask": "valid"}, params, batch)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-6, atol=5e-6), got[:3], want[:3])


@pytest.mark.parametrize(
    "section, message",
    [
        (TEXTS | {"penalty": "sigmoid", "similarity": "token_wise"}, "negatives need a similarity of one vector each"),
        (dict(negatives=dict(name="texts", key="wrong")), "`contrastive` needs `wrong`, which neither the batch nor"),
        (dict(negatives="queue"), "`contrastive` asks for the teacher `momentum`; config.objective.teachers has: none"),
        (dict(negatives=dict(name="queue", length=8)), "config.objective.negatives has no key `length`"),
        (dict(negatives="queues"), "config.objective.negatives is `queues`; expected one of: in_batch, texts, queue"),
    ],
)
def test_mistakes_are_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(section, tables(), BATCH)
    assert "\n" not in str(error.value)


def test_a_teacher_of_another_width_is_named():
    """A checkpoint whose embeddings cannot be compared with the model's."""
    model = lookup.Lookup(TABLE, WIDTH)
    section = dict(name="contrastive", negatives="queue", teachers=dict(momentum=dict(spec="runs/other")))
    other = type("Loaded", (), dict(model=lookup.Lookup(TABLE, 7), params=lookup.tables(size=TABLE, width=7)))
    objective = objectives.build(section, model, load=lambda spec: other)
    run = partial(objectives.make, objective, model, tables(), BATCH, jax.random.key(0), objectives.frozen(objective))
    with pytest.raises(UserError, match="the teacher's embeddings have 7 dimensions, the model's 5"):
        run()
