"""Scenes: their truth, recomputed from pixels and by another grammar; the same example everywhere."""

import difflib
import hashlib
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.support import scene_truth
from vlm_jax.data.emoji import alpha
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.data.scenes import edits, foils, pictures, source, texts, words
from vlm_jax.data.scenes.scene import SPLITS, Options, draw_scene
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

OPTIONS = (Options(), Options(96, 64, (1, 6)), Options(100, 160, (2, 5), "textured", seed=3))
CASES = [(options, split) for options in OPTIONS for split in SPLITS]


def scenes(n):
    return (draw_scene(options, split, i) for options, split in CASES for i in range(n))


def over(canvas, pixels, x, y):
    """Slow compositing in floats of premultiplied pixels."""
    height, width = pixels.shape[:2]
    for row in range(height):
        for column in range(width):
            *colour, a = pixels[row, column].astype(float)
            canvas[y + row, x + column] = canvas[y + row, x + column] * (1 - a / 255) + colour


def test_boxes_masks_relations_and_counts_are_those_of_the_pixels():
    for scene in scenes(4):
        height, width = scene.options.height, scene.options.width
        seen = np.full((height, width), -1)
        image = scene.background.draw(width, height).astype(float)
        for i, (o, pixels) in enumerate(zip(scene.objects, scene.sprites, strict=True)):
            black, white = np.zeros((height, width, 3)), np.full((height, width, 3), 255.0)
            over(black, pixels, o.x, o.y)
            over(white, pixels, o.x, o.y)
            over(image, pixels, o.x, o.y)
            seen[255 - (white - black).mean(-1) > 127.5] = i  # where the background does not show through
        np.testing.assert_allclose(scene.image, image, atol=1 + len(scene.objects) / 2)
        record = source.objects(scene)
        for i in range(len(scene.objects)):
            y, x = np.nonzero(seen == i)
            np.testing.assert_array_equal(source.mask_of(record["mask"][i], height, width), seen == i)
            assert record["box"][i].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        found = source.relations(scene)
        found = {*zip(found["subject"].tolist(), found["relation"], found["object"].tolist(), strict=True)}
        names = {"left": "to the left of", "bigger": "that is bigger than", "above": "above", "inside": "inside"}
        boxes = record["box"].tolist()
        every = range(len(boxes))
        assert found == {
            (i, name, j)
            for i in every
            for j in every
            for name, words_ in names.items()
            if i != j and scene_truth.holds(words_, boxes[i], boxes[j])
        }
        assert source.counts(scene) == {name: record["name"].count(name) for name in record["name"]}


def test_four_fifths_of_every_object_can_be_seen():
    shares = []
    for scene in scenes(60):
        for shown in (scene, edits.edited(scene)[1], edits.other_of_pair(scene)[1]):
            drawn = [pictures.covers(pixels).sum() for pixels in shown.sprites]
            shares += [mask.sum() / whole for mask, whole in zip(shown.masks, drawn, strict=True)]
    assert 0.8 <= min(shares) < 0.9, min(shares)


def test_run_lengths_begin_with_what_is_not_in_the_mask():
    masks = [np.zeros((3, 2), bool), np.ones((3, 2), bool), np.array([[1, 0], [1, 1], [0, 0]], bool)]
    expected = [[6], [0, 6], [0, 2, 2, 1, 1]]
    for mask, counts in zip(masks, expected, strict=True):
        assert source.run_lengths(mask).tolist() == counts
        np.testing.assert_array_equal(source.mask_of(source.run_lengths(mask), 3, 2), mask)


