"""A decoder of patches and text behind prefix attention (AIMv2), and the loss of patches."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support import slow_captioners as slow
from tests.support.models import IMAGES, run, tiny
from vlm_jax.objectives.generative.patches import normalised

SWIGLU = dict(depth=1, norm="rmsnorm", gated=True, activation="silu", attn_bias=False, mlp_bias=False)
OBJECTIVE = dict(terms=dict(captioning=dict(), next_patch=dict(weight=0.4)))


def test_values_and_gradients_are_the_loops():
    """Loss = text + 0.4 pixels; of pixels, patches after the drawn prefix count."""

    def loop(params, drawn):
        text, pixels = [], []
        for image, ids, prefix in zip(batch["image"], batch["token_ids"], drawn, strict=True):
            sees = lambda i, j, prefix=prefix: j < prefix or j <= i
            picture = slow.blocks(slow.embedded(image, params["image"]), params["image"], sees)
            tokens = [slow.dense(token, params["projection"]) for token in picture]
            tokens += slow.texts(ids, params["decoder"])
            hidden = slow.blocks(tokens, params["decoder"], lambda i, j: j <= i)
            text.append(slow.cross_entropy(hidden[4:], ids, params))
            errors = []
            for i, patch in list(enumerate(slow.patches(image)))[prefix:]:  # patch i + 1 > M, from those before
                wanted = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
                errors.append(np.mean((slow.dense(hidden[i - 1], params["patch_head"]) - wanted) ** 2))
            pixels.append(np.mean(errors))
        return np.mean(text) + 0.4 * np.mean(pixels)

    with jax.enable_x64(True):
        model, params = slow.build("next_patch_captioner", image=SWIGLU, decoder=SWIGLU)
        batch, run = slow.compiled(model, OBJECTIVE, lambda o: o["prefix"], accumulate=(1, 2), key=7)
        batch = jax.tree.map(np.asarray, batch)
        lengths = run(params)[0][2]
        assert len(set(lengths.tolist())) > 1 and lengths.min() >= 1 and lengths.max() <= 3
        slow.agree(run, loop, params)


def test_a_patch_sees_no_patch_that_it_predicts():
    """Tokens from M on do not change with later patches; with all patches as the prefix, the tower is as ever."""
    model, params, (images, _) = tiny("next_patch_captioner")
    of = lambda images, prefix: run(model, params, images, method="see", prefix=prefix)[0]
    for prefix in (1, 2, 3):
        prefix = jnp.full(3, prefix)
        for patch, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
            moved = np.array(images)
            moved[:, y : y + 8, x : x + 8] += 1
            changed = (of(moved, prefix) != of(images, prefix)).any((0, 2))
            assert changed.tolist() == [patch < prefix[0] or patch <= i for i in range(4)]
    np.testing.assert_array_equal(of(images, jnp.full(3, 4)), of(images, jnp.full(3, 9)))
    whole = run(model, params, images, method="see")[0]
    np.testing.assert_allclose(of(images, jnp.full(3, 4)), whole, rtol=1e-5, atol=1e-5)


def test_patches_are_normalised_each():
    rows = normalised(jnp.asarray(IMAGES.reshape(3, -1)) * 7 + 3)
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.var(rows, axis=1, ddof=1), 1, rtol=1e-5)
    assert not normalised(jnp.ones((1, 12))).any()
