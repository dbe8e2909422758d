"""Labels become classes by name, over sources that number differently."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.support.colours import COLOURS, ColourModel, Colours
from vlm_jax import evaluators
from vlm_jax.adapt.protocol import few_shot
from vlm_jax.data.source import Source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes
from vlm_jax.evaluators.labels import Classes, fewer, plain


def look(named, own=None):
    return Classes(named).look(own, "the data")


def each(named, *values, own=None):
    return [look(named, own)(value) for value in values]


def test_names_are_equal_up_to_case_underscores_and_hyphens():
    assert plain("Hot_Dog") == plain("hot-dog") == plain("hot  dog\n") == "hot dog"
    assert plain("cafe\N{COMBINING ACUTE ACCENT}") == plain("CAF\N{LATIN CAPITAL LETTER E WITH ACUTE}")
    assert len({plain(name) for name in ("-1", "1", "c", "c++", "hotdog", "hot dog", "_")}) == 7


def test_a_label_without_a_list_of_its_own():
    named = dict(enumerate(["cat", "hot dog", "bird"]))
    assert each(named, 1, 1.0, np.int64(2), "Hot_dog", "bird\n", b"cat", [2]) == [1, 1, 2, 1, 2, 0, 2]
    assert each(named, "2", "02", " 2\n") == [2, 2, 2], "numeric text of a csv is a number of the list"
    assert each(named, 3, -1, "3", "cats", "", None, float("nan"), {}, [], [1, 2]) == [None] * 10
    digits = dict(enumerate(["5", "7", "3"]))
    assert each(digits, "3", "7", "0", 0) == [2, 1, None, 0], "where names are numbers, text is a name"
    assert each({"dog": "a photo of dogs", "Cat": "a photo of cats"}, "cat", "dog", "a photo of cats", 0) == [
        1,
        0,
        1,
        None,
    ]


def test_a_number_means_its_name_in_the_data_sets_own_list():
    own = {0: "bird", 1: "Cat", 2: "hot_dog"}
    named = dict(enumerate(["cat", "hot dog", "bird"]))
    assert each(named, 0, 1, 2, "cat", own=own) == [2, 0, 1, 0], "a list in another order"
    assert each({0: "cat", 1: "bird"}, 0, 1, 2, own=own) == [1, 0, None], "a part of the folders"
    assert each(dict(enumerate(["fish", "bird", "hot-dog", "cat"])), 0, 1, 2, own=own) == [1, 3, 2], "a longer list"
    assert each({"bird": "a robin", "cat": "a tabby", "hot-dog": "a sausage"}, 0, 1, 2, own=own) == [0, 1, 2]
    numbers = {i: str(i) for i in range(3)}
    assert each(named, 0, 1, 2, own=numbers) == [0, 1, 2], "folders 0, 1, 2 are numbers of the list"
    assert each(dict(enumerate(["2", "1", "0"])), 0, 1, 2, own=numbers) == [2, 1, 0], "or names, if names are numbers"
    assert each(classes.read("imagenet"), 0, 1, own={0: "n01443537", 1: "n01440764"}) == [1, 0], "WordNet ids"
    assert each(classes.read("cifar10"), 0, own={0: "7"}) == [7]


@pytest.mark.parametrize(
    ("named", "own", "shown"),
    [
        (["cat", "dog"], ["cats", "dogs"], ["cats, dogs of its 2", "cat, dog of the 2"]),
        (["cat", "dog", "bird"], ["cat", "dogs", "bird"], ["dogs of its 3", "dog of the 3"]),
        (["dog", "cat"], ["n01440764", "n01443537"], ["n01440764, n01443537 of its 2", "dog, cat of the 2"]),
        ({7: "cat", 3: "dog"}, ["kitty", "dog"], ["kitty of its 2", "cat of the 2", '{"kitty": "cat"}']),
        ({0: "one", 1: "two"}, {1: "1", 2: "2"}, ["2 of its 2", "one of the 2"]),
    ],
)
def test_where_names_and_folders_disagree_both_are_shown(named, own, shown):
    named = classes.read(named)
    own = own if isinstance(own, dict) else dict(enumerate(own))
    with pytest.raises(UserError) as error:
        look(named, own)
    text = str(error.value)
    assert all(text.count(name) for name in shown), text
    assert "the data and the classes disagree" in text and ".json" in text and "\n" not in text


def test_two_labels_of_one_name_are_one_class():
    imagenet = Classes(classes.read("imagenet"))
    assert imagenet.repeated == ["missile", "sunglasses"] and len(imagenet) == 998
    missiles = [label for label, name in imagenet.named.items() if name == "missile"]
    found = imagenet.look(None, "")
    assert len({found(label) for label in (*missiles, "missile", "Missile")}) == 1
    assert imagenet.names[found(999)] == "toilet paper" and found("1000") is None


def test_no_prediction_of_a_repeated_name_is_wrong(tmp_path):
    names = ["red", "blue", "red"]
    for i, name in enumerate(names):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (8, 8), tuple(int(255 * c) for c in COLOURS[name])).save(tmp_path / str(i) / "a.png")
    result = evaluators.build({"type": "zeroshot", "uri": f"folder:{tmp_path}", "classes": names})(ColourModel())
    assert result.metrics["top1"] == result.metrics["mean_per_class"] == 1.0 and result.metrics["ties"] == 0
    assert result.artifacts["classes"] == ["red", "blue"]
    assert result.notes == ["several labels have one name and are one class: red"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\n\ndog\n", "line 2 is empty, and line 1 names label 0"),
        ("a.txt", b"\ncat\n", "line 1 is empty"),
        ("a.txt", b"", "are not a list of names"),
        ("a.txt", "café".encode("latin-1"), "is not UTF-8 (byte 3); save it as UTF-8"),
        ("a.json", b"{", "is neither a .txt file of names nor JSON"),
        ("a.json", b'{"0": "cat", "0": "dog"}', "the key `0` is there twice"),
        ("a.json", b'{"0": "cat", "00": "dog"}', "the label 0 has two names, `cat` and `dog`"),
        ("a.json", b'["cat", ""]', "are not a list of names"),
        ("a.json", b'"cat"', "are not a list of names"),
        ("a.json", b"7", "are not a list of names"),
        ("a.json", b"[" * 9999, "nested too deeply"),
    ],
)
def test_mistakes_in_a_file_of_classes_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        classes.read(str(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_of_classes_keep_their_numbers(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffcat\r\nhot\u2028dog\r\nbird \r\n\r\n".encode())
    assert classes.read(str(tmp_path / "a.txt")) == {0: "cat", 1: "hot\u2028dog", 2: "bird"}
    (tmp_path / "a.json").write_text('{"cat": 1, "dog": 0}', encoding="utf-8-sig")
    assert classes.read(str(tmp_path / "a.json")) == {1: "cat", 0: "dog"}, "as torchvision's class_to_idx"


def table(folder, rows):
    """A csv of pictures: (colour of the picture, label)."""
    lines = ["image,label"]
    for i, (colour, label) in enumerate(rows):
        Image.new("RGB", (8, 8), tuple(int(255 * c) for c in COLOURS[colour])).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{label}")
    (folder / "a.csv").write_text("\n".join(lines))
    return f"csv:{folder}/a.csv"


def test_text_labels_of_a_csv_are_names(tmp_path):
    uri = table(tmp_path, [("red", "Red"), ("blue", "blue"), ("red", "red"), ("green", "")])
    result = evaluators.build({"type": "zeroshot", "uri": uri})(ColourModel())
    assert result.artifacts["classes"] == ["Red", "blue"], "`red` is `Red`"
    assert (result.metrics["top1"], result.metrics["examples"], result.metrics["left_out"]) == (1.0, 3, 1)
    uri = table(tmp_path, [("red", 2), ("blue", 0), ("red", "2")])
    section = {"type": "zeroshot", "uri": uri, "classes": ["blue", "green", "red"]}
    result = evaluators.build(section)(ColourModel())
    assert (result.metrics["top1"], result.metrics["left_out"]) == (1.0, 0), "numeric text is a number of the list"
    assert result.notes == ["1 of 3 classes have no picture: green"]
    assert result.artifacts["classes_without_picture"] == ["green"]
    assert evaluators.build(section | {"where": {"label": [2]}})(ColourModel()).metrics["examples"] == 2
    with pytest.raises(UserError, match=r"no picture's `label` is among the classes cyan, grey; the labels are"):
        evaluators.build(section | {"classes": {7: "cyan", 8: "grey"}})(ColourModel())


def test_labels_that_start_at_1_are_said(tmp_path):
    """The last of three labels is in no class and the first class has no picture."""
    uri = table(tmp_path, [("red", 1), ("green", 2), ("blue", 3), ("blue", 3)])
    notes = evaluators.build({"type": "zeroshot", "uri": uri, "classes": ["red", "green", "blue"]})(ColourModel()).notes
    assert notes[:2] == [
        "1 of 3 classes have no picture: red",
        "pictures with other labels are left out: 3 (2)",
    ]


def folders(root, split, names, count):
    rng = np.random.default_rng(0)
    for name in names:
        (root / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = (255 * np.array(COLOURS[name]) * 0.9 + rng.integers(0, 25, (8, 8, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("lacking", ["test", "train"])
def test_a_class_that_one_split_lacks_shifts_nothing(lacking, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        folders(tmp_path, split, ["blue", "green", "red", "yellow"][split == lacking :], count)
    shared = {"uri": f"folder:{tmp_path}", "split": "test"}
    probed = evaluators.build({"type": "probe", "label": "label", **shared})(Colours())
    adapted = few_shot(methods=("gda", "zero_shot"), shots=3, seeds=1, **shared)(Colours())
    named = evaluators.build({"type": "zeroshot", **shared})(Colours())
    pixels = evaluators.build(
        {"type": "pixel_neighbour", "classes": ["yellow", "red", "green", "blue"], "label": "label", **shared}
    )(None)
    assert probed.metrics["top1"] == adapted.metrics["gda/top1"] == named.metrics["top1"] == 1.0
    assert pixels.metrics["pixel_top1"] == (0.75 if lacking == "train" else 1.0)
    if lacking == "test":
        assert "1 of 4 classes have no picture: blue" in named.notes
        assert probed.artifacts["classes"] == ["blue", "green", "red", "yellow"]
    else:
        assert probed.metrics["left_out"] == adapted.metrics["left_out"] == 2
        assert "1 of 4 classes do not have any training picture: blue (0)" in pixels.notes


def test_two_data_sets_are_matched_by_name(tmp_path):
    """The further test has other folders and another order, and heads are tested on the columns of its names."""
    folders(tmp_path / "a", "train", ["blue", "green", "red"], 6)
    folders(tmp_path / "a", "test", ["blue", "green", "red"], 2)
    folders(tmp_path / "b", "x", ["green", "red"], 2)
    (tmp_path / "b" / "x" / "red").rename(tmp_path / "b" / "x" / "RED")
    result = few_shot(
        uri=f"folder:{tmp_path}/a", split="test", methods=("gda",), shots=3, seeds=1,
        tests={"b": {"uri": f"folder:{tmp_path}/b", "split": "x"}},
    )(Colours())  # fmt: skip
    assert result.metrics["gda/b/top1"] == result.metrics["gda/top1"] == 1.0


def test_fewer_training_pictures_than_asked_for_are_said():
    labels = np.array([0, 0, 0, 1, 2, -1])
    assert fewer(["a", "b", "c", "d"], labels, 2) == [
        "3 of 4 classes do not have 2 training pictures: d (0), b (1), c (1)"
    ]
    assert fewer(["a", "b", "c"], labels, 1) == [] == fewer(["a", "b", "c"], labels, None)
    assert fewer(["a"], np.zeros(3, int), 3, kept=1) == ["1 of 1 classes do not have 3 training pictures: a (2)"]


def test_several_labels_of_a_picture(tmp_path):
    rows = []
    for i, (colour, label) in enumerate(
        [("red", ["red", "yellow"]), ("yellow", ["yellow"]), ("blue", [2, "pink"]), ("grey", [])]
    ):
        Image.new("RGB", (8, 8), tuple(int(255 * c) for c in COLOURS[colour])).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "label": label}))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    section = {"type": "multi_label", "uri": f"jsonl:{tmp_path}/a.jsonl", "classes": ["red", "yellow", "blue", "cyan"]}
    result = evaluators.build(section)(ColourModel())
    # yellow: the pictures yellow (right), red (right, tied with none); red: red first; blue: blue first
    assert result.metrics == {
        "mean_average_precision": pytest.approx((1 + 5 / 6 + 1) / 3),
        "examples": 4,
        "unknown_labels": 1,
    }
    assert "1 of 4 classes have no picture: cyan" in result.notes and np.isnan(result.artifacts["per_class"][3])
    assert result.metrics == evaluators.build(section | {"batch_size": 3})(ColourModel()).metrics
    low, high = result.intervals["mean_average_precision"]
    assert low < high
    named = evaluators.build(section | {"type": "zeroshot"})(ColourModel())
    assert (named.metrics["examples"], named.metrics["left_out"]) == (1, 3), "one has one label"
    with pytest.raises(UserError, match=r"the labels are \['red', 'yellow'\], .*`multi_label` takes several"):
        evaluators.build(section | {"type": "zeroshot", "classes": {7: "pink"}})(ColourModel())


def test_identical_texts_count_as_one_another(tmp_path):
    """Two red and two blue pictures: either red one is right for "red"; table, gallery and best pictures agree."""
    rows = []
    for i, colour in enumerate(["red", "blue", "red", "blue"]):
        shade = tuple(int((255 - 30 * i) * c) for c in COLOURS[colour])
        Image.new("RGB", (8, 8), shade).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "caption": colour}))
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    section = {"type": "retrieval", "uri": f"jsonl:{tmp_path}/a.jsonl", "ks": [1]}
    result, strict = (evaluators.build(section | {"strict": s})(ColourModel()) for s in (False, True))
    for direction in ("image_to_text", "text_to_image"):
        assert result.metrics[f"{direction}/recall@1"] == 1.0
        assert strict.metrics[f"{direction}/recall@1"] == 0.5, "one of two equal scores"
    assert (result.metrics["identical_texts"], result.metrics["ties"], strict.metrics["ties"]) == (4, 0, 8)
    assert result.notes == ["4 of 4 texts stand with several pictures; identical texts count as one another"]
    assert any("only the picture's own text is right (strict)" in note for note in strict.notes)
    assert result.artifacts["found"]["right"][:, :2].all() and not result.artifacts["found"]["right"][:, 2:].any()
    assert strict.artifacts["found"]["right"].sum() == 4
    assert result.artifacts["gallery"]["names"][2][:2] == ["red", "red"]
    assert strict.artifacts["gallery"]["names"][2][:2] == ["red (another's)", "red"]


class Odd(Source):
    """Records whose first cannot be read."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 0:
            raise OSError("gone")
        return [{}, {"text": "a"}, {"cls": 1}][i]


