"""Self-distillation: the equations as loops, masks that repeat, centres, Sinkhorn-Knopp, teachers of chosen parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import initial
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.errors import UserError
from vlm_jax.objectives.alignment.self_distillation import masks, sinkhorn
from vlm_jax.objectives.outputs import fold
from vlm_jax.params import sharding

B, V, N, K = 4, 2, 4, 5
SIZES = dict(head=dict(hidden=5, bottleneck=4), prototypes=K)
TEACHER = dict(decay=0.9, inputs=dict(image="global"))
NAMES = ("self_distillation", "masked_patches")


@pytest.fixture(autouse=True)
def fp64():
    with jax.enable_x64(True):
        yield


def batch():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    rows = {"image": draw(B, 4, 4, 3), "global": draw(B, 4, 4, 3), "local": draw(B, V, 4, 4, 3)}
    return rows | {"token_ids": jnp.asarray(rng.integers(0, 14, (B, 3)))}


def draw(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.5), jnp.float64), tree)


def build(name, teacher=TEACHER, **options):
    return objectives.build(dict(name=name, teachers=dict(average=teacher), **SIZES, **options), Towers())


def begin(objective, rows):
    """(parameters, memory): none of them as it begins, so that all parts of the equation count."""
    params = initial(Towers(), rows["image"], rows["token_ids"])
    shapes = jax.eval_shape(partial(objectives.make, objective, Towers()), params, rows, jax.random.key(0))
    return draw(shapes[0], 1), draw(shapes[1], 2)


def seen(params, picture, hidden=None):
    """(pooled [5], patches [4, 7]) of one picture."""
    found = Towers().apply({"params": params}, picture[None], None, hidden=hidden)
    return found.image_pooled[0], found.image_tokens[0]


def cosines(params, name, x):
    """g of a vector: the head, then the products with unit columns."""
    own = params["objective"][name]
    layer = lambda x, part: x @ part["kernel"] + part["bias"]
    y = layer(jax.nn.gelu(layer(jax.nn.gelu(layer(x, own["head"]["fc1"])), own["head"]["fc2"])), own["head"]["fc3"])
    columns = own["prototype_head"]["kernel"]
    unit = lambda v: v / (jnp.sqrt(jnp.sum(v * v)) + 1e-8)
    return jnp.stack([unit(y) @ unit(columns[:, k]) for k in range(K)])


def cross_entropy(p, scores):
    log_q = scores / 0.1 - jnp.log(sum(jnp.exp(one / 0.1) for one in scores))
    return -sum(p[k] * log_q[k] for k in range(K))


@partial(jax.jit, static_argnums=3)
def cosines_of(params, teacher, row, name):
    """(the student's cosines, the teacher's), [M, K] each, of every view or masked patch of a picture."""
    pooled, patches = seen(teacher, row["global"])
    if name == "self_distillation":
        own = [seen(params, view)[0] for view in row["local"]]
        other = [pooled] * V
    else:
        token = params["objective"][name]["mask"]["token"]
        own = seen(params, row["global"], (row["where"][None], token))[1]
        own, other = ([x[n] for n in jnp.nonzero(row["where"], size=N // 2)[0]] for x in (own, patches))
    pairs = [(cosines(params, name, a), cosines(teacher, name, b)) for a, b in zip(own, other, strict=True)]
    return [jnp.stack(side) for side in zip(*pairs, strict=True)]


@partial(jax.jit, static_argnums=4)
@partial(jax.value_and_grad)
def of_picture(params, teacher, centre, row, name):
    """The equation: a softmax with a centre, one view or patch after the other."""
    own = []
    for student, taught in zip(*cosines_of(params, teacher, row, name), strict=True):
        p = jnp.exp((taught - centre) / 0.04)
        own.append(cross_entropy(jax.lax.stop_gradient(p / sum(p)), student))
    return sum(own) / len(own)


def pictures(rows, key):
    """One after the other, with the masks of a step's key."""
    of_rows = fold(key, "rows batch")
    where = masks(jax.vmap(lambda i: jax.random.fold_in(of_rows, i))(jnp.arange(B)), B, N, 0.5)[0]
    return [{"global": rows["global"][i], "local": rows["local"][i], "where": where[i]} for i in range(B)]


