"""Pictures as a text sees them, against loops in fp64."""

import jax
import numpy as np
import pytest

from tests.support import lookup
from tests.support.several_texts import BATCH, FIRST, GIVEN, SIZE, TEXTS, WIDTH, K, N, of_sets
from vlm_jax.errors import UserError
from vlm_jax.objectives.contrastive.conditioned import _drawn, grouped
from vlm_jax.objectives.outputs import fold

P = 4  # patches
RNG = jax.random.key(3)


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


class Patches(lookup.Lookup):
    """Pictures are rows of the table `patches` as well, [size, P, width]."""

    outputs = lookup.Lookup.outputs | {"patch_embeddings": lambda o: o.params["patches"][o["image"]]}


def tables(patches=P, pools=()):
    """The last patch of picture 1 is padding; `pools`: terms that have the parameters of `TextPool`."""
    rng = np.random.default_rng(2)
    table = lookup.unit(rng.normal(size=(SIZE, patches, WIDTH)))
    table[1, P - 1 :] = 0
    draw = lambda *shape: rng.normal(size=shape) / 2
    layer = lambda: {"kernel": draw(WIDTH, WIDTH), "bias": draw(WIDTH)}
    norm = lambda: {"scale": 1 + draw(WIDTH), "bias": draw(WIDTH)}
    attn = lambda: {name: layer() for name in ("query", "key", "value", "out")}
    own = {name: {"pool": {"query_norm": norm(), "norm": norm(), "attn": attn()}} for name in pools}
    return lookup.tables(size=SIZE, width=WIDTH) | {"patches": table} | ({"objective": own} if pools else {})


def sparse_by_hand(text, patches, threshold):
    products = patches @ text
    scaled = [(x - min(products)) / (max(products) - min(products)) for x in products]
    weights = np.array([x if x >= threshold else 0.0 for x in scaled])
    return (weights / weights.sum()) @ patches


def attention_by_hand(text, patches, own, heads):
    """Softmax over the patches and a zero, head by head."""

    def norm(x, part):
        return part["scale"] * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + part["bias"]

    def dense(x, name):
        return x @ own["attn"][name]["kernel"] + own["attn"][name]["bias"]

    query = dense(norm(text, own["query_norm"]), "query")
    keys, values = (
        np.array([dense(norm(v, own["norm"]), name) for v in patches] + [np.zeros(WIDTH)]) for name in ("key", "value")
    )
    seen = []
    for h in np.split(np.arange(WIDTH), heads):
        weights = np.exp(keys[:, h] @ query[h] / np.sqrt(len(h)))
        seen.append(weights / weights.sum() @ values[:, h])
    return dense(np.concatenate(seen), "out")


def patches_of(params, i):
    return params["patches"][i][: P - (i == 1)]  # without padding


def text_of(params, i, k):
    return params["text"][TEXTS[i, k, 0]]


WHERE = [(i, k) for i in range(N) for k in range(K) if GIVEN[i, k]]


def grouping_by_hand(params, among, scale):
    groups, texts = [], []
    for i, k in WHERE:
        patches = patches_of(params, i)
        groups.append(lookup.unit(sparse_by_hand(text_of(params, i, k), patches, 1 / len(patches))))
        texts.append(text_of(params, i, k))
    logits = scale * np.array(groups) @ np.array(texts).T
    if among == "batch":
        return of_sets(logits + params["logit_bias"], np.eye(len(WHERE)) > 0, "softmax")
    total = 0.0
    for i in range(N):
        own = [p for p, (j, _) in enumerate(WHERE) if j == i]
        if own:
            total += len(own) * of_sets(logits[np.ix_(own, own)], np.eye(len(own)) > 0, "softmax")
    return total / len(WHERE)


