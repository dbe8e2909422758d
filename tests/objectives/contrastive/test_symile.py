"""Symile against loops in fp64; two modalities are CLIP."""

from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax.errors import UserError
from vlm_jax.objectives.outputs import fold

N, WIDTH = 4, 5
IDS = np.arange(N)
BATCH = {"image": IDS, "token_ids": IDS, "heard": np.array([True, False, True, True])}
THREE = ("image_embedding", "text_embedding", "audio_embedding")
RNG = jax.random.key(0)


class Rows(nn.Module):
    """Three tables, a row for each example."""

    outputs: ClassVar = {
        **{f"{name}_embedding": lambda o, name=name: o.params[name][o["image"]] for name in ("image", "text", "audio")},
        "scale": lambda o: jax.numpy.exp(o.params["logit_scale"]),
    }


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def tables():
    params = lookup.tables(size=N, width=WIDTH)
    own = {"objective": {"symile": {"missing_audio_embedding": {"vector": np.arange(1.0, WIDTH + 1)}}}}
    return params | {"audio": lookup.unit(np.random.default_rng(9).normal(size=(N, WIDTH)))} | own


def run(section):
    return lookup.differentiate({"name": "symile", **section}, tables(), BATCH, model=Rows(), rng=RNG)


def with_missing(params):
    vector = lookup.unit(params["objective"]["symile"]["missing_audio_embedding"]["vector"])
    return params | {"audio": np.where(BATCH["heard"][:, None], params["audio"], vector)}


def test_all_tuples_with_a_missing_modality():
    def by_hand(params, batch):
        params, scale, total = with_missing(params), np.exp(params["logit_scale"]), 0.0
        names = ("image", "text", "audio")
        for place in range(3):
            a, b, c = (params[names[(place + k) % 3]] for k in range(3))
            for i in range(N):
                logits = {(j, k): scale * np.sum(a[i] * b[j] * c[k]) for j in range(N) for k in range(N)}
                total += np.log(sum(np.exp(x) for x in logits.values())) - logits[i, i]
        return total / (3 * N)

    section = dict(of=THREE, negatives="all", present={"audio_embedding": "heard"})
    got = run(section)
    lookup.check(got, by_hand, tables(), BATCH)
    assert got[1]["symile/share_audio_embedding"] == 0.75


def test_shuffled_tuples():
    keys = [jax.random.fold_in(fold(RNG, "symile"), place) for place in range(3)]
    orders = [jax.random.permutation(jax.random.fold_in(key, 0), N) for key in keys]

    def by_hand(params, batch):
        scale, total, names = np.exp(params["logit_scale"]), 0.0, ("image", "text", "audio")
        for place, order in enumerate(orders):
            a, b, c = (params[names[(place + k) % 3]] for k in range(3))
            for i in range(N):
                logits = [scale * np.sum(a[i] * b[j] * c[i if i == j else order[j]]) for j in range(N)]
                total += np.log(np.sum(np.exp(logits))) - logits[i]
        return total / (3 * N)

    lookup.check(run(dict(of=THREE)), by_hand, tables(), BATCH)


@pytest.mark.parametrize("negatives", ["shuffled", "all"])
def test_two_modalities_are_clip(negatives):
    two = run(dict(of=THREE[:2], negatives=negatives))
    params = {key: tables()[key] for key in ("image", "text", "logit_scale")} | {"logit_bias": 0.0}
    clip = lookup.differentiate({}, params, BATCH | {"token_ids": IDS})
    np.testing.assert_allclose(two[0], clip[0], rtol=1e-14)
    for name in ("image", "text", "logit_scale"):
        np.testing.assert_allclose(two[2][name], clip[2][name], rtol=1e-12, atol=1e-15)


def test_three_modalities_tell_what_no_two_do():
    """XOR: rows (u, v, u v) with signs u, v. The product of all three is 1 for true rows, and any two are unrelated."""
    signs = np.array([[u, v, u * v] for u in (1, -1) for v in (1, -1)], float)
    embeddings = [np.repeat(sign[:, None], WIDTH, 1) / WIDTH ** (1 / 3) for sign in signs.T]
    params = tables() | dict(zip(("image", "text", "audio"), embeddings, strict=True))
    section = {"name": "symile", "of": THREE, "negatives": "all"}
    loss = lookup.differentiate(section, params, BATCH, model=Rows(), rng=RNG)[0]
    np.testing.assert_array_equal(signs.T @ signs / N, np.eye(3))
    # 16 tuples of which 8 have the sign of the anchor
    scale = np.exp(params["logit_scale"])
    np.testing.assert_allclose(loss, np.log(8 * np.exp(scale) + 8 * np.exp(-scale)) - scale, rtol=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(of=THREE, negatives="some"), "negatives is `some`; expected one of: shuffled, all"),
        (
            dict(of=THREE[:2], present={"audio_embedding": "heard"}),
            "present names `audio_embedding`, which is not comp",
        ),
        (dict(of=THREE, present={"audio_embedding": "seen"}), "`symile` needs `seen`, which neither the batch nor"),
        (dict(of=("image_embedding", "smell_embedding")), "`symile` needs `smell_embedding`, which neither the batch"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        run(section)
    assert "\n" not in str(error.value)
