"""The overuse penalty against loops in fp64."""

from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.support import lookup
from vlm_jax.errors import UserError

WORDS = np.random.default_rng(0).normal(size=(2, 6, 5)).clip(0)
BATCH = {"image": np.arange(6)}


class Active(nn.Module):
    """Tables of activations."""

    outputs: ClassVar = {
        f"{side}_parts": lambda o, side=side: {"words": o.params[side][o["image"]]} for side in ("image", "text")
    }


def tables():
    return {"image": WORDS[0], "text": WORDS[1]}


def run(section, params):
    return lookup.differentiate({"name": "overuse", **section}, params, BATCH, model=Active())


@pytest.mark.parametrize("weighted", [True, False])
def test_overuse(weighted):
    def by_hand(params, batch):
        total = 0.0
        for table in params.values():
            mean = [sum(table[i][v] for i in range(6)) / 6 for v in range(5)]
            total += sum((a / sum(mean) if weighted else 1) * a**2 for a in mean)
        return total

    with jax.enable_x64(True):
        got = run(dict(weighted=weighted), tables())
        lookup.check(got, by_hand, tables(), BATCH)
        np.testing.assert_allclose(got[1]["overuse/image_active"], np.mean(np.sum(WORDS[0] > 0, axis=1)))
        np.testing.assert_allclose(got[1]["overuse/text_overused"], np.mean(np.mean(WORDS[1] > 0, axis=0) > 0.5))
        even = {name: np.full((6, 5), 0.3) for name in tables()}  # no word is used more: the FLOPs regularizer, by V
        np.testing.assert_allclose(run({}, even)[0], run(dict(weighted=False), even)[0] / 5, rtol=1e-12)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(part="codes"), "part is `codes`; the parts of the model's space: words; see model.space"),
        (dict(of=()), r"`of` is \[\]; expected some of: image, text"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message):
        run(section, tables())