def test_grouping():
    terms = dict(batch=dict(name="grouping", scale=7.0), picture=dict(name="grouping", among="picture"))

    def by_hand(params, batch):
        return grouping_by_hand(params, "batch", 7.0) + grouping_by_hand(
            params, "picture", np.exp(params["logit_scale"])
        )

    got = lookup.differentiate(dict(terms=terms), tables(), BATCH, model=Patches(SIZE, WIDTH))
    lookup.check(got, by_hand, tables(), BATCH)


def test_conditioned():
    """Both pools; one of them sees three texts at a time."""
    pools = {"attention": dict(name="attention", heads=2), "sparse": dict(name="sparse", threshold=0.4)}
    terms = {name: dict(name="conditioned", pool=pool) for name, pool in pools.items()}
    terms["attention"]["chunk"] = 3
    params = tables(pools=("attention",))
    given = np.asarray(GIVEN)

    def by_hand(params, batch):
        total, own = 0.0, params["objective"]["attention"]["pool"]
        pool = {
            "attention": lambda t, v: attention_by_hand(t, v, own, 2),
            "sparse": lambda t, v: sparse_by_hand(t, v, 0.4),
        }
        for name in terms:
            drawn, losses = np.asarray(_drawn(given, fold(RNG, name))) % K, []
            for i in range(N):
                pairs = [(i, k, 1) for k in range(K)] + [(j, drawn[i, j], -1) for j in range(N) if j != i]
                for j, k, z in pairs:
                    if given[j, k]:
                        text = text_of(params, j, k)
                        seen = lookup.unit(pool[name](text, patches_of(params, i)))
                        x = np.exp(params["logit_scale"]) * seen @ text + params["logit_bias"]
                        losses.append(np.logaddexp(0, -z * x))
            total += N * np.mean(losses)
        return total

    got = lookup.differentiate(dict(terms=terms), params, BATCH, model=Patches(SIZE, WIDTH), rng=RNG)
    lookup.check(got, by_hand, params, BATCH)


def test_one_text_and_one_patch_are_the_contrastive_term():
    terms = dict(
        clip=dict(name="contrastive"), siglip=dict(name="contrastive", penalty="sigmoid"), grouping={},
        conditioned=dict(pool="sparse"),
    )  # fmt: skip
    params = tables(patches=1)
    params["image"] = params["patches"][:, 0]
    metrics = lookup.differentiate(dict(terms=terms), params, FIRST, model=Patches(SIZE, WIDTH))[1]
    np.testing.assert_allclose(metrics["grouping/loss"], metrics["clip/loss"], rtol=1e-11)
    np.testing.assert_allclose(metrics["conditioned/loss"], metrics["siglip/loss"], rtol=1e-11)


def test_weights_of_patches():
    """At the threshold 1 the best patch alone; equal patches equally; padding never."""
    x, real = np.array([0.1, 0.5, 0.3, 0.9]), np.array([True, True, True, False])
    np.testing.assert_allclose(grouped(x, real, 1.0), [0, 1, 0, 0])
    np.testing.assert_allclose(grouped(x, real, 0.0), [0, 2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(grouped(x, real), [0, 2 / 3, 1 / 3, 0])  # 0.5 is above 1 / 3
    np.testing.assert_allclose(grouped(np.full(4, 0.2), real, 0.5), [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(name="grouping", among="all"), "config.objective.among is `all`; expected one of: batch, picture"),
        (dict(name="grouping", pool="mean"), "config.objective.pool is `mean`; expected one of: attention, sparse"),
        (dict(name="grouping", pool=dict(name="sparse", threshold=2)), "pool.threshold is 2; expected 0 to 1"),
        (dict(name="conditioned", pool=dict(name="sparse", heads=2)), "config.objective.pool has no key `heads`"),
        (dict(name="conditioned", pool=dict(name="attention", heads=4)), "pool: 4 heads do not divide embeddings of 6"),
        (dict(name="conditioned", key="sub_captions"), "`conditioned` needs `sub_captions`, which"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message) as error:
        lookup.differentiate(section, tables(pools=("conditioned",)), BATCH, model=Patches(SIZE, WIDTH))
    assert "\n" not in str(error.value)
