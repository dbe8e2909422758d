"""Tokens that see a part follow tokens that see the whole: the formulas as loops, limiting cases."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.masked_tokens import TokenDecoder, check_grid, parts, token_contrast
from vlm_jax.objectives.generative.masked_words import hide
from vlm_jax.objectives.outputs import fold

B, N, L = 4, 4, 5
SIZES = dict(width=8, depth=1, heads=2, mlp_dim=8, dtype="float64")


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 12, (B, L))
    ids[1, 3:] = 0
    pictures = lambda: jnp.asarray(rng.normal(size=(B, 4, 4, 3)))
    return {"image": pictures(), "other": pictures(), "token_ids": jnp.asarray(ids)}


def draw(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5), jnp.float64), tree)


def begin(section, **more):
    """(objective, parameters, state), none of them as they begin."""
    objective = objectives.build(section | more, Towers())
    params = initial(Towers(), batch()["image"], batch()["token_ids"])
    made = jax.eval_shape(partial(objectives.make, objective, Towers()), params, batch(), jax.random.key(0))
    return objective, draw(made[0], 1), made[1] and draw(made[1], 2)


def keys():
    of_rows = fold(jax.random.key(5), "rows batch")
    return jax.vmap(lambda i: jax.random.fold_in(of_rows, i))(jnp.arange(B))


def evaluate(objective, params, state):
    run = partial(objectives.value_and_grad, objective, Towers(), rng=jax.random.key(5), state=state, accumulate=2)
    return jax.jit(run)(params, batch())[:3]


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def tokens(params, image, of="patch_embeddings"):
    model = {name: leaf for name, leaf in params.items() if name != "objective"}
    found = np.asarray(Towers().apply({"params": model}, image, None).image_tokens)
    return (
        found if of == "patch_tokens" else unit(found @ params["image_head"]["kernel"] + params["image_head"]["bias"])
    )


@pytest.mark.parametrize("of", ["patch_embeddings", "patch_tokens"])
def test_seen_tokens_follow_a_teacher_that_sees_all(of):
    teacher = dict(t=dict(decay=0.9, inputs=dict(image="other")))
    section = dict(name="unmasked_tokens", teacher="t", of=of)
    objective, params, state = begin(section, teachers=teacher)
    value, _, grads = evaluate(objective, params, state)
    own, taught = tokens(params, batch()["image"], of), tokens(state["teachers"]["t"], batch()["other"], of)
    kept, losses = np.asarray(parts(keys(), B, N, 0.5)[1]), []
    assert kept.shape == (B, 2) and len({tuple(row) for row in kept}) > 1
    for i in range(B):
        pairs = [(own[i, n], taught[i, n]) for n in kept[i]]
        if of == "patch_embeddings":  # the class tokens of `Towers` are the first two that it sees
            pairs += [(own[i, n], taught[i, k]) for k, n in enumerate(kept[i])]
        losses.append(np.mean([1 - unit(s) @ unit(t) for s, t in pairs]))
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-9)
    assert np.any(grads["image_fc"]["kernel"]) and not np.any(grads["embed"]["embedding"])


def test_a_teacher_that_is_the_model_is_followed():
    """Where no patch sees another, as in `Towers`."""
    teachers = dict(t=dict(decay=0.9))
    section = dict(name="unmasked_tokens", teacher="t", of="patch_tokens", teachers=teachers)
    objective, params, _ = begin(section)
    np.testing.assert_allclose(evaluate(objective, params, {"terms": {}, "teachers": {"t": params}})[0], 0, atol=1e-12)


def contrast(own, clean, hidden, real=None):
    """Loops over hidden units (i, n), and over all units (j, m)."""
    real = np.ones((B, len(clean[0])), bool) if real is None else real
    units = [(j, m) for j in range(B) for m in range(len(clean[0])) if real[j, m]]
    losses = []
    for i, n in hidden:
        scores = {at: own[i, n] @ clean[at] / 0.4 for at in units}
        losses.append(np.log(sum(map(np.exp, scores.values()))) - scores[i, n])
    return np.mean(losses)


def test_hidden_patches_are_told_from_all_patches():
    objective, params, state = begin(dict(name="denoising_contrast", share=0.5, decoder=SIZES))
    value, metrics, grads = evaluate(objective, params, state)
    hidden, kept = map(np.asarray, parts(keys(), B, N, 0.5))
    assert all(sorted([*a, *b]) == [0, 1, 2, 3] for a, b in zip(hidden, kept, strict=True))
    clean = tokens(params, batch()["image"], "patch_tokens")
    decode = TokenDecoder(**SIZES, pool="none", out=clean.shape[-1])
    seen = np.take_along_axis(clean, kept[..., None], axis=1)
    made = decode.apply({"params": params["objective"]["denoising_contrast"]["decoder"]}, seen, kept, N)
    want = contrast(unit(made), unit(clean), [(i, n) for i in range(B) for n in hidden[i]])
    np.testing.assert_allclose(value, want, rtol=1e-9)
    assert 0 <= metrics["denoising_contrast/accuracy"] <= 1 and np.any(grads["image_fc"]["kernel"])


def test_hidden_words_are_told_from_all_words():
    objective, params, state = begin(dict(name="denoising_contrast", of="text", share=0.5, mask_id=13))
    value, _, grads = evaluate(objective, params, state)
    ids, table = np.asarray(batch()["token_ids"]), np.asarray(params["embed"]["embedding"])
    hidden, seen = map(np.asarray, hide(ids, ids != 0, keys(), 0.5, 13, 14))
    assert 2 < hidden.sum() < B * L and not hidden[1, 3:].any()
    want = contrast(unit(table[seen]), unit(table[ids]), np.argwhere(hidden).tolist(), ids != 0)
    np.testing.assert_allclose(value, want, rtol=1e-9)
    assert not np.any(grads["image_fc"]["kernel"])


def test_a_teacher_with_other_patches_is_named():
    model = SimpleNamespace(image=SimpleNamespace(patch=8))
    check_grid(model, np.zeros((2, 16, 24, 3)), 6)
    with pytest.raises(UserError, match="the model has 6 patches, the teacher 4; expected as many"):
        check_grid(model, np.zeros((2, 16, 24, 3)), 4)
    with pytest.raises(UserError, match="masked tokens are of pictures of one size; these are packed"):
        check_grid(model, dict(patches=np.zeros((2, 6, 192)), grid=np.ones((2, 2), int)), 6)


def test_one_unit_a_row_is_half_of_clip():
    rng = np.random.default_rng(0)
    own, clean = (jnp.asarray(unit(rng.normal(size=(B, 1, 6)))) for _ in range(2))
    value, accuracy = token_contrast(3.0, own, clean, jnp.zeros((B, 1), jnp.int32))
    logits = 3.0 * own[:, 0] @ clean[:, 0].T
    np.testing.assert_allclose(value, -np.mean(np.diag(jax.nn.log_softmax(logits))), rtol=1e-12)
    np.testing.assert_allclose(accuracy, np.mean(logits.argmax(1) == np.arange(B)), rtol=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="unmasked_tokens", of="words"), "of is `words`; expected one of: patch_embeddings, patch_tokens"),
        (dict(name="unmasked_tokens", share=0.9), "share is 0.9 of 4 tokens; expected that one is hi"),
        (dict(name="denoising_contrast", share=0.1), "share is 0.1 of 4 tokens"),
        (dict(name="denoising_contrast", of="text"), "mask_id is None with of=`text`"),
        (dict(name="denoising_contrast", of="text", mask_id=13, share=0), "share is 0; expected a share of the tokens"),
        (dict(name="denoising_contrast", decoder=dict(out=3)), "config.objective.decoder has no key `out`"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        begin(section, teachers=dict(teacher=dict(decay=0.9)))
    assert "\n" not in str(error.value)
