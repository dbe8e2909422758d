"""UPT against its equations, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.few_shot import D, clip_like
from vlm_jax.adapt.prompts.upt import Unified


def test_unified_prompts_are_a_transformers():
    """U' = SA(U) + LN(U), then FFN(LN(U')) + LN(U'), in numpy."""
    recipe = Unified(2, 3, hidden=6, heads=2)
    own = jax.jit(lambda rng: recipe.begin(rng, clip_like(scan=True).model, {}))(jax.random.key(0))
    own = {name: leaf + 0.1 * jax.random.normal(jax.random.key(len(name)), leaf.shape) for name, leaf in own.items()}
    leaves = {"text/token_embed/inserted_context": jnp.zeros((2, D)), "image/inserted_prompt": jnp.zeros((3, D))}
    placed = recipe.combine(own, leaves)
    own = jax.tree.map(np.asarray, own)

    def norm(x, name):
        centred = x - x.mean(1, keepdims=True)
        return (
            centred / np.sqrt(np.mean(centred**2, 1, keepdims=True) + 1e-6) * own[f"{name}/scale"] + own[f"{name}/bias"]
        )

    x = own["prompts"]
    q, k, v = (
        np.einsum("nd,dhe->hne", x, own[f"attn/{n}/kernel"]) + own[f"attn/{n}/bias"][:, None]
        for n in ("query", "key", "value")
    )
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(D / 2))
    heads = weights / weights.sum(2, keepdims=True) @ v
    x = np.einsum("hne,hed->nd", heads, own["attn/out/kernel"]) + own["attn/out/bias"] + norm(x, "norm1")
    x = norm(x, "norm2")
    hidden = np.asarray(jax.nn.gelu(x @ own["fc1/kernel"] + own["fc1/bias"]))
    x = hidden @ own["fc2/kernel"] + own["fc2/bias"] + x
    np.testing.assert_allclose(placed["text/token_embed/inserted_context"], x[:2], rtol=1e-4, atol=1e-5)
    image = x[2:] @ own["image/kernel"] + own["image/bias"]
    np.testing.assert_allclose(placed["image/inserted_prompt"], image, rtol=1e-4, atol=1e-5)
