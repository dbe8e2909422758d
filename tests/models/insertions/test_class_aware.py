"""Class-aware prompts against their equations, in numpy, and which classes they are of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.few_shot import GIVEN, D, clip_like
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import begin, inserted
from vlm_jax.models.insertions.class_aware import ClassAware
from vlm_jax.models.insertions.prompts import Prompt

K, IMAGES = 2, jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
TEXTS = jnp.arange(1, 33).reshape(4, 8)


def test_the_last_block_has_prompts_of_the_likeliest_classes():
    base = clip_like(scan=False)
    module = ClassAware(classes=K, blocks=1, width=3, tokens=2)
    model = inserted(base.model, Prompt("image", K, 2), module)
    params = begin(jax.random.key(2), model, base.params, *GIVEN)
    moved = lambda name, x: x + 0.1 * jax.random.normal(jax.random.key(len(name)), x.shape)
    params |= {name: moved(name, x) for name, x in params.items() if name.startswith("inserted_")}
    blocks = {}

    def look(call, args, kwargs, context):
        if context.method_name == "__call__" and "blocks_2" in context.module.path:
            blocks.setdefault(context.module.path[-1], []).append(args[0])
        return call(*args, **kwargs)

    @jax.jit
    def run(params):
        with nn.intercept_methods(look):
            return module.seen(model, params, IMAGES, TEXTS), blocks["norm1"][-1]

    (logits, u, chosen), entered = run(params)
    found = base.model.apply({"params": base.params}, IMAGES, TEXTS)
    image, text = np.asarray(found.image, np.float64), np.asarray(found.text, np.float64)
    np.testing.assert_array_equal(chosen, np.argsort(-image @ text.T, axis=1)[:, :K])
    own = {n.removeprefix("inserted_class_"): np.asarray(x[0], np.float64) for n, x in params.items() if "_class_" in n}
    entered = np.asarray(entered, np.float64)
    for i in range(3):
        tokens = np.concatenate([entered[i, K:], own["tokens"]])
        for k in range(K):
            q = text[chosen[i, k]] @ own["meta"] + own["meta_bias"]
            weights = np.exp([(q @ own["query"]) @ (x @ own["key"]) / np.sqrt(3) for x in tokens])
            want = sum(w * x for w, x in zip(weights / weights.sum(), tokens, strict=True)) @ own["value"]
            np.testing.assert_allclose(u[i, 0, k], want, rtol=1e-4, atol=1e-5)
            centred = want + q - np.mean(want + q)
            prompt = centred / np.sqrt(np.mean(centred**2) + 1e-6) * own["norm"] + own["norm_bias"]
            np.testing.assert_allclose(entered[i, k], prompt, rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 4)
    fewer = jax.eval_shape(lambda params: module.seen(model, params, IMAGES, TEXTS[:1]), params)  # than prompts
    assert fewer[0].shape == (3, 1) and fewer[1].shape == (3, 1, 1, D)


def test_what_does_not_fit_is_named():
    base = clip_like(scan=True)
    with pytest.raises(UserError, match="`blocks` is 1 or more, fewer than the image tower's"):
        begin(jax.random.key(0), inserted(base.model, ClassAware(blocks=3)), base.params, *GIVEN)
