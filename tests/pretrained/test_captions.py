"""A captioner describes, scores and names pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.models import run
from vlm_jax.errors import UserError

NAMES = ["cat", "bird", "grinning face with smiling eyes", "umbrella"]


@pytest.fixture
def pretrained(captioner):
    return captioner


@pytest.fixture(scope="module")
def pictures():
    return list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))


def log_p(pretrained, pictures, captions):
    """By the model's own logits, all tokens at once."""
    ids = pretrained.tokenizer(captions, 8, bos=False)
    images = jnp.asarray(np.stack(pictures), jnp.float32) / 127.5 - 1
    logits = run(pretrained.model, pretrained.params, images, ids)
    own = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], axis=2)[..., 0]
    return np.where(ids == 0, 0, own).sum(1)


def test_score_is_the_log_likelihood(pretrained, pictures):
    got = pretrained.score(pictures, NAMES[:3])
    np.testing.assert_allclose(got, log_p(pretrained, pictures, NAMES[:3]), rtol=1e-5)


def test_every_picture_with_every_text(pretrained, pictures):
    """Texts of different lengths are scored in groups; the order is that of the texts."""
    got = pretrained.logits(pictures, NAMES)
    assert got.shape == (3, 4)
    for j, name in enumerate(NAMES):
        np.testing.assert_allclose(got[:, j], log_p(pretrained, pictures, [name] * 3), rtol=1e-5)


def test_classify_is_the_softmax_of_likelihoods(pretrained, pictures):
    got = pretrained.classify(pictures, NAMES, templates=["{}", "a {}"])
    logits = pretrained.logits(pictures, NAMES) + pretrained.logits(pictures, [f"a {name}" for name in NAMES])
    np.testing.assert_allclose(got, jax.nn.softmax(logits / 2), rtol=1e-4)


def test_captions(pretrained, pictures):
    greedy = pretrained.caption(pictures)
    assert len(greedy) == 3 and all(isinstance(text, str) for text in greedy)
    assert pretrained.caption(pictures, "beam", beams=1) == greedy
    assert pretrained.caption(pictures, "sample", seed=3) == pretrained.caption(pictures, "sample", seed=3)
    assert pretrained.caption(pictures, "sample", top_k=1) == greedy
    assert all(text.startswith("black cat") for text in pretrained.caption(pictures, prefix="black cat"))
    short = pretrained.caption(pictures, length=2)
    assert all(len(text) < len(whole) for text, whole in zip(short, greedy, strict=True))


@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_a_prefix_for_each_picture(pretrained, pictures, method):
    prefixes = ["black cat", "cat", "dog"]
    whole = pretrained.caption(pictures, method, prefix=prefixes)
    each = [pretrained.caption([x], method, prefix=own)[0] for x, own in zip(pictures, prefixes, strict=True)]
    assert whole == each
    rest = pretrained.caption(pictures, method, prefix=prefixes, echo=False)
    assert [text.removeprefix(own).strip() for text, own in zip(whole, prefixes, strict=True)] == rest


def test_features(pretrained, pictures):
    images = jnp.asarray(np.stack(pictures), jnp.float32) / 127.5 - 1
    tokens, _ = run(pretrained.model, pretrained.params, images, method="encode")
    np.testing.assert_allclose(pretrained.image_features(pictures), tokens.mean(1), atol=1e-5)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p, x: p.caption(x, "magic"), "method of `caption` is `magic`; expected one of: greedy, sample, beam"),
        (lambda p, x: p.caption(x, temprature=2.0), "has no key `temprature`; did you mean `temperature`"),
        (lambda p, x: p.caption(x, prefix=["cat", "dog"]), "there are 2 prefixes for 3 inputs; give one, or one each"),
        (lambda p, x: p.score(x, ["cat"]), "got 3 pictures, 1 captions"),
        (lambda p, x: p.embed_texts(["cat"]), "this model has no text tower"),
        (lambda p, x: p.embed_images(x), "a captioner embeds no pictures"),
    ],
)
def test_mistakes_are_named(pretrained, pictures, use, message):
    with pytest.raises(UserError, match=message):
        use(pretrained, pictures)