@pytest.mark.parametrize("name", NAMES)
def test_the_equation(name):
    """Values and gradients to 1e-9, accumulated, on eight devices; and the centre after the step."""
    rows, key, objective = batch(), jax.random.key(5), build(name, momentum=0.75)
    params, state = begin(objective, rows)
    teacher, centre = state["teachers"]["average"], state["terms"][name]
    run = partial(objectives.value_and_grad, objective, Towers(), params, rng=key, state=state, accumulate=2)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        value, _, grads, features = jax.jit(run)(sharding.to_global(jax.tree.map(np.asarray, rows), mesh, B))
    each = [of_picture(params, teacher, centre, row, name) for row in pictures(rows, key)]
    want = jax.tree.map(lambda *parts: sum(parts) / B, *each)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), (value, grads), want)
    assert np.any(grads["objective"][name]["head"]["fc1"]["kernel"]) and not np.any(grads["text_head"]["kernel"])
    new = objectives.update(objective, state, params, features, key, 0)["terms"][name]
    mean = np.mean([cosines_of(params, teacher, row, name)[1] for row in pictures(rows, key)], axis=(0, 1))
    np.testing.assert_allclose(new, 0.75 * np.asarray(centre) + 0.25 * mean, rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_sinkhorn_in_the_place_of_the_centre(name):
    """Of all views or patches of the batch: prototypes have equal shares, then rows sum to 1, three times."""
    rows, key, objective = batch(), jax.random.key(5), build(name, balance="sinkhorn")
    params, state = begin(objective, rows)
    assert state["terms"] == {}
    found = [cosines_of(params, state["teachers"]["average"], row, name) for row in pictures(rows, key)]
    views = 1 if name == "self_distillation" else N // 2
    q = np.exp(np.concatenate([taught[:views] for _, taught in found]) / 0.04)
    for _ in range(3):
        q /= q.sum(0) * K
        q /= q.sum(1, keepdims=True) * len(q)
    p = (q * len(q)).reshape(B, views, K)
    want = [cross_entropy(p[i, m % views], one) for i, (own, _) in enumerate(found) for m, one in enumerate(own)]
    got = jax.jit(partial(objectives.value, objective, Towers()))(params, rows, key, state=state)[0]
    np.testing.assert_allclose(got, np.mean(want), rtol=1e-9)


def test_sinkhorn_balances():
    p = sinkhorn(jnp.asarray(np.random.default_rng(0).normal(size=(12, K))), iterations=60)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(p.sum(0), 12 / K, rtol=1e-6)


def test_masks_depend_on_the_key_of_a_row_alone():
    where, index = masks(jax.random.split(jax.random.key(0), 500), 500, 8, 0.4)
    assert np.all(where.sum(1) == 3) and np.all(np.take_along_axis(np.asarray(where), np.asarray(index), 1))
    assert np.all(np.abs(np.mean(where, 0) - 3 / 8) < 0.1) and len(np.unique(where, axis=0)) > 40
    some = masks(jax.random.split(jax.random.key(0), 500)[3:5], 2, 8, 0.4)
    np.testing.assert_array_equal(some[0], where[3:5])


def test_no_masked_patch_is_zero():
    objective, rows = build("masked_patches", share=0.1), batch()  # 0.1 of four patches
    params, state = begin(objective, rows)
    run = partial(objectives.value_and_grad, objective, Towers(), params, rows, jax.random.key(0), state=state)
    value, _, grads, _ = jax.jit(run)()
    assert value == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_before_terms_begin_all_is_the_base_objective_bit_for_bit():
    late = lambda value: dict(value=value, begin="2 steps", name="constant")
    base = dict(contrastive=dict(penalty="sigmoid"))
    terms = base | {name: dict(SIZES, weight=late(0.25 + i)) for i, name in enumerate(NAMES)}
    section, rows = dict(terms=terms, teachers=dict(average=TEACHER)), batch()
    objective = objectives.build(
        section, Towers(), steps=dict(zip((0, "2 steps", "100%"), (0, 2, 10), strict=True)).get
    )
    alone = objectives.build(dict(terms=base), Towers())
    params, state = begin(objective, rows)
    run = lambda objective, step: objectives.value_and_grad(
        objective, Towers(), params, rows, jax.random.key(0), state=state, step=step
    )[:3]
    own = jax.jit(partial(run, objective))
    before, want = own(1), jax.jit(partial(run, alone))(1)
    assert before[0] == want[0]
    jax.tree.map(np.testing.assert_array_equal, before[2], want[2])
    value, metrics, _ = own(2)
    parts = {name: metrics[f"{name}/loss"] for name in ("contrastive", *NAMES)}
    total = parts["contrastive"] + 0.25 * parts["self_distillation"] + 1.25 * parts["masked_patches"]
    np.testing.assert_allclose(value, total, rtol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(balance="center"), "balance is `center`; expected one of: centre, sinkhorn"),
        (dict(head=dict(hiden=3)), "head has no key `hiden`; did you mean `hidden`"),
        (dict(views="image"), r"`image` has the shape \(4, 4, 4, 3\); expected \[B, V, h, w, 3\]: op `views`"),
        (dict(views="crops"), "`self_distillation` needs `crops`, which neither the batch nor the model has"),
        (dict(teacher="other"), "`self_distillation` asks for the teacher `other`"),
        (dict(teachers=dict(average=dict(decay=0.9, of="depth/.*"))), "average.of, `depth/.\\*`, matches no parameter"),
        (dict(name="masked_patches", share=1.5), "share is 1.5; expected a share of the patches, from 0 to 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(options, message):
    rows = batch()
    with pytest.raises(UserError, match=message) as error:
        section = dict(name="self_distillation", teachers=dict(average=TEACHER)) | SIZES | options
        objective = objectives.build(section, Towers())
        params = initial(Towers(), rows["image"], rows["token_ids"])
        jax.eval_shape(partial(objectives.make, objective, Towers()), params, rows, jax.random.key(0))
    assert "\n" not in str(error.value)
