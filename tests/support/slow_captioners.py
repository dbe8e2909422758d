"""Captioners by loops over tokens, in numpy and float64: what the compiled ones should compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.models import IMAGES, TOKENS, initial, section
from vlm_jax import models, objectives
from vlm_jax.objectives.term import Term

PATCH = 8


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(x, p, eps=1e-6):
    """LayerNorm, or RMSNorm where there is no bias."""
    x = x - x.mean() if "bias" in p else x
    return x / np.sqrt(np.mean(x * x) + eps) * p["scale"] + p.get("bias", 0)


def attend(own, tokens, p, heads):
    """What a token takes from the tokens that it sees."""
    q, found = np.split(dense(own, p["query"]), heads), []
    for h in range(heads):
        keys, values = ([np.split(dense(token, p[name]), heads)[h] for token in tokens] for name in ("key", "value"))
        weights = np.exp([q[h] @ key / len(key) ** 0.5 for key in keys])
        found.append(sum(w * value for w, value in zip(weights / weights.sum(), values, strict=True)))
    found = np.concatenate(found)
    if "gate" in p:
        found = found / (1 + np.exp(-dense(own, p["gate"])))
    return dense(found, p["out"])


def mlp(x, p):
    hidden = dense(x, p["fc1"])
    if "gate" in p:
        gate = dense(x, p["gate"])
        return dense(gate / (1 + np.exp(-gate)) * hidden, p["fc2"])
    return dense(0.5 * hidden * (1 + np.tanh((2 / np.pi) ** 0.5 * (hidden + 0.044715 * hidden**3))), p["fc2"])


def blocks(tokens, p, sees, heads=2):
    """Tokens after the blocks and the last norm; `sees(i, j)`: whether token i sees token j."""
    for n in range(sum(name.startswith("blocks_") for name in p)):
        own = p[f"blocks_{n}"]
        normed = [norm(token, own["norm1"]) for token in tokens]
        seen = lambda i, normed=normed: [token for j, token in enumerate(normed) if sees(i, j)]
        tokens = [t + attend(normed[i], seen(i), own["attn"], heads) for i, t in enumerate(tokens)]
        tokens = [t + mlp(norm(t, own["norm2"]), own["mlp"]) for t in tokens]
    return [norm(token, p["norm"]) for token in tokens]


def patches(image):
    """Patches of a picture, row by row."""
    starts = [(y, x) for y in range(0, image.shape[0], PATCH) for x in range(0, image.shape[1], PATCH)]
    return [image[y : y + PATCH, x : x + PATCH].reshape(-1) for y, x in starts]


def embedded(image, p):
    return [
        dense(patch, p["patch_embed"]) + place for patch, place in zip(patches(image), p["pos_embed"][0], strict=True)
    ]


def texts(ids, p, start=0):
    """Embedded inputs: the start token, then all targets but the last."""
    shifted = [start, *ids[:-1]]
    return [p["token_embed"]["embedding"][token] + p["pos_embed"][0][i] for i, token in enumerate(shifted)]


def cross_entropy(hidden, ids, p):
    """Mean of -log p over the tokens of a text; 0 is padding."""
    total, count = 0.0, 0
    for state, token in zip(hidden, ids, strict=True):
        if token:
            logits = dense(state, p["head"])
            total, count = total + np.log(np.exp(logits).sum()) - logits[token], count + 1
    return total / count


def build(kind, **changes):
    """(model in float64, its parameters) of a tiny section."""
    settings = section(kind) | {"dtype": "float64"}
    for side, change in changes.items():
        settings[side] = settings[side] | change if isinstance(change, dict) else change
    model = models.build(settings)
    return model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), initial(model, IMAGES, TOKENS))


def compiled(model, objective, probe, accumulate=(1,), key=5):
    """params -> [(value, gradient, what `probe(outputs)` drew)] for each `accumulate`, in training."""
    objective = objectives.build(objective, model)
    drawn = Term("drawn", lambda outputs, ctx: probe(outputs), lambda *_: (jnp.zeros(()), {}))
    objective = dataclasses.replace(objective, terms=(*objective.terms, drawn))
    batch = {"image": jnp.asarray(IMAGES[:2], jnp.float64), "token_ids": TOKENS[:2]}

    @functools.partial(jax.jit, static_argnums=1)
    def run(params, k):
        rng = jax.random.key(key)
        value, _, grads, features = objectives.value_and_grad(objective, model, params, batch, rng, accumulate=k)
        return value, grads, features["batch"]["drawn"]

    return batch, lambda params: [run(params, k) for k in accumulate]


def agree(run, slow, params):
    """Asserts that value and gradient are the loop's: by central differences in two directions."""
    (value, grads, drawn), *others = run(params)
    for other in others:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), other, (value, grads, drawn))
    params, loop = jax.tree.map(np.asarray, params), functools.partial(slow, drawn=jax.tree.map(np.asarray, drawn))
    np.testing.assert_allclose(value, loop(params), rtol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(2):
        way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
        ahead, behind = (loop(jax.tree.map(lambda p, w, s=s: p + s * w, params, way)) for s in (1e-6, -1e-6))
        along = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(way)))
        np.testing.assert_allclose((ahead - behind) / 2e-6, along, rtol=1e-6)
