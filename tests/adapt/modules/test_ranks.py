"""AdaLoRA and AutoLoRA: their limits, what the budget and the selection leave, and the search against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.few_shot import NAMES, pictures, tuned
from vlm_jax.adapt.modules import ranks
from vlm_jax.adapt.modules.lora import lora
from vlm_jax.adapt.recipe import Inserted
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import by_place
from vlm_jax.models.insertions import low_rank
from vlm_jax.models.insertions.low_rank import LowRank


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)


def test_adalora_with_its_whole_budget_is_the_svd_form(base):
    where, begun = "image/.*/(query|value)", dict(rank=3, orthogonal=0.0)
    svd = tuned(base, Inserted((LowRank(where, 3, weights="singular"),)), pictures())
    same(tuned(base, ranks.adalora(base.model, where=where, budget=3, **begun), pictures()), svd)
    assert sum(low_rank.ranks(svd.params).values()).tolist() == [6, 6, 6]
    less = tuned(base, ranks.adalora(base.model, where=where, budget=1.5, every=1, **begun), pictures())
    assert sum(x.sum() for x in low_rank.ranks(less.params).values()) == 9  # 2 places of 3 blocks
    with pytest.raises(UserError, match="budget of adalora is 7; expected above 0, to the rank 6"):
        ranks.adalora(base.model, budget=7)


def test_orthogonality_by_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 4))
    want = 0.0
    for block in range(2):
        for i in range(3):
            for j in range(3):
                want += (sum(a[block, k, i] * a[block, k, j] for k in range(5)) - (i == j)) ** 2
                want += (sum(b[block, i, k] * b[block, j, k] for k in range(4)) - (i == j)) ** 2
    with jax.enable_x64(True):
        found = ranks.orthogonality({"a": jnp.asarray(a), "b": jnp.asarray(b)})
        np.testing.assert_allclose(found, want, rtol=1e-12)
        turned = {"a": jnp.linalg.qr(a)[0], "b": jnp.swapaxes(jnp.linalg.qr(np.swapaxes(b, 1, 2))[0], 1, 2)}
        np.testing.assert_allclose(ranks.orthogonality(turned), 0, atol=1e-20)


def test_autolora_trains_the_ranks_that_stay(base, monkeypatch):
    """A term of less than 1 / rank is 0 and stays 0; where all stay, it is LoRA, bit for bit."""
    given = dict(where="image/.*/(query|value)", rank=2)
    weights = {f"image/blocks/attn/{name}": np.full((3, 2), 0.5) for name in ("query", "value")}
    monkeypatch.setattr(ranks, "searched", lambda *args, **options: weights)
    plain = tuned(base, lora(base.model, **given), pictures())
    same(tuned(base, ranks.autolora(base.model, **given), pictures()), plain)
    weights["image/blocks/attn/value"][1] = 0.4, 0.6
    found = tuned(base, ranks.autolora(base.model, **given), pictures())
    counts = low_rank.ranks(found.params)
    assert [counts[place].tolist() for place in weights] == [[2, 2, 2], [2, 1, 2]]
    gone = by_place(found.params)["image/blocks/attn/value"]
    assert not np.any(gone["a"][1, :, 0]) and not np.any(gone["b"][1, 0])


class Quadratic(ranks.Search):
    """A loss that couples updates and selection."""

    def loss(self, leaves, own, w, token_ids, batch):
        return jnp.sum(jnp.square(own["v"] * jax.nn.softmax(w["w"]) - batch[0])) + jnp.sum(own["v"] ** 3 * w["w"])


@pytest.mark.parametrize("unrolled", [True, False])
def test_a_step_of_the_search_by_differences(unrolled):
    """The gradient of the held-out loss after one step of the updates, with that step's, in float64."""
    rng = np.random.default_rng(0)
    own, w, train, held = ({key: rng.normal(size=3)} for key in ("v", "w", "x", "x"))
    search = Quadratic(None, 0.1, 1e-2, unrolled)
    with jax.enable_x64(True):
        loss = lambda own, w, x: float(search.loss(None, {"v": jnp.asarray(own)}, {"w": jnp.asarray(w)}, None, (x,)))
        slope = lambda f, x: np.array([(f(x + e) - f(x - e)) / 2e-5 for e in 1e-5 * np.eye(3)])
        step = lambda w: own["v"] - 0.1 * slope(lambda v: loss(v, w, train["x"]), own["v"])
        adam = [tx.init(jax.tree.map(jnp.asarray, x)) for tx, x in zip(search.optimizers, (own, w), strict=True)]
        state = ranks._search_step(search, (own, w, *adam), None, None, (train["x"],), (held["x"],))
        if unrolled:
            want = slope(lambda w: loss(step(w), w, held["x"]), w["w"])
        else:
            want = slope(lambda w: loss(state[0]["v"], w, held["x"]), w["w"])
        mean = state[3][0].mu["w"]  # (1 - b1) g of Adam's first step
        np.testing.assert_allclose(10 * mean, want, rtol=1e-4, atol=1e-6)
        first = optax.adam(0.1).update({"v": slope(lambda v: loss(v, w["w"], train["x"]), own["v"])}, adam[0])[0]
        np.testing.assert_allclose(state[0]["v"], own["v"] + first["v"], rtol=1e-6)


def test_a_search_gives_weights_of_terms(base):
    """Of each block; they sum to 1, and leave 1 / rank."""
    options = dict(steps=2, held_out=0.3, rate=1e-2, selection_rate=1e-2, unrolled=False)
    module = LowRank("image/.*/value", 4, weights="selection")
    ((place, found),) = ranks.searched(base, module, *pictures(), NAMES, **options).items()
    assert place == "image/blocks/attn/value" and found.shape == (3, 4)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
    assert np.abs(found - 0.25).max() > 1e-4
    images, labels = pictures()
    with pytest.raises(UserError, match="autolora holds pictures out; 1 are too few"):
        ranks.searched(base, module, images[:1], labels[:1], NAMES, **options)
    for wrong in (dict(held_out=1.0), dict(search=0)):
        with pytest.raises(UserError, match="autolora"):
            ranks.autolora(base.model, **wrong)