def test_a_label_is_found_behind_a_bad_record():
    assert classes.find_label(Odd(), "the data") == "cls"


def test_a_field_that_no_record_has_is_named(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.csv").write_text("image,kind\na.png,red\n")
    (tmp_path / "empty.csv").write_text("image,kind\n")
    uri, missing = (
        f"csv:{tmp_path}/a.csv",
        r"has no field `kin`; expected one of: image, kind \(did you mean `kind`\?\)",
    )
    zeroshot = {"type": "zeroshot", "uri": uri, "label": "kin"}
    with pytest.raises(UserError, match=missing):
        evaluators.build(zeroshot)
    with pytest.raises(UserError, match=missing):
        evaluators.build(zeroshot | {"classes": ["red"]})(ColourModel())
    with pytest.raises(UserError, match=missing):
        evaluators.build(zeroshot | {"label": "kind", "where": {"kin": ["red"]}})(ColourModel())
    with pytest.raises(UserError, match=r"empty\.csv` has no records"):
        evaluators.build(zeroshot | {"uri": f"csv:{tmp_path}/empty.csv"})
    with pytest.raises(UserError, match="has pictures without labels; put them in one folder per name"):
        evaluators.build({"type": "zeroshot", "uri": f"folder:{tmp_path}"})
    for key, value in (("gallery", -1), ("gallery", "a"), ("batch_size", None), ("gallery", 1.5)):
        with pytest.raises(UserError, match=f"evaluator `zeroshot`: {key}="):
            evaluators.build(zeroshot | {"label": "kind", key: value})
    for key, value in (("template", "a photo"), ("ks", (0, 5)), ("ks", ())):
        with pytest.raises(UserError, match=key):
            evaluators.build({"type": "retrieval", "uri": uri, key: value})


def test_splits_are_no_classes(tmp_path):
    folders(tmp_path / "train", "red", ["red"], 1)
    folders(tmp_path / "test", "red", ["red"], 1)
    with pytest.raises(UserError, match=r"has the folders test, train, which are splits; give one of them as --split"):
        evaluators.build({"type": "zeroshot", "uri": f"folder:{tmp_path}"})


def test_odd_values_are_no_texts_and_no_labels(tmp_path):
    """Null, numbers and nested values in the place of captions and labels: the picture is left out and counted."""
    odd = [None, 7, {"a": 1}, [None, 3], "", []]
    rows = [{"caption": "red", "label": "red"}, *({"caption": value, "label": value} for value in odd)]
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"image": "a.png"} | row) for row in rows))
    uri = f"jsonl:{tmp_path}/a.jsonl"
    found = evaluators.build({"type": "retrieval", "uri": uri, "gallery": 0})(ColourModel()).metrics
    assert (found["images"], found["texts"], found["left_out"]) == (1, 1, 6)
    section = {"type": "zeroshot", "uri": uri, "classes": ["red", "blue"], "where": {"label": ["red", 7]}}
    assert evaluators.build(section)(ColourModel()).metrics["left_out"] == 1
    probe = {"type": "probe", "uri": uri, "label": "label", "train_split": None, "where": {"label": ["red"]}}
    assert evaluators.build(probe)(Colours()).metrics["train_examples"] == 2, "the labels `red` and 7"


