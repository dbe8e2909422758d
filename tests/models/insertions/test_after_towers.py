"""Insertions after the towers against their equations, in numpy; a share of 0 is the model itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import GIVEN, D, clip_like
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import begin, inserted, new_leaves
from vlm_jax.models.insertions.after_towers import JointAttention, OutputAdapter, by_pairs, class_logits
from vlm_jax.params.table import named_leaves

IMAGES, TEXTS = jax.random.normal(jax.random.key(1), (3, 8, 8, 3)), jnp.arange(1, 17).reshape(2, 8)
run = jax.jit(class_logits, static_argnums=0)


@pytest.fixture(scope="module")
def base():
    pretrained = clip_like(scan=True)
    found = pretrained.model.apply({"params": pretrained.params}, IMAGES, TEXTS)
    return pretrained, np.asarray(found.image, np.float64), np.asarray(found.text, np.float64), float(found.scale)


def adapted(base, *insertions):
    """(model, parameters, new ones of a size that matters in float64)."""
    model = inserted(base.model, *insertions)
    params = begin(jax.random.key(2), model, base.params, *GIVEN)
    params |= {name: leaf + 0.1 for name, leaf in params.items() if name.startswith("inserted_")}
    return (
        model,
        params,
        {n.removeprefix("inserted_"): np.asarray(x, np.float64) for n, x in new_leaves(params).items()},
    )


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_output_adapters(base):
    """unit((1 - a) x + a relu(relu(x down) up)) of each embedding, of pictures and of what was embedded before."""
    base, image, text, scale = base
    model, params, own = adapted(base, OutputAdapter("image", 4, 0.3), OutputAdapter("text", 2, 0.2))
    assert sum(leaf.size for leaf in own.values()) == 2 * D * (D // 4) + 2 * D * (D // 2)
    relu = lambda x: np.maximum(x, 0)
    change = lambda x, where, a: unit((1 - a) * x + a * relu(relu(x @ own[f"{where}_down"]) @ own[f"{where}_up"]))
    want = scale * change(image, "image", 0.3) @ change(text, "text", 0.2).T
    np.testing.assert_allclose(run(model, params, IMAGES, TEXTS), want, rtol=1e-5, atol=1e-5)
    cached = jnp.float32(image), jnp.float32(text)
    np.testing.assert_allclose(run(model, params, *cached), want, rtol=1e-5, atol=1e-5)


def test_joint_attention(base):
    """Softmax over the picture and both classes, two heads, one picture at a time."""
    base, image, text, scale = base
    model, params, own = adapted(base, JointAttention(4, 2, 0.3))
    hidden = D // 4
    assert sum(leaf.size for leaf in own.values()) == 2 * D * hidden + hidden + D + 4 * (hidden**2 + hidden)
    dense = lambda name, x: x @ own[f"joint_{name}"] + own[f"joint_{name}_bias"]
    want = []
    for x in image:
        tokens = np.stack([x, *text])
        q, k, v = (dense(name, dense("down", tokens)) for name in ("query", "key", "value"))
        seen = np.zeros_like(q)
        for head in (slice(0, hidden // 2), slice(hidden // 2, hidden)):
            for i in range(3):
                weights = np.exp([q[i, head] @ k[j, head] / np.sqrt(hidden / 2) for j in range(3)])
                seen[i, head] = sum(w * v[j, head] for j, w in enumerate(weights / weights.sum()))
        both = unit(0.7 * tokens + 0.3 * dense("up", dense("out", seen)))
        want.append(scale * both[1:] @ both[0])
    np.testing.assert_allclose(run(model, params, IMAGES, TEXTS), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("insertion", [OutputAdapter(share=0.0), JointAttention(share=0.0, heads=2)])
def test_a_share_of_0_is_the_model(base, insertion):
    base = base[0]
    model, params, _ = adapted(base, insertion)
    want = run(base.model, base.params, IMAGES, TEXTS)
    found = run(model, params, IMAGES, TEXTS)
    if isinstance(insertion, OutputAdapter):
        np.testing.assert_array_equal(found, want)
    else:  # one picture at a time, and so but for rounding
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)
    assert named_leaves(params).keys() > named_leaves(base.params).keys()


def test_what_does_not_fit_is_named(base):
    base = base[0]
    for wrong, message in (
        (OutputAdapter("picture"), "`where` is image or text"),
        (JointAttention(heads=3), "`heads` must divide them"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(base, wrong)
    with pytest.raises(UserError, match="two insertions make the logits of pairs"):
        by_pairs(inserted(base.model, JointAttention(), JointAttention(share=0.1)))
