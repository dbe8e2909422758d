"""The captions evaluator, on a writer that reads colours, and on an untrained captioner."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax import evaluators
from vlm_jax.errors import UserError
from vlm_jax.evaluators.progress import Progress


class Writer:
    """Writes "red one" or "blue one"; the log p of a text is minus its letters, each word is a token."""

    preprocess = "resize(4) | to_float"
    tokenizer = None
    is_captioner = True

    def caption_batch(self, images, method, suffix="one"):
        assert method == "greedy"
        return [f"{'red' if image[..., 0].mean() > 0.5 else 'blue'} {suffix}" for image in images]

    def score_batch(self, images, texts):
        assert len(images) == len(texts)
        return np.array([-len(text) for text in texts], np.float32), np.array([len(text.split()) for text in texts])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven: red, blue, red, ...; the sixth is called by the wrong name, the last has no text."""
    folder = tmp_path_factory.mktemp("colours")
    texts = [["Red one.", "a red one"], ["blue one"], ["red thing"], ["blue one"], ["red one"], ["red one"], []]
    rows = []
    for i, own in enumerate(texts):
        Image.new("RGB", (8, 8), ((255, 0, 0), (0, 0, 255))[i % 2]).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": own, "label": i % 2, "title": ""}))
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    return f"jsonl:{folder}/pictures.jsonl"


@pytest.mark.parametrize("batch_size", [2, 4, 64])
def test_numbers_do_not_depend_on_the_batch_size(pictures, batch_size):
    section = {"type": "captions", "uri": pictures, "captions": ["caption", "title"], "batch_size": batch_size}
    result = evaluators.build(section)(Writer())
    assert result.metrics["exact_match"] == pytest.approx(4 / 6)
    assert result.metrics["bleu1"] == pytest.approx(10 / 12), "one wrong noun, one wrong colour"
    assert result.metrics["bleu4"] == 0 and 0 < result.metrics["cider"] < 5
    assert result.metrics["rouge_l"] == pytest.approx((4 + 2 * 0.5) / 6)
    letters, words = 8 + 9 + 8 + 9 + 8 + 7 + 7, 2 + 3 + 5 * 2
    assert result.metrics["perplexity"] == pytest.approx(np.exp(letters / words))
    assert (result.metrics["examples"], result.metrics["left_out"]) == (6, 1)
    gallery = result.artifacts["gallery"]
    assert gallery["images"].shape == (6, 96, 96, 3)
    assert gallery["truth"] == ["red one", "blue one", "red thing", "blue one", "red one", "red one"]
    assert gallery["names"] == [["red one"], ["blue one"]] * 3
    np.testing.assert_allclose(gallery["scores"][:, 0], [1, 1, 0.5, 1, 1, 0.5])
    assert result.artifacts["captions"][2] == (2, "red one", ["red thing"])


def test_classes_and_options(pictures):
    section = {"type": "captions", "uri": pictures, "classes": {1: "blue"}, "options": {"suffix": "One"}, "gallery": 0}
    result = evaluators.build(section)(Writer())
    assert (result.metrics["examples"], result.metrics["left_out"]) == (3, 4)
    assert result.metrics["exact_match"] == pytest.approx(2 / 3) and "gallery" not in result.artifacts


def test_it_goes_on_after_a_kill(pictures, tmp_path):
    evaluate = evaluators.build({"type": "captions", "uri": pictures, "batch_size": 2})
    whole = evaluate(Writer()).metrics

    class Killed(Writer):
        calls, last = 0, 2

        def caption_batch(self, images, method):
            if self.calls == self.last:
                raise KeyboardInterrupt
            self.calls += 1
            return super().caption_batch(images, method)

    progress, model = Progress(tmp_path), Killed()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, progress=progress)
    progress.save(now=True)
    model.last = 4
    assert evaluate(model, progress=Progress(tmp_path)).metrics == whole
    assert model.calls == 3, "the fourth batch has no texts"


def test_an_untrained_captioner(captioner):
    section = {"type": "captions", "uri": "tfds:emoji", "split": "unseen_style", "captions": "name/en", "batch_size": 8}
    section["where"] = {"subgroup": ["animal-bug"]}
    result = evaluators.build(section)(captioner)
    assert result.metrics["examples"] == 11 and result.metrics["exact_match"] == 0
    assert 100 < result.metrics["perplexity"] < 1e6, "untrained, 2,985 tokens"
    assert all(text for _, text, _ in result.artifacts["captions"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "title"}, "no picture has a text under title"),
        ({"classes": {7: "green"}}, "under caption, or none whose `label` is among the classes"),
        ({"caption": "title"}, "has no key `caption`; did you mean `captions`?"),
    ],
)
def test_mistakes_are_named(pictures, changes, message):
    with pytest.raises(UserError, match=message):
        evaluators.build({"type": "captions", "uri": pictures} | changes)(Writer())


def test_two_towers_write_nothing(pictures, two_tower):
    with pytest.raises(UserError, match="this model has no decoder"):
        evaluators.build({"type": "captions", "uri": pictures})(two_tower)
