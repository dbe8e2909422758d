"""A budget of parameters: against a loop over all tau, and its limits."""

import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.params.budget import allocate

RANK, SHARE = 1, 0.25


def scores(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.exponential(size=shape) ** 2
    blocks = {"fc": {"kernel": draw(2, 6, 4) * np.array([[[1.0]], [[9.0]]]), "bias": draw(2, 4)}}
    loose = {"blocks_0": {"fc": {"kernel": draw(5, 5)}}, "token_embed": {"embedding": draw(3, 4)}, "tiny": draw(2)}
    return {"image": {"blocks": blocks}, "text": loose}


def parts(tree):
    """name, layer -> scores; the cost of a low-rank update, or of the whole vector, or None."""
    (kernels, biases), text = tree["image"]["blocks"]["fc"].values(), tree["text"]
    found = {("image/blocks/fc/kernel", i): (k, RANK * (6 + 4)) for i, k in enumerate(kernels)}
    found |= {("image/blocks/fc/bias", i): (b, 4) for i, b in enumerate(biases)}
    found["text/blocks_0/fc/kernel", 0] = text["blocks_0"]["fc"]["kernel"], RANK * (5 + 5)
    found["text/token_embed/embedding", 0] = text["token_embed"]["embedding"], None
    found["text/tiny", 0] = text["tiny"], 2
    return found


def by_hand(tree, tau):
    """(cost, {part: chosen scalars, or True for a whole one}) of the tau most sensitive scalars."""
    every = np.sort(np.concatenate([s.ravel() for s, _ in parts(tree).values()]))[::-1]
    cost, chosen = 0, {}
    for key, (s, whole) in parts(tree).items():
        mask = s >= every[tau - 1]
        if whole is not None and mask.sum() >= max(np.ceil(SHARE * whole), 1):
            cost, chosen[key] = cost + whole, True
        elif mask.any():
            cost, chosen[key] = cost + mask.sum(), mask
    return cost, chosen


@pytest.mark.parametrize("budget", [1, 5, 12, 23, 40, 1000])
def test_against_a_loop_over_tau(budget):
    tree = scores()
    size = sum(s.size for s, _ in parts(tree).values())
    cost, want = max((by_hand(tree, tau) for tau in range(1, size + 1)), key=lambda r: (r[0] <= budget) * r[0])
    if cost > budget:
        pytest.fail("no tau fits")
    found = allocate(tree, budget, RANK, SHARE)
    assert found.count == cost <= budget
    for (name, layer), (s, _) in parts(tree).items():
        of = lambda tree, name=name, layer=layer: tree[name][layer] if name.startswith("image/") else tree[name]
        chosen = want.get((name, layer), False)
        low_rank = bool(of(found.low_rank)) if name in found.low_rank else False
        assert low_rank == (chosen is True and name.endswith("kernel"))
        if not low_rank:
            mask = of(found.scalars) if name in found.scalars else np.zeros(s.shape, bool)
            np.testing.assert_array_equal(mask, np.broadcast_to(chosen, s.shape))


def test_limits():
    tree = scores()
    everything = allocate(tree, 10**6, rank=100)  # an update larger than the matrix is none
    assert not everything.low_rank and all(mask.all() for mask in everything.scalars.values())
    assert everything.count == sum(s.size for s, _ in parts(tree).values())
    few = allocate(tree, 3, RANK, share=1.0)
    assert few.count == 3 == sum(mask.sum() for mask in few.scalars.values())
    for options in (dict(rank=0), dict(rank=1, share=2.0)):
        with pytest.raises(UserError, match="expected 1 or more, and 0 to 1"):
            allocate(tree, 10, **options)
    with pytest.raises(UserError, match="a budget of 0 scalars trains nothing; the first choice takes"):
        allocate(tree, 0, RANK, SHARE)
