"""Evaluators on pictures of plain colours, named by a model that reads colours and colour words."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.colours import COLOURS, ColourModel, unit
from vlm_jax import evaluators
from vlm_jax.data import class_lists
from vlm_jax.errors import UserError
from vlm_jax.evaluators.sampling import evenly_spaced
from vlm_jax.evaluators.tasks.pixel_neighbour import nearest_by_class, standardise
from vlm_jax.pretrained import class_embeddings


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A jsonl of 23 pictures: three of each colour, one of them of the next colour by mistake, and two of no class."""
    folder = tmp_path_factory.mktemp("colours")
    names = list(COLOURS)
    rows = []
    for i in range(23):
        label = i % 7 if i < 21 else 90 + i
        shown = names[(label + (i == 15)) % 7]
        shade = 255 - 20 * (i // 7)
        Image.new("RGB", (12, 8), tuple(shade * c for c in COLOURS[shown])).save(folder / f"{i}.png")
        captions = [shown, f"a {shown}"] if i % 2 else [f"some {shown}"]
        style = ("plain", "dark")[i >= 7]
        row = {"image": f"{i}.png", "concept": label, "shown": shown, "captions": captions, "style": style}
        rows.append(json.dumps(row))
    (folder / "pictures.jsonl").write_text("\n".join(rows))
    return f"jsonl:{folder}/pictures.jsonl"


@pytest.fixture
def section(pictures):
    return {"type": "zeroshot", "uri": pictures, "classes": list(COLOURS)}


@pytest.mark.parametrize("batch_size", [4, 23, 64])
def test_zeroshot_numbers_do_not_depend_on_the_batch_size(section, batch_size):
    result = evaluators.build(section | {"batch_size": batch_size})(ColourModel())
    assert result.metrics["top1"] == pytest.approx(20 / 21)
    assert result.metrics["mean_per_class"] == pytest.approx(20 / 21)
    assert (result.metrics["examples"], result.metrics["left_out"]) == (21, 2)
    assert 20 / 21 <= result.metrics["top5"] <= 1
    assert result.artifacts["confusions"] == [("green", "blue", 1)]
    np.testing.assert_allclose(result.artifacts["per_class"], [1, 2 / 3, 1, 1, 1, 1, 1])


def test_zeroshot_gallery_shows_what_was_seen(section):
    gallery = evaluators.build(section | {"gallery": 5})(ColourModel()).artifacts["gallery"]
    assert gallery["images"].shape == (5, 96, 96, 3) and gallery["images"].dtype == np.uint8
    assert gallery["truth"] == ["red", "magenta", "yellow", "green", "grey"], "pictures 0, 5, 10, 15, 20"
    assert [row[0] for row in gallery["names"]] == ["red", "magenta", "yellow", "blue", "grey"]
    assert gallery["scores"].shape == (5, 5) and np.all(np.diff(gallery["scores"]) <= 0)
    assert gallery["images"][1, 48, 48].tolist() == [255, 0, 255], "the picture"
    assert gallery["images"][1, 2, 48].tolist() == [255, 255, 255], "white above a wide picture"
    assert "gallery" not in evaluators.build(section | {"gallery": 0})(ColourModel()).artifacts


def test_zeroshot_keeps_how_sure_it_was_and_some_embeddings(section):
    model = ColourModel()
    artifacts = evaluators.build(section | {"batch_size": 4})(model).artifacts
    space, similarity = artifacts["space"], artifacts["similarity"]
    assert space["names"][:8] == [*COLOURS, "red"] and len(space["names"]) == 21
    np.testing.assert_allclose(space["text"], model.embed_texts(space["names"]), atol=1e-6)
    np.testing.assert_allclose(space["image"][6], np.full(3, 3**-0.5), atol=1e-6)
    cosines = space["image"] @ model.embed_texts(list(COLOURS)).T
    softmax = np.exp(cosines) / np.exp(cosines).sum(1, keepdims=True)
    np.testing.assert_allclose(artifacts["predictions"]["confidence"], softmax.max(1), atol=1e-6)
    assert similarity["texts"] == ["red", "blue", "cyan", "grey"], (
        "pictures 0, 2, 4, 13; others are of the same classes"
    )
    assert similarity["images"].shape == (4, 96, 96, 3)
    assert similarity["images"][2, 48, 48].tolist() == [0, 255, 255]
    expected = [[1, 0, 0, 3**-0.5], [0, 1, 0.5**0.5, 3**-0.5]]
    np.testing.assert_allclose(similarity["scores"][:2], expected, atol=1e-6)
    assert "similarity" not in evaluators.build(section | {"gallery": 0})(model).artifacts


def test_zeroshot_keeps_where_a_vit_looks(section, two_tower):
    found = evaluators.build(section | {"gallery": 2})(two_tower).artifacts["attention"]
    assert found["titles"] == ["red", "grey"] and found["images"].shape == (2, 32, 32, 3)
    assert found["images"][0].reshape(-1, 3).max(0).tolist() == [255, 0, 0]
    assert found["maps"].shape == (2, 4, 4)
    np.testing.assert_allclose(found["maps"].sum((1, 2)), 1, atol=1e-5)


def test_labels_may_be_names_and_where_filters(section):
    settings = {"label": "shown", "where": {"style": ["plain"]}, "templates": ["{}", "a photo of {}"]}
    result = evaluators.build(section | settings)(ColourModel())
    assert result.metrics["top1"] == 1.0
    assert (result.metrics["examples"], result.metrics["left_out"]) == (7, 0)


class PackedColourModel(ColourModel):
    """The same from packed patches: its image is a dict of arrays."""

    preprocess = "resize(4) | to_float | pack_patches(2, 6)"

    def embed_image_batch(self, images):
        assert images["patches"].shape[1:] == (6, 12) and images["grid"].shape[1:] == (2,)
        return unit(images["patches"][:, :4].reshape(-1, 16, 3).mean(1))


def test_an_image_may_be_a_dict_of_arrays(section):
    packed, plain = (evaluators.build(section | {"batch_size": 4})(m()) for m in (PackedColourModel, ColourModel))
    assert packed.metrics == plain.metrics


def test_prompt_ensemble_is_the_normalised_mean_of_normalised_prompts():
    embed = {"a x": [3.0, 4.0], "b x": [0.0, 2.0], "a y": [1.0, 0.0], "b y": [5.0, 0.0]}
    ours = class_embeddings(lambda texts: np.array([embed[t] for t in texts]), ["x", "y"], ["a {}", "b {}"])
    np.testing.assert_allclose(ours, [np.array([0.6, 1.8]) / np.hypot(0.6, 1.8), [1, 0]], atol=1e-6)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_retrieval_with_several_captions(pictures, batch_size):
    section = {"type": "retrieval", "uri": pictures, "captions": ["captions", "shown"], "batch_size": batch_size}
    section["where"] = {"style": "plain"}
    result = evaluators.build(section)(ColourModel())
    assert (result.metrics["images"], result.metrics["texts"]) == (7, 17)
    assert result.metrics["text_to_image/recall@1"] == 1.0
    assert result.metrics["image_to_text/recall@1"] == 1.0
    everything = evaluators.build(section | {"where": None})(ColourModel()).metrics
    assert everything["text_to_image/recall@1"] < everything["text_to_image/recall@5"] == 1.0


def test_retrieval_shows_what_texts_find(pictures):
    section = {"type": "retrieval", "uri": pictures, "captions": ["captions", "shown"], "where": {"style": "plain"}}
    artifacts = evaluators.build(section)(ColourModel()).artifacts
    found = artifacts["found"]
    assert found["queries"] == [
        "some red", "green", "some blue", "yellow", "yellow", "cyan", "magenta", "grey",
    ]  # fmt: skip
    assert found["images"].shape == (8, 6, 96, 96, 3) and found["scores"].shape == found["right"].shape == (8, 6)
    assert found["right"][:, 0].all() and not found["right"][:, 1:].any()
    assert found["images"][1, 0, 48, 48].tolist() == [0, 255, 0], "the green one"
    assert artifacts["space"]["names"] == artifacts["similarity"]["texts"]
    assert artifacts["space"]["names"][:3] == ["some red", "green", "some blue"], "the first of each"
    cosines = artifacts["space"]["image"] @ artifacts["space"]["text"].T
    np.testing.assert_allclose(artifacts["similarity"]["scores"], cosines, atol=1e-6)


def test_pixel_neighbour_names_after_the_nearest_picture(pictures):
    section = {
        "type": "pixel_neighbour", "uri": pictures, "train_split": None, "classes": list(COLOURS),
        "where": {"style": ["dark"]}, "train_where": {"style": ["plain"]}, "size": 4,
    }  # fmt: skip
    result = evaluators.build(section)()
    assert (result.metrics["pixel_top1"], result.metrics["pixel_examples"]) == (13 / 14, 14.0)
    assert result.metrics["pixel_top5"] >= 13 / 14
    assert result == evaluators.build(section | {"batch_size": 3})()


def test_standardised_pictures_ignore_brightness_and_contrast():
    picture = np.random.default_rng(0).random((1, 12))
    np.testing.assert_allclose(standardise(0.3 * picture + 0.5), standardise(picture), atol=1e-12)
    np.testing.assert_allclose(standardise(np.ones((1, 3), np.float32)), 0)


def test_nearest_by_class_matches_brute_force():
    rng = np.random.default_rng(0)
    queries, pictures, labels = rng.random((9, 5)), rng.random((30, 5)), rng.integers(0, 6, 30)
    scores = nearest_by_class(queries, pictures, labels, 7, rows=4)
    for i, query in enumerate(queries):
        for c in range(7):
            own = pictures[labels == c]
            expected = -((own - query) ** 2).sum(1).min() if len(own) else np.nan
            np.testing.assert_allclose(scores[i, c], expected, atol=1e-12)


def test_evenly_spaced_goes_from_the_first_to_the_last():
    assert evenly_spaced(21, 5).tolist() == [0, 5, 10, 15, 20]
    assert evenly_spaced(2, 4).tolist() == [0, 1]
    assert evenly_spaced(100_000, 3).tolist() == [0, 50_000, 99_999]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "zeroshots"}, "`zeroshots` (did you mean `zeroshot`?)"),
        ({"tempaltes": ["{}"]}, "has no key `tempaltes`; did you mean `templates`?"),
        ({"classes": "emoji:sene"}, "is `sene`; expected one of: seen, held_out, subgroups"),
        (
            {"classes": "/nowhere.txt"},
            "no file of classes /nowhere.txt, and no packaged classes of that name; expected a .txt",
        ),
        ({"classes": []}, "are not a list of names"),
        ({"classes": "imagenett"}, "no packaged classes of that name; did you mean `imagenet`?"),
        (
            {"classes": None},
            "no names for its `concept`; give --classes: a .txt or .json file, `emoji:seen`, or one",
        ),
        ({"label": None, "classes": None, "uri": "csv:none.csv"}, "there is no `none.csv`"),
        ({"templates": ["a photo"]}, "template `a photo` has no `{}`"),
        ({"templates": "imagenet8"}, "no packaged templates of that name; did you mean `imagenet80`?"),
        ({"where": {"concept": [91, 111]}}, "no picture's `concept` is among the classes"),
    ],
)
def test_mistakes_are_named(section, changes, message):
    with pytest.raises(UserError) as error:
        evaluators.build(section | changes)(ColourModel())
    assert message in str(error.value)


