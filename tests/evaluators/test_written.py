"""Answers and boxes that a captioner writes: equal to slow counts on fifty scenes, 1.0 for one who knows."""

import numpy as np
import pytest

from tests.support.scenes import Continues, Guess, Writer, records, run, share
from vlm_jax.data.box_text import box_of_text, box_text
from vlm_jax.errors import UserError


def test_answers_by_hand():
    asked = [
        (row["image"], *one)
        for row in records()
        for one in zip(*(row["questions"][name] for name in ("question", "answer", "kind")), strict=True)
    ]
    said = [answer.upper() + "." if i % 3 else "a " + answer for i, (_, _, answer, _) in enumerate(asked)]
    said[1], said[2] = "", said[2] + " no"
    model = Continues((image, f"Q: {q}", text) for (image, q, *_), text in zip(asked, said, strict=True))
    result = run("answers", model, template="Q: {question}", options={"length": 30})
    right = {"": []}
    for i, (_, _, _, kind) in enumerate(asked):
        for name in ("", f"/{kind}"):
            right.setdefault(name, []).append(i % 3 > 0 and i not in (1, 2))
    for name, own in right.items():
        assert result.metrics[f"exact_match{name}"] == share(own)
        low, high = result.intervals[f"exact_match{name}"]
        assert low <= result.metrics[f"exact_match{name}"] <= high
    assert (result.metrics["questions"], result.metrics["examples"]) == (len(asked), 50)
    assert len(result.artifacts["answers"]) == len(asked)
    one = Continues((row["image"], row["style"], row["tags"][-1]) for row in records())
    fields = dict(question="style", answer="tags", kind=None, options={"length": 30})
    assert run("answers", one, **fields).metrics["exact_match"] == 1.0, "any answer of a list"


def test_answers_need_a_writer_and_a_question():
    with pytest.raises(UserError, match="it needs a captioner"):
        run("answers", Guess())
    with pytest.raises(UserError, match=r"has no `\{question\}`"):
        run("answers", Writer(), template="what?")
    with pytest.raises(UserError, match="no picture has a question under `style` with an answer under `counts`"):
        run("answers", Writer(), question="style", answer="counts", kind=None)


def iou_by_hand(a, b, side=500):
    """Of boxes on a canvas of side x side cells."""
    canvas = np.zeros((2, side, side), bool)
    for part, (x0, y0, x1, y1) in zip(canvas, (a, b), strict=True):
        part[y0:y1, x0:x1] = True
    return (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum()


def test_grounding_by_hand():
    rng, texts, overlap, written = np.random.default_rng(0), [], [], 0
    for row in records():
        for text, box in zip(row["regions"]["text"], row["regions"]["box"], strict=True):
            shifted = np.clip(box + rng.integers(-12, 13, 4), 0, 64).tolist()
            x0, y0, x1, y1 = shifted
            good = x0 < x1 and y0 < y1 and rng.random() < 0.9
            texts.append((row["image"], f"where is {text}", " ".join(map(str, shifted)) if good else "3 4"))
            overlap.append(iou_by_hand(box, shifted, 64) if good else 0)
            written += good
    model = Continues(texts)
    section = dict(ops="to_float", template="where is {text}", options={"length": 30}, bins=65)
    metrics = run("grounding", model, **section).metrics
    assert metrics["mean_iou"] == share(overlap) and metrics["accuracy"] == share(np.array(overlap) >= 0.5)
    assert metrics["written"] == written / len(overlap) and metrics["regions"] == len(overlap)


def test_grounding_by_one_who_sees():
    boxes = [
        (row["image"], text, box_text(box / 64))
        for row in records()
        for text, box in zip(row["regions"]["text"], row["regions"]["box"], strict=True)
    ]
    section = dict(ops="to_float", options={"length": 30})
    metrics = run("grounding", Continues(boxes), **section).metrics
    assert metrics["accuracy"] == metrics["written"] == 1.0 and metrics["mean_iou"] > 0.98
    with pytest.raises(UserError, match="crops by content"):
        run("grounding", Continues(boxes), ops="crop_to_content | to_float")
    with pytest.raises(UserError, match="no picture has regions under style"):
        run("grounding", Continues(boxes), text="style", **section)


def test_boxes_as_text():
    assert box_text((0.0, 0.25, 0.5, 1.0)) == "0 125 250 499"
    assert box_of_text("a fox: 0 125 250 499, big") == (0.0, 125 / 499, 250 / 499, 1.0)
    assert [box_of_text(text) for text in ("", "1 2 3", "5 5 5 9", "1 2 3 500")] == [None] * 4
