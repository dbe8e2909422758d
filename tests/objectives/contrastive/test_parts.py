"""The overuse penalty and the entailment of concepts against loops in fp64."""

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
        f"{side}_parts": lambda o, side=side: dict.fromkeys(("words", "log_entailed"), o.params[side][o["image"]])
        for side in ("image", "text")
    }


def tables():
    return {"image": WORDS[0], "text": WORDS[1]}


def run(section, params, batch=BATCH):
    return lookup.differentiate({"name": "overuse", **section}, params, batch, model=Active())


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


@pytest.mark.parametrize("labels", [np.array([0, 1, 4, 2, 2, 3]), np.random.default_rng(3).random((6, 5)) < 0.4])
def test_entailment(labels):
    has = labels if labels.ndim == 2 else labels[:, None] == np.arange(5)

    def by_hand(params, batch):
        total = 0.0
        for table in params.values():
            for row, own in zip(table, has, strict=True):
                present = [-x for x, h in zip(row, own, strict=True) if h]
                absent = [-np.log(1 - np.exp(x)) for x, h in zip(row, own, strict=True) if not h]
                total += (sum(present) / max(len(present), 1) + sum(absent) / max(len(absent), 1)) / 2
        return total / 12

    with jax.enable_x64(True):
        params = {name: -0.1 - table for name, table in tables().items()}
        got = run(dict(name="entailment"), params, BATCH | {"concept": labels})
        lookup.check(got, by_hand, params, BATCH)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(part="codes"), "part is `codes`; the parts of the model's space: words, log_entailed; see model.space"),
        (dict(name="entailment", key="kinds"), "the key is `kinds`, which the batch lacks; it has: image"),
        (dict(of=()), r"`of` is \[\]; expected some of: image, text"),
    ],
)
def test_what_lacks_is_named(section, message):
    with pytest.raises(UserError, match=message):
        run(section, tables())