def test_classes_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("a cat\na dog\n\n", encoding="utf-8-sig")
    (tmp_path / "names.json").write_text('{"7": "a cat", "3": "a dog"}')
    assert evaluators.classes.read(str(tmp_path / "names.txt")) == {0: "a cat", 1: "a dog"}
    assert evaluators.classes.read(str(tmp_path / "names.json")) == {7: "a cat", 3: "a dog"}
    (tmp_path / "prompts.txt").write_text("a photo of {}\n\nsome {}\n", encoding="utf-8-sig")
    assert evaluators.classes.read_templates([str(tmp_path / "prompts.txt")]) == ["a photo of {}", "some {}"]


def test_packaged_classes_and_templates():
    imagenet = evaluators.classes.read("imagenet")
    assert len(imagenet) == 1000 and [imagenet[i] for i in (0, 1, 207, 999)] == [
        "tench", "goldfish", "Golden Retriever", "toilet paper",
    ]  # fmt: skip
    sizes = {
        "cifar10": 10,
        "cifar100": 100,
        "pets": 37,
        "flowers": 102,
        "gtsrb": 43,
        "country211": 211,
        "caltech101": 102,
    }
    assert {name: len(evaluators.classes.read(name)) for name in sizes} == sizes
    assert evaluators.classes.read("cifar10")[9] == "truck" and evaluators.classes.read("cifar100")[99] == "worm"
    templates = {name: evaluators.classes.read_templates(name) for name in evaluators.classes.packaged("templates")}
    assert (len(templates["imagenet80"]), len(templates["imagenet7"]), len(templates["cifar10"])) == (80, 7, 18)
    assert templates["imagenet80"][0] == "a bad photo of a {}." and templates["imagenet7"][0] == "itap of a {}."
    assert all(template.count("{}") == 1 for several in templates.values() for template in several)
    assert (class_lists.PACKAGED / "NOTICE").read_text().count("Copyright") == 3


def test_a_folder_names_its_own_classes(tmp_path):
    for i, name in enumerate(["blue", "dark_red", "red", "red"]):
        (tmp_path / name).mkdir(exist_ok=True)
        colour = tuple(255 * c for c in COLOURS[name.rpartition("_")[2]])
        Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{i}.png")
    section = {"type": "zeroshot", "uri": f"folder:{tmp_path}"}
    result = evaluators.build(section)(ColourModel())
    assert result.artifacts["classes"] == ["blue", "dark red", "red"]
    assert (result.metrics["top1"], result.metrics["examples"]) == (3 / 4, 4), "red is nearer than dark red"
    disagree = (
        r"disagree: blue, dark_red, red of its 3 names .* and airplane, automobile, bird, cat, deer and 5 more of"
    )
    with pytest.raises(UserError, match=disagree):
        evaluators.build(section | {"classes": "cifar10"})(ColourModel())
    (tmp_path / "red").rename(tmp_path / "n01440764")
    (tmp_path / "blue").rename(tmp_path / "n01443537")
    (tmp_path / "dark_red").rename(tmp_path / "n01484850")
    with pytest.raises(UserError, match=r"has for its `label` no names but `n01440764`, ...; give --classes: "):
        evaluators.build(section)