def test_captions_are_true_and_foils_are_false():
    kinds = dict.fromkeys(foils.KINDS, 0)
    for scene in scenes(60):
        record, caption = source.objects(scene), texts.caption(scene)
        assert scene_truth.is_true(caption, record), caption
        assert scene_truth.is_english(caption), caption
        for kind, foil in foils.foils(scene).items():
            kinds[kind] += 1
            assert not scene_truth.is_true(foil, record), (caption, foil)
            assert scene_truth.is_english(foil), foil
            old, new = caption.split(), foil.split()
            steps = difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
            if kind != "order":  # one word for one word; a name of several words is never a foil's
                assert [step[2] - step[1] for step in steps if step[0] != "equal"] == [1], (caption, foil)
                assert len(old) == len(new)
            else:
                assert sorted(set(old) - {"a", "an"}) == sorted(set(new) - {"a", "an"})
    assert min(kinds.values()) > 30, kinds


def test_sentences_state_each_look_and_each_relation():
    for scene in scenes(20):
        sentences, record = texts.sub_captions(scene), source.objects(scene)
        stated = texts.stated_relations(scene)
        assert len(sentences) == len(scene.looks) + len(stated)
        for sentence in sentences[: len(scene.looks)]:
            words_ = sentence.rstrip(".").removesuffix(" can be seen")
            for start in ("There is ", "There are ", "The picture shows ", "One can see "):
                words_ = words_.removeprefix(start)
            assert scene_truth.is_true(words_[0].lower() + words_[1:], record), sentence
        for sentence in sentences[len(scene.looks) :]:
            subject, _, rest = sentence.removeprefix("The ").rstrip(".").partition(" is ")
            relation, _, other = rest.rpartition(" the ")
            relation = f"that is {relation}" if relation.endswith("than") else relation
            a, b = (record["box"][record["name"].index(name)].tolist() for name in (subject, other))
            assert scene_truth.holds(relation, a, b), sentence
        assert sorted(texts.long_caption(scene)) == sorted(" ".join(sentences))


def right_answer(kind, question, record, choices):
    """The answer that the objects give, from the words of the question."""
    body = question.removesuffix("?").removesuffix(" in the picture")
    names, boxes = record["name"], record["box"].tolist()
    things = {thing.plural: thing.name for thing in words.things()}
    if kind == "count":
        body = body.removeprefix("How many ").removesuffix(" are there").removesuffix(" can be seen")
        return ("no", "one", "two", "three", "four", "five", "six")[names.count(things[body])]
    if kind == "colour":
        _, _, name = body.removeprefix("What colour ").split(" ", 2)
        (colour,) = {*record["attributes"][names.index(things.get(name, name))]} & {*pictures.COLOURS}
        return colour
    if kind == "object":
        return "yes" if body.removeprefix("Is there ").split(" ", 1)[1] in names else "no"
    spoken = next(r for r in scene_truth.RELATIONS.split("|") if f" {r.removeprefix('that is ')} the " in body)
    before, after = body.split(f" {spoken.removeprefix('that is ')} the ")
    other = boxes[names.index(after)]
    if kind == "relation":
        mine = boxes[names.index(before.removeprefix("Is the "))]
        return "yes" if scene_truth.holds(spoken, mine, other) else "no"
    found = {name for name, box in zip(names, boxes, strict=True) if scene_truth.holds(spoken, box, other)} - {after}
    assert {*choices} & found == found
    return found.pop()


def test_questions_have_one_right_answer_among_the_choices():
    asked = dict.fromkeys(("count", "colour", "object", "relation", "what"), 0)
    for scene in scenes(40):
        record, table = source.objects(scene), foils.questions(scene)
        for kind, question, answer, choices in zip(*table.values(), strict=True):
            asked[kind] += 1
            assert choices.count(answer) == 1 and len(set(choices)) == len(choices) and len(choices) in (2, 4)
            assert answer == right_answer(kind, question, record, choices), (question, answer, record)
    assert min(asked.values()) > 40, asked


