"""Captioners that read the picture as a prefix, and the share of a picture that a decoder sees in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import slow_captioners as slow
from tests.support.compare import close
from tests.support.models import IMAGES, TOKENS, initial, run, section, tiny
from vlm_jax import models, objectives
from vlm_jax.errors import UserError
from vlm_jax.models.decoder import shift_right
from vlm_jax.models.generate import log_likelihood

BATCH = {"image": jnp.asarray(IMAGES), "token_ids": jnp.asarray(TOKENS)}


def share(outputs):
    """(all tokens of the pictures, those that the decoder sees)."""
    return outputs["seen"][0], outputs["context"][0]


def test_values_and_gradients_are_the_loops():
    """With draws of its own for each picture, which accumulation does not change."""

    def loop(params, drawn):
        losses = []
        for image, ids, seen, shown in zip(batch["image"], batch["token_ids"], *drawn, strict=True):
            picture = slow.blocks(slow.embedded(image, params["image"]), params["image"], lambda i, j: True)
            kept = [int(np.argmin(np.abs(seen - token).sum(1))) for token in shown]
            assert len(kept) == 2 and kept == sorted(kept)
            before = [slow.dense(picture[i], params["projection"]) for i in kept]
            tokens = before + slow.texts(ids, params["decoder"])
            hidden = slow.blocks(tokens, params["decoder"], lambda i, j: j <= i)
            losses.append(slow.cross_entropy(hidden[2:], ids, params))
        return np.mean(losses)

    with jax.enable_x64(True):
        model, params = slow.build("prefix_captioner", image=dict(depth=1), decoder=dict(depth=1))
        batch, run = slow.compiled(model, dict(name="captioning"), share, accumulate=(1, 2))
        batch = jax.tree.map(np.asarray, batch)
        slow.agree(run, loop, params)


def test_all_tokens_are_cap_bit_for_bit_and_evaluation_shows_all():
    settings = section("captioner")
    settings |= {side: settings[side] | {"depth": 1} for side in ("image", "decoder")}
    params = initial(models.build(settings), IMAGES, TOKENS)

    def loss(keep, train):
        model = models.build(settings | {"keep": keep})
        objective = objectives.build(dict(name="captioning"), model)
        options = dict(step=0, state=None, train=train)
        value = lambda params: objectives.value(objective, model, params, BATCH, jax.random.key(1), **options)[0]
        return float(jax.jit(value)(params))

    assert loss(0.9, True) == loss(1.0, True) == loss(0.5, False)  # 0.9 of four tokens are four: drawn, in their order


def test_steps_with_caches_are_the_whole():
    model, params, (images, texts) = tiny("prefix_captioner")
    inputs = shift_right(jnp.asarray(texts))
    want = run(model, params, images, inputs, method="hidden")
    context, mask = run(model, params, images, method="encode")
    step = jax.jit(
        lambda ids, context, caches, at: model.apply(
            {"params": params}, ids, context, context_mask=mask, caches=caches, position=at, method="decode"
        )
    )
    decoded = step(inputs[:, :1], context, model.new_caches(3, 8), 0)
    for at in range(1, 8):
        close(decoded.hidden[:, 0], want[:, at - 1])
        decoded = step(inputs[:, at : at + 1], None, decoded.caches, at)


@pytest.mark.parametrize("kind", ["prefix_captioner", "one_tower_captioner"])
def test_padding_of_pictures_is_not_seen(kind):
    """Packed patches, of which a third are padding, give the likelihoods of the pictures."""
    settings = section(kind)
    settings["image"] = settings["image"] | {"image_size": 16}
    model, params = models.build(settings), tiny(kind).params
    rows = np.stack([slow.patches(image) for image in IMAGES])
    noise = np.random.default_rng(0).standard_normal((3, 2, rows.shape[-1]))
    packed = dict(patches=np.concatenate([rows, noise], 1).astype(np.float32), grid=np.full((3, 2), 2))
    close(log_likelihood(model, params, packed, TOKENS), log_likelihood(model, params, IMAGES, TOKENS), 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(keep=0.0), r"keep is 0.0; expected .* 0 < keep <= 1"),
        (dict(decoder=section("prefix_captioner")["decoder"] | {"cross": "inside"}), "leave it out, or take captioner"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(UserError, match=words):
        models.build(section("prefix_captioner") | change)
