"""Semantic proxies: the loss and the running means against loops, the proxies' embeddings against the tower."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.few_shot import DEPTH, D, clip_like, moved, pictures, tuned, unit_rows
from vlm_jax.adapt.prompts.proxies import follow, proxy_anchor, semantic_proxies

LABELS = np.array([1, 0, -1, 1, 3])


def test_proxy_anchor_is_the_papers():
    x, proxies = unit_rows(0, 5, 8), unit_rows(1, 4, 8)
    near, far = [], []
    for c in range(4):
        own = [math.exp(-8 * (x[i] @ proxies[c] - 0.1)) for i in range(5) if LABELS[i] == c]
        others = [math.exp(8 * (x[i] @ proxies[c] + 0.1)) for i in range(5) if LABELS[i] not in (c, -1)]
        near += [math.log(1 + sum(own))] if own else []
        far.append(math.log(1 + sum(others)))
    with jax.enable_x64(True):
        found = proxy_anchor(jnp.asarray(x), jnp.asarray(proxies), LABELS, 8.0, 0.1)
    np.testing.assert_allclose(found, np.mean(near) + np.mean(far), rtol=1e-6)


def test_means_follow_the_pictures_of_their_class():
    semantic, means = unit_rows(2, 5, 8), unit_rows(3, 4, 8)
    with jax.enable_x64(True):
        found = follow(jnp.asarray(means), {"semantic": jnp.asarray(semantic), "label": LABELS}, 0.8)
    for c in range(4):
        own = [semantic[i] for i in range(5) if LABELS[i] == c]
        want = 0.8 * means[c] + 0.2 * np.mean(own, axis=0) if own else means[c]
        np.testing.assert_allclose(found[c], want / np.linalg.norm(want), rtol=1e-6)


def test_only_the_prompts_of_all_classes_stay():
    """No name is read: the text tower and the scale are as they were."""
    base = clip_like(scan=True)
    adapted = tuned(base, semantic_proxies(base.model, length=2), pictures())
    assert moved(base, adapted) == {"image/blocks/inserted_prompt"}
    assert adapted.params["image"]["blocks"]["inserted_prompt"].shape == (DEPTH, 2, D)