def test_edits_change_what_they_say():
    kinds = dict.fromkeys(edits.EDITS, 0)
    for scene in scenes(12):
        kind, after, sentence = edits.edited(scene)
        kinds[kind] += 1
        assert sentence.startswith("the same, but ") and edits.fits(after)
        assert scene_truth.is_true(texts.caption(after), source.objects(after))
        before, now = {look.thing.name for look in scene.looks}, {look.thing.name for look in after.looks}
        gone, come = len(before - now), len(now - before)
        assert (gone, come) == {"replace": (1, 1), "remove": (1, 0), "colour": (0, 0)}[kind]
        assert sum(a != b for a, b in zip(scene.looks, after.looks, strict=False)) >= (kind != "remove")
    assert min(kinds.values()) > 10, kinds


def test_captions_of_a_minimal_pair_tell_its_pictures_apart():
    for scene in scenes(12):
        pair, (kind, after) = edits.minimal_pair(scene), edits.other_of_pair(scene)
        first, second = source.objects(scene), source.objects(after)
        truth = [[scene_truth.is_true(pair[key], record) for record in (first, second)] for key in ("caption", "text")]
        assert truth == [[True, False], [False, True]], (kind, pair["caption"], pair["text"])
        np.testing.assert_array_equal(pair["image"], after.image)
        changed = [a != b for a, b in zip(scene.looks, after.looks, strict=True)]
        assert sum(changed) == 1
        outside = np.ones(scene.image.shape[:2], bool)
        for one in (scene, after):
            for o, pixels in zip(one.objects, one.sprites, strict=True):
                x0, y0, x1, y1 = o.rectangle(pixels)
                outside[y0:y1, x0:x1] &= not changed[o.group]
        np.testing.assert_array_equal(pair["image"][outside], scene.image[outside])


def test_splits_hold_out_what_they_say():
    def combined(scene):
        codes = [look.thing.hexcode for look in scene.looks]
        cells = [words.cell_held_out(a, look.thing.hexcode) for look in scene.looks for a in look.attributes]
        return cells, [words.pair_held_out(a, b) for i, a in enumerate(codes) for b in codes[:i]]

    for split in SPLITS:
        for i in range(150):
            scene = draw_scene(Options(), split, i)
            assert (scene.style == "noto") == (split == "unseen_style")
            assert {look.thing.held_out for look in scene.looks} == {split == "unseen_concepts"}
            (cells, pairs) = combined(scene)
            assert (sum(cells), sum(pairs)) == {"attribute": (1, 0), "pair": (0, 1), "": (0, 0)}[scene.unseen]
            assert bool(scene.unseen) == (split == "unseen_pairs")
            for other in (edits.edited(scene)[1], edits.other_of_pair(scene)[1]):
                assert split == "unseen_pairs" or not any(map(any, combined(other)))


def test_a_colour_is_what_most_pixels_have():
    right = total = 0
    for thing in words.things()[::40]:
        style = "twemoji" if ("twemoji", thing.concept) in alpha.places() else "noto"
        for word in pictures.COLOURS:
            pixels = pictures.sprite(style, thing.concept, 32, colour=word)
            seen = pixels[pixels[..., 3] >= pictures.COVERS].astype(float)
            solid = seen[:, :3] * 255 / seen[:, 3:]
            names, values = list(pictures.COLOURS), np.array(list(pictures.COLOURS.values()), float)
            unit = lambda rows: rows - rows.mean(-1, keepdims=True)
            nearest = ((unit(solid)[:, None] - unit(values)) ** 2).sum(-1).argmin(-1)
            right += names[np.bincount(nearest).argmax()] == word
            total += 1
    assert right / total > 0.95, right / total


# Of the first records, so that a changed scene is a new VERSION.
EXPECTED = {"train": "5a8c1858aa1ced85", "unseen_pairs": "2893e9c19c1d146b"}


def plain(value):
    """A record as JSON has it; arrays by their bytes."""
    if isinstance(value, np.ndarray):
        return hashlib.sha256(repr((value.dtype.str, value.shape)).encode() + value.tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def digest(split):
    opened = open_source("scenes:?size=80x64", split)
    records = [plain(opened[i]) for i in (0, 1, 2, 3, 4, 5, 9_999)]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]


