"""Evaluators of exact truth: equal to slow counts on fifty scenes, and 1.0 for a model that knows what is true."""

import pytest

from tests.support.scenes import URI, Guess, Truth, Writer, records
from vlm_jax import evaluators
from vlm_jax.errors import UserError

LEARNED = Guess()


def run(kind, model, **section):
    return evaluators.build({"type": kind, "uri": URI, "split": "train", "batch_size": 16} | section)(model)


def share(values):
    return pytest.approx(sum(values) / len(values), abs=1e-12)


@pytest.mark.parametrize("model", [Guess(), Writer()])
def test_foils_of_the_data_by_hand(model):
    result = run("foils", model, caption="caption", foils="foils")
    for kind in ("object", "attribute", "relation", "count", "order"):
        own = [row for row in records() if kind in row["foils"]]
        right = [model.fits(row["image"], row["caption"]) > model.fits(row["image"], row["foils"][kind]) for row in own]
        assert result.metrics[kind] == share(right) and len(own) > 1
        assert result.metrics[f"{kind}_pairs"] == len(own)
        assert result.metrics[f"{kind}_left_out"] == 50 - len(own)
        low, high = result.intervals[kind]
        assert low <= result.metrics[kind] <= high


def test_foils_of_the_data_by_one_who_knows():
    truth = Truth((row["image"], [row["caption"]]) for row in records())
    metrics = run("foils", truth, caption="caption", foils="foils").metrics
    assert [metrics[kind] for kind in ("object", "attribute", "relation", "count", "order")] == [1.0] * 5
    assert (
        run("foils", Truth((row["image"], []) for row in records()), caption="caption", foils="foils").metrics["object"]
        == 0.5
    ), "ties"
    one = run("foils", LEARNED, caption="minimal_pair/caption", foils="minimal_pair/text", kinds="foil").metrics
    assert one["foil_pairs"] == 50 and one["foil_left_out"] == 0
    with pytest.raises(UserError, match="the kind of foils is `size`; expected one of: attribute, count, object"):
        run("foils", truth, caption="caption", foils="foils", kinds=["size"])
    with pytest.raises(UserError, match="no text under caption has a foil under wrong"):
        run("foils", truth, caption="caption", foils="wrong")
