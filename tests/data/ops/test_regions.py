"""Regions: a phrase and its box as texts; prompts and what is predicted after them."""

import re

import numpy as np
import pytest

from tests.support.records import encode, picture, run
from vlm_jax.data import tokenizers
from vlm_jax.data.box_text import box_of_text
from vlm_jax.data.ops import regions
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

EMOJI = tokenizers.build("emoji")
RECORD = {"image": picture(48, 64), "said": ["a fox", "two owls"], "box": [[16, 12, 32, 48], [0, 0, 64, 24]]}
DRAW = "region('said', 'box')"


def test_a_phrase_comes_with_its_own_box():
    found = {(out["region"], out["region_box"]) for out in (run(DRAW, RECORD, seed) for seed in range(20))}
    assert found == {("a fox", "125 125 250 499"), ("two owls", "0 0 499 250")}


@pytest.mark.parametrize(
    "options, box",
    [("form='yxyx'", [12, 16, 48, 32]), ("form='xywh'", [16, 12, 16, 36]), ("shares=True", [0.25, 0.25, 0.5, 1.0])],
)
def test_boxes_come_in_other_forms(options, box):
    out = run(f"region('said', 'box', {options})", RECORD | {"said": "a fox", "box": np.array(box)})
    assert out["region_box"] == "125 125 250 499"


def test_scenes_say_where_their_things_are():
    """The box that is written is that of the object, to a part in 500."""
    for i in range(20):
        record = open_source("scenes:?size=64", "train")[i]
        out = run("region('regions/text', 'regions/box', least=0)", record, i)
        if not len(record["regions"]["text"]):
            assert out["region"] == out["region_box"] == ""
            continue
        true = record["regions"]["box"][record["regions"]["text"].index(out["region"])]
        np.testing.assert_allclose(64 * np.array(box_of_text(out["region_box"])), true, atol=64 / 998 + 1e-9)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(box=[[16, 12, 80, 48]] * 2),
            "box 1 of `box`, (16.0, 12.0, 80.0, 48.0) (x0, y0, x1, y1), is not inside of",
        ),
        (dict(box=[[-3, 12, 30, 48]] * 2), "is not inside of the picture, 64 x 48"),
        (dict(box=[[np.nan, 12, 30, 48]] * 2), "is not inside of the picture"),
        (dict(box=[[16, 12, 16, 48]] * 2), "encloses nothing"),
        (dict(box=[[16, 12, 30, 48]]), "`box` has 1 boxes for 2 phrases"),
        (dict(box=[[16, 12, 30]] * 2), "expected boxes of four numbers"),
        (dict(box="a box"), "`box` is 'a box'; expected boxes of four numbers"),
        (dict(said=["a fox", " "]), "region 1 of `said` has no phrase"),
        (dict(said=[], box=[]), "has no regions under `said`"),
        (dict(said=None), "has no regions under `said`"),
    ],
)
def test_boxes_that_are_none_are_named(change, message):
    with pytest.raises(BadExample, match=re.escape(message)):
        run(DRAW, RECORD | change, seed=0)


def test_fields_that_are_lacking_are_named():
    with pytest.raises(BadExample, match="has no field `box`"):
        run(DRAW + " | region('said', 'box', least=0)", {"image": RECORD["image"], "said": ["a fox"]})
    with pytest.raises(UserError, match="put `decode` first"):
        run(DRAW, RECORD | {"image": encode(RECORD["image"])})
    with pytest.raises(UserError, match="expected a text: use `caption` first"):
        run("prompted(8, 'cap :', '{said}', 'cap')", RECORD, tokenizer=EMOJI)


def test_a_rounded_box_is_inside():
    assert run(DRAW, RECORD | {"said": "a fox", "box": [0, 0, 64.02, 48]})["region_box"] == "0 0 499 499"


def test_a_prompt_does_not_count_and_a_target_ends():
    ops = "prompted(10, 'Box of {region} :', '{region_box}', 'aref', ops=lower)"
    out = run(ops, RECORD | {"region": "fox", "region_box": "1 2"}, tokenizer=EMOJI)
    given, wanted = EMOJI.encode("box of fox :"), [*EMOJI.encode("1 2"), EMOJI.eos_id]
    token_ids = [*given, *wanted]
    np.testing.assert_array_equal(out["aref_token_ids"], token_ids + [EMOJI.pad_id] * (10 - len(token_ids)))
    np.testing.assert_array_equal(np.flatnonzero(out["aref_counts"]), np.arange(len(given), len(token_ids)))
    short = run(ops.replace("10", str(len(given) + 1)), RECORD | out, tokenizer=EMOJI)
    np.testing.assert_array_equal(short["aref_token_ids"], token_ids[:-2])
    with pytest.raises(BadExample, match=f"the prompt of `aref` has {len(given)} tokens, and leaves no room"):
        run(ops.replace("10", str(len(given))), RECORD | out, tokenizer=EMOJI)
    empty = run(ops, RECORD | {"region": "fox", "region_box": ""}, tokenizer=EMOJI)
    assert not empty["aref_counts"].any() and np.all(empty["aref_token_ids"] == EMOJI.pad_id)


def test_drawing_is_uniform():
    rng = np.random.default_rng(0)
    drawn = [regions.region(RECORD, rng, "said", "box")["region"] == "a fox" for _ in range(400)]
    assert 0.4 < np.mean(drawn) < 0.6