def test_the_same_example_everywhere():
    assert {split: digest(split) for split in EXPECTED} == EXPECTED
    opened = pickle.loads(pickle.dumps(open_source("scenes:", "train")))
    pictures._drawings.kept.clear()
    pictures._scaled_drawings.kept.clear()
    backwards = [opened[i]["image"] for i in reversed(range(5))]
    for i, image in zip(reversed(range(5)), backwards, strict=True):
        np.testing.assert_array_equal(image, open_source("scenes:", "train").narrow(frozenset(["image"]))[i]["image"])
    here = open_source("scenes:", "train")[3]["long_caption"]
    program = "from vlm_jax.data.sources import open_source; print(open_source('scenes:', 'train')[3]['long_caption'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


def test_the_cache_forgets_what_was_used_longest_ago():
    cache = pictures._Cache(100)
    made = []
    make = lambda name: cache((name,), lambda: made.append(name) or np.zeros(40, np.uint8))
    for name in "abacb":
        make(name)
    assert made == ["a", "b", "c", "b"] and cache.bytes == 80


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("scenes:", "test", "has no split `test`; it has train, unseen_style"),
        ("scenes:train", None, "options stand behind a question mark"),
        (
            "scenes:?siz=64",
            None,
            "has no option `siz`; expected one of: size, objects",
        ),
        ("scenes:?size=8", None, "`size=8`; expected 64"),
        ("scenes:?size=64x64x64", None, "`size=64x64x64`; expected 64"),
        ("scenes:?objects=4-2", None, "`objects=4-2`; expected 1-4"),
        ("scenes:?examples=-1", None, "`examples=-1`; expected the number"),
        ("scenes:?background=blue", None, "expected plain, textured or any"),
        ("scenes:?styles=apple", None, "has no style `apple`"),
        ("scenes:?styles=noto", "train", "kept for tests"),
        ("scenes:?styles=twemoji", "unseen_style", "not an unseen one"),
    ],
)
def test_errors_name_the_option(uri, split, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(uri, split)


def test_english():
    article = {
        "owl": "an",
        "unicorn": "a",
        "ewe": "a",
        "hourglass": "an",
        "euro banknote": "a",
        "upside-down cat": "an",
    }
    assert {word: words.article(word) for word in article} == article
    plural = {"fox": "foxes", "wolf": "wolves", "baby chick": "baby chicks", "glass of milk": "glasses of milk"}
    plural |= {"puzzle piece": "puzzle pieces", "butterfly": "butterflies", "monkey": "monkeys", "mouse": "mice"}
    assert {word: words.plural(word) for word in plural} == plural
    names = [thing.name for thing in words.things()]
    assert len(names) == len(set(names)) > 600
    assert not {"grapes", "bread", "one o’clock", "mount fuji", "black cat"} & {*names}


def test_options_of_the_source():
    opened = open_source("scenes:?size=96x64&objects=2-6&background=plain&styles=twemoji,fxemoji&examples=30&seed=1")
    assert len(opened) == 30 and opened.key(4) == "scenes:train[4]"
    for i in range(30):
        record = opened[i]
        assert record["image"].shape == (64, 96, 3) and record["style"] in ("twemoji", "fxemoji")
        assert 2 <= len(record["objects"]["name"]) <= 6
    assert opened.fingerprint() != open_source("scenes:?size=96x64&objects=2-6").fingerprint()
    assert set(TRAIN_STYLES) >= {open_source("scenes:", "unseen_pairs")[i]["style"] for i in range(9)}
    with pytest.raises(IndexError):
        opened[30]
    tiny = open_source("scenes:?objects=6&size=32", "unseen_style")
    assert all((tiny[i]["objects"]["box"][:, 2:] > tiny[i]["objects"]["box"][:, :2]).all() for i in (99, 100))
