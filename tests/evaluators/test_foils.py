"""Wrong captions made from right ones, and models that tell them apart, or do not."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax import evaluators
from vlm_jax.data import emoji
from vlm_jax.errors import UserError
from vlm_jax.evaluators.tasks.foil_texts import KINDS, corpus, foil

CAPTIONS = {
    "black cat": "mammal", "polar bear": "mammal", "dog face": "mammal", "cat face": "mammal", "orange fox": "mammal",
    "glass of milk": "drink", "teapot": "drink", "hot beverage": "drink",
    "man walking: facing right": "person", "person in bed": "person", "judge": "person", "page facing Left": "paper",
    "fork and knife": "dish", "frog": "amphibian",
}  # fmt: skip


def foils_of(caption, true=(), captions=CAPTIONS):
    others = corpus(list(captions), list(captions.values()))
    return {kind: foil(kind, caption, captions[caption], true, others) for kind in KINDS}


@pytest.mark.parametrize(
    ("caption", "objects", "attributes", "order"),
    [
        ("black cat", {"black polar bear", "black dog face", "black fox"}, {"orange cat"}, "cat black"),
        ("cat face", {"polar bear", "orange fox"}, {None}, "face cat"),
        ("glass of milk", {"teapot of milk", "hot beverage of milk"}, {None}, "milk of glass"),
        ("man walking: facing right", {"judge walking: facing right"}, {"man walking: facing left"},
         "right walking: facing man"),
        ("page facing Left", set(CAPTIONS), {"page facing Right"}, "Left facing page"),
        ("person in bed", {None}, {None}, "bed in person"),
        ("fork and knife", set(CAPTIONS), {None}, None),
        ("frog", set(CAPTIONS) - {"frog"}, {None}, None),
    ],
)  # fmt: skip
def test_rules(caption, objects, attributes, order):
    found = foils_of(caption)
    assert found["object"] in objects and found["attribute"] in attributes and found["order"] == order
    assert found == foils_of(caption)


def test_what_may_be_true_is_no_foil():
    assert foils_of("black cat", ["an orange cat, or a black one"])["attribute"] is None
    assert foils_of("black cat", ["Cat, black"])["order"] is None
    assert foils_of("teapot", ["a beverage that is hot"])["object"] == "glass"
    assert foils_of("black cat", ["bear dog face fox polar"])["object"] not in (
        "black polar bear", "black dog face", "black fox",
    )  # fmt: skip


def test_foils_of_the_embedded_names():
    """Names and groups as they are; texts that no two rules share."""
    table = emoji.concept_table()
    names, groups = [row["names"]["en"] for row in table], [row["subgroup"] for row in table]
    others = corpus(names, groups)
    made = {kind: [foil(kind, *pair, (), others) for pair in zip(names, groups, strict=True)] for kind in KINDS}
    assert {kind: sum(text is not None for text in own) for kind, own in made.items()} == {
        "object": 1581,
        "attribute": 216,
        "order": 1078,
    }
    for kind, own in made.items():
        assert all(text != name for text, name in zip(own, names, strict=True)), kind
    at = names.index
    assert made["order"][at("person in bed")] == "bed in person"
    assert made["attribute"][at("waxing crescent moon")] == "waning crescent moon"


class Reader:
    """Two towers: a picture is its colour, red or blue; a text is the colours it names, in its first or last word."""

    preprocess = "resize(4) | to_float"
    tokenizer = None

    def embed_image_batch(self, images):
        return images.mean((1, 2))[:, [0, 2]].astype(np.float32)

    def embed_texts(self, texts):
        return np.array([["red" in text.split(), "blue" in text.split()] for text in texts], np.float32)


class Scorer(Reader):
    """A captioner that likes texts with "square" at their end."""

    is_captioner = True

    def score_batch(self, images, texts):
        assert len(images) == len(texts)
        return np.array([float(text.endswith("square")) for text in texts]), np.ones(len(texts))


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    rows = []
    for i, name in enumerate(["red square", "blue square", "red circle", "blue", "", "red square"]):
        Image.new("RGB", (8, 8), (0, 0, 255) if "blue" in name else (255, 0, 0)).save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "text": name, "kind": "shape"}))
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    names = {"caption": "text", "label": "text", "group": "kind", "true": []}
    return {"type": "foils", "uri": f"jsonl:{folder}/pictures.jsonl", **names}


@pytest.mark.parametrize("batch_size", [2, 64])
def test_who_reads_colours_tells_attributes_apart(section, batch_size):
    evaluate = evaluators.build(section | {"batch_size": batch_size})
    metrics = evaluate(Reader()).metrics
    assert (metrics["attribute"], metrics["attribute_pairs"]) == (1.0, 5)
    assert (metrics["order"], metrics["order_pairs"]) == (0.5, 4), "the same words: ties"
    assert (metrics["examples"], metrics["chance"]) == (5, 0.5)
    result = evaluate(Scorer())
    assert result.metrics["attribute"] == 0.5
    assert result.metrics["order"] == pytest.approx((3 * 1 + 0.5) / 4), "circles tie"
    assert ("order", 2, "red circle", "circle red", 0.5) in result.artifacts["pairs"]


def test_untrained_models(captioner, two_tower):
    section = {"type": "foils", "uri": "tfds:emoji", "split": "unseen_style", "batch_size": 16}
    section["where"] = {"subgroup": ["animal-mammal", "heart"]}
    for model in (captioner, two_tower):
        metrics = evaluators.build(section)(model).metrics
        assert metrics["examples"] == metrics["object_pairs"] == 75
        assert all(0 <= metrics[kind] <= 1 for kind in KINDS)
    one = evaluators.build(section | {"kinds": "order"})(two_tower).metrics
    assert one["order"] == metrics["order"] and "object" not in one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ["size"]}, "the kind of foils is `size`; expected one of: object, attribute, order"),
        ({"caption": "name"}, "no text under name has a foil of the kinds object, attribute, order"),
    ],
)
def test_mistakes_are_named(section, changes, message):
    with pytest.raises(UserError, match=message):
        evaluators.build(section | changes)(Reader())
