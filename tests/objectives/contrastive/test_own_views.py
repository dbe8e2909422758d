"""Each modality alone: the loss by a loop in float64."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.support.towers import Towers
from vlm_jax.errors import UserError
from vlm_jax.objectives import Objective, value
from vlm_jax.objectives.contrastive.own_views import own_views


def test_by_hand():
    rng, model = np.random.default_rng(0), Towers()
    batch = {key: rng.normal(size=(4, 4, 4, 3)) for key in ("image", "view")}
    batch |= {"token_ids": rng.integers(1, 14, (4, 5)), "texts": rng.integers(1, 14, (4, 1, 5))}
    with jax.enable_x64():
        params = jax.jit(model.init)(jax.random.key(0), batch["image"], batch["token_ids"])["params"]
        embed = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
        one, two = embed(params, batch["image"], batch["token_ids"]), embed(params, batch["view"], batch["texts"][:, 0])
        terms = {"both": own_views(model=model), "image": own_views(model=model, text=None)}
        terms |= {"text": own_views(model=model, image=None)}
        run = lambda *args: {name: value(Objective((one,)), model, *args, None)[1] for name, one in terms.items()}
        found = jax.jit(run)(params, batch)
    losses = {}
    for name in ("image", "text"):
        logits = float(one.scale) * np.asarray(getattr(one, name)) @ np.asarray(getattr(two, name)).T
        losses[name] = -np.mean([logits[i, i] - np.log(np.exp(logits[i]).sum()) for i in range(4)])
        np.testing.assert_allclose(found[name]["loss"], losses[name], rtol=1e-6)
        np.testing.assert_allclose(found["both"][f"own_views/{name}"], np.mean(logits.argmax(1) == range(4)), rtol=1e-6)
    np.testing.assert_allclose(found["both"]["loss"], sum(losses.values()) / 2, rtol=1e-6)


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match="own_views has no modality; give `image`, `text` or both"):
        own_views(model=nn.Module(), image=None, text=None)
