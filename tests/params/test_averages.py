import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import bits, close
from vlm_jax.errors import UserError
from vlm_jax.params import averages, diffs, masks, regularizers

assert_close = functools.partial(close, rtol=1e-6, atol=1e-6)


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"image": {"kernel": draw(4, 3), "bias": draw(3)}, "logit_scale": draw()}


OTHER = tree(0) | {"image": {"kernel": np.zeros((4, 3), np.float32), "bias": np.zeros(2, np.float32)}}


def test_wise_ft():
    base, tuned = tree(0), tree(1)
    base["image"]["bias"][:2] = -0.0, 1.0
    tuned["image"]["bias"][:2] = np.nan, -0.0
    assert bits(averages.wise_ft(base, tuned, 0.0)) == bits(base)
    assert bits(averages.wise_ft(base, tuned, 1.0)) == bits(tuned)
    base, tuned = tree(0), tree(1)
    expected = jax.tree.map(lambda b, t: np.float32(0.75) * b + np.float32(0.25) * t, base, tuned)
    assert_close(averages.wise_ft(base, tuned, 0.25), expected)
    line = jax.jit(jax.vmap(averages.wise_ft, in_axes=(None, None, 0)))(base, tuned, jnp.array([0.0, 0.25, 1.0]))
    assert_close(jax.tree.map(lambda x: x[1], line), expected)
    assert bits(jax.tree.map(lambda x: x[0], line)) == bits(base)
    assert bits(jax.tree.map(lambda x: x[2], line)) == bits(tuned)


def test_uniform_soup():
    trees = [tree(i) for i in range(5)]
    assert_close(averages.uniform_soup(trees), jax.tree.map(lambda *x: np.mean(x, axis=0), *trees))
    assert bits(averages.uniform_soup(trees[:1])) == bits(trees[0])
    assert bits(averages.uniform_soup([trees[0]] * 4)) == bits(trees[0])


def brute_force(trees, score):
    """Recipe 1 over all subsets' scores, of float64 means by numpy."""
    mean = lambda chosen: jax.tree.map(lambda *x: np.mean(x, axis=0, dtype=np.float64), *[trees[i] for i in chosen])
    subsets = [s for k in range(1, len(trees) + 1) for s in itertools.combinations(range(len(trees)), k)]
    scores = {chosen: score(mean(chosen)) for chosen in subsets}
    taken = (0,)
    for i in range(1, len(trees)):
        taken = (*taken, i) if scores[(*taken, i)] >= scores[taken] else taken
    return mean(taken), list(taken)


def test_greedy_soup_is_recipe_1():
    def distance(p, q):
        return sum(float(np.sum((x - y) ** 2)) for x, y in zip(jax.tree.leaves(p), jax.tree.leaves(q), strict=True))

    sizes = set()
    for seed in range(6):
        score = functools.partial(lambda target, params: -distance(params, target), tree(100 + seed))
        trees = sorted((tree(10 * seed + i) for i in range(5)), key=score, reverse=True)
        soup, taken = averages.greedy_soup(trees, score)
        expected, chosen = brute_force(trees, score)
        assert taken == chosen
        assert_close(soup, expected)
        assert score(soup) >= score(trees[0])
        sizes.add(len(taken))
    assert len(sizes) > 1
    first = tree(0)
    assert averages.greedy_soup([first] * 3, lambda _: 1.0)[1] == [0, 1, 2]  # no less is enough
    alone, taken = averages.greedy_soup([first, tree(1)], lambda params: -distance(params, first))
    assert taken == [0] and bits(alone) == bits(first)


def test_task_vectors():
    base, a, b = tree(0), tree(1), tree(2)
    of_a, of_b = averages.task_vector(base, a), averages.task_vector(base, b)
    assert_close(of_a, jax.tree.map(np.subtract, a, base))
    assert_close(averages.add_task_vectors(base, [of_a], 1.0), a)
    assert_close(averages.add_task_vectors(base, [of_a], -1.0), jax.tree.map(lambda x, y: 2 * x - y, base, a))
    assert_close(
        averages.add_task_vectors(base, [of_a, of_b], 0.3),
        jax.tree.map(lambda x, y, z: x + np.float32(0.3) * ((y - x) + (z - x)), base, a, b),
    )
    assert bits(averages.add_task_vectors(base, [of_a], 0.0)) == bits(base)
    assert averages.add_task_vectors(base, [], 1.0) is base
    c = tree(3)
    assert_close(averages.analogy(a, b, c), jax.tree.map(lambda x, y, z: z + (y - x), a, b, c))


@pytest.mark.parametrize(
    "call",
    [
        lambda t, o: averages.wise_ft(t, o, 0.5),
        lambda t, o: averages.uniform_soup([t, t, o]),
        lambda t, o: averages.greedy_soup([t, o], lambda _: 0.0),
        lambda t, o: averages.task_vector(t, o),
        lambda t, o: averages.add_task_vectors(t, [t, o], 1.0),
        lambda t, o: averages.analogy(t, t, o),
        lambda t, o: regularizers.mixout(jax.random.key(0), t, o, 0.5),
        lambda t, o: regularizers.l2_sp(t, o, 1.0),
        lambda t, o: regularizers.l2_sp_gradient(t, o, 1.0),
        lambda t, o: diffs.diff(t, o),
        lambda t, o: masks.largest_moves(t, o, 1),
    ],
)
def test_trees_that_differ(call):
    base = tree(0)
    with pytest.raises(UserError, match=r"`image/bias` is float32\[3\] in one and float32\[2\] in another"):
        call(base, OTHER)
    with pytest.raises(UserError, match="`logit_scale` is in one and not in another"):
        call(base, {"image": base["image"]})
    with pytest.raises(UserError, match="`text` is in one and not in another"):
        call(base, base | {"text": np.zeros(3)})


def test_an_empty_soup():
    for soup in (averages.uniform_soup, lambda trees: averages.greedy_soup(trees, lambda _: 0.0)):
        with pytest.raises(UserError, match="the soup has no models"):
            soup([])


def test_running_means_weigh_what_they_are_told():
    """PromptSRC's Gaussian over epochs, with weights that sum to 1; without weights the last parameters."""
    trees = [{"x": np.random.default_rng(seed).normal(size=3).astype(np.float32)} for seed in range(5)]
    running, last = averages.Running(averages.gaussian(0.75, 0.2)), averages.Running()
    for i, params in enumerate(trees):
        running.add(params, (i + 1) / 5)
        last.add(params, (i + 1) / 5)
    weights = np.array([np.exp(-0.5 * ((i / 5 - 0.75) / 0.2) ** 2) for i in range(1, 6)])
    want = sum(w * params["x"].astype(np.float64) for w, params in zip(weights / weights.sum(), trees, strict=True))
    np.testing.assert_allclose(running.params["x"], want, atol=1e-6)
    assert last.params is trees[-1]