def test_two_tables_to_learn_from_and_to_name(tmp_path):
    """Tables without splits: one to learn from, another to name; labels that are text."""
    for name, count in (("train", 4), ("test", 2)):
        rows = ["image,label"]
        for i, colour in enumerate(["red", "blue"] * count):
            shade = tuple(int((255 - 9 * i) * c) for c in COLOURS[colour])
            Image.new("RGB", (8, 8), shade).save(tmp_path / f"{name}_{i}.png")
            rows.append(f"{name}_{i}.png,{colour}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    tables = {"uri": f"csv:{tmp_path}/test.csv", "train_uri": f"csv:{tmp_path}/train.csv", "label": "label"}
    found = evaluators.build({"type": "probe", **tables})(Colours()).metrics
    assert (found["top1"], found["train_examples"], found["examples"]) == (1.0, 8, 4)
    methods = ("zero_shot", "tip_adapter")
    found = few_shot(**tables, methods=methods, shots=2, seeds=1, options={"tip_adapter.alpha": 0.5})(Colours())
    assert found.metrics["zero_shot/top1"] == found.metrics["tip_adapter/top1"] == 1.0
    with pytest.raises(UserError, match=r"would name the pictures that are trained on; .* `train_uri`"):
        few_shot(uri=tables["uri"], label="label", methods=("gda",))
