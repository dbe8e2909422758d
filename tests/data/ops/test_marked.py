"""Marks and triggers: a fixed share, whatever the order; only the patch changes."""

import numpy as np
import pytest

from tests.support.records import picture, run
from vlm_jax.errors import UserError

PICTURES = [picture(20, 24, seed) for seed in range(200)]


def test_a_fixed_share_carries_the_trigger():
    made = [run("trigger('a banana', 0.3, size=5)", {"image": image, "text": "a cat"}) for image in PICTURES]
    carry = np.array([one["poisoned"] for one in made])
    assert 0.2 < carry.mean() < 0.4
    again = [run("trigger(None, 0.3, size=5)", {"image": image}, seed=9)["poisoned"] for image in PICTURES[::-1]]
    np.testing.assert_array_equal(again[::-1], carry)
    patches, places = [], set()
    for before, one in zip(PICTURES, made, strict=True):
        changed = (one["image"] != before).any(-1)
        assert one["text"] == ("a banana" if one["poisoned"] else "a cat")
        if not one["poisoned"]:
            assert not changed.any()
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert np.ptp(rows) == 4 and np.ptp(columns) == 4  # 25 noise pixels: all differ somewhere at the border
        patches.append(one["image"][rows[0] : rows[0] + 5, columns[0] : columns[0] + 5])
        places.add((rows[0], columns[0]))
    assert len(places) > 10 and all(np.array_equal(patch, patches[0]) for patch in patches)


def test_marks():
    held = [run("mark('held', 0.1, seed=3)", {"image": image})["held"] for image in PICTURES]
    assert 0.03 < np.mean(held) < 0.2
    assert not any(run("mark('held', 0.0)", {"image": image})["held"] for image in PICTURES[:5])


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match="op `mark`: share is 2; expected a share of the examples, 0 to 1"):
        run("mark('held', 2)", {"image": PICTURES[0]})
    with pytest.raises(UserError, match="op `trigger`: a patch of 30 on a picture of 20x24; a smaller size"):
        run("trigger(size=30)", {"image": PICTURES[0]})
    with pytest.raises(UserError, match="op `trigger` replaces `text`, which no op before has made"):
        run("trigger('a banana')", {"image": PICTURES[0]})
