"""What every space has to do, beside the loss that test_objectives.py runs on it: it enters by being declared."""

import functools

import jax
import numpy as np
import pytest

from tests.support.models import IMAGES, SPACES, TOKENS, initial, run, section
from tests.support.towers import Towers
from vlm_jax import catalogue, models
from vlm_jax.errors import UserError

NAMES = catalogue.of("spaces")


@pytest.mark.parametrize("name", NAMES)
def test_a_space(name):
    """Unit-norm embeddings; one side alone and one row alone give the same."""
    model = Towers(space=catalogue.build("spaces", SPACES.get(name, name), "config.model.space"))
    params = initial(model, IMAGES, TOKENS)
    both, alone = run(model, params, IMAGES, TOKENS), run(model, params, IMAGES[:1], None)
    for embeddings, parts in ((both.image, both.image_parts), (both.text, both.text_parts)):
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
        assert all(len(part) == len(IMAGES) and np.all(np.isfinite(part)) for part in parts.values())
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(lambda one, all: close(one, all[:1]), (alone.image, alone.image_parts), (both.image, both.image_parts))


@pytest.mark.parametrize("name", NAMES)
def test_mistakes_are_named(name):
    config = section("two_tower")
    with pytest.raises(UserError, match="nonsense") as error:
        models.build(config | {"space": dict(name=name, nonsense=1)})
    assert "\n" not in str(error.value)
    model = models.build(config | {"space": name, "image": config["image"] | {"image_size": 16}})
    with pytest.raises(UserError, match=r"config\.model\.space reads an image tower's tokens; precomputed"):
        jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, 16), np.float32), TOKENS)
