"""Evaluators of exact truth: equal to slow counts on fifty scenes, and 1.0 for a model that knows what is true."""

import functools
import io

import numpy as np
import pytest
from PIL import Image

from tests.support.scenes import URI, Guess, Labels, Looks, Says, Sees, Truth, Writer, records, run, seen, share
from vlm_jax import evaluators
from vlm_jax.data.scenes.source import mask_of
from vlm_jax.data.scenes.words import plural
from vlm_jax.data.sources import open_source, select
from vlm_jax.errors import UserError
from vlm_jax.pretrained import attention_maps

GUESS = Guess()


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
    one = run("foils", GUESS, caption="minimal_pair/caption", foils="minimal_pair/text", kinds="foil").metrics
    assert one["foil_pairs"] == 50 and one["foil_left_out"] == 0
    with pytest.raises(UserError, match="the kind of foils is `size`; expected one of: attribute, count, object"):
        run("foils", truth, caption="caption", foils="foils", kinds=["size"])
    with pytest.raises(UserError, match="no text under caption has a foil under wrong"):
        run("foils", truth, caption="caption", foils="wrong")


@pytest.mark.parametrize("model", [Guess(), Writer()])
def test_minimal_pairs_by_hand(model):
    found = []
    for row in records():
        pair = row["minimal_pair"]
        s = [[model.fits(i, c) for c in (pair["caption"], pair["text"])] for i in (row["image"], pair["image"])]
        text, image = s[0][0] > s[0][1] and s[1][1] > s[1][0], s[0][0] > s[1][0] and s[1][1] > s[0][1]
        found.append((text, image, text and image))
    metrics = run("minimal_pairs", model).metrics
    for name, own in zip(("text", "image", "group"), zip(*found, strict=True), strict=True):
        assert metrics[name] == share(own) and 0 < sum(own) < 50
    assert (metrics["examples"], metrics["left_out"], metrics["ties"]) == (50, 0, 0)


def test_minimal_pairs_by_one_who_knows():
    pairs = [(row["image"], row["minimal_pair"]) for row in records()]
    known = [one for image, pair in pairs for one in ((image, [pair["caption"]]), (pair["image"], [pair["text"]]))]
    metrics = run("minimal_pairs", Truth(known)).metrics
    assert [metrics[name] for name in ("text", "image", "group")] == [1.0] * 3
    same = run("minimal_pairs", Guess(), captions=["minimal_pair/caption"] * 2).metrics
    assert (same["text"], same["group"], same["ties"]) == (0, 0, 50), "equal scores are wrong"
    with pytest.raises(UserError, match="images is 'image'; expected two fields"):
        run("minimal_pairs", Guess(), images="image")
    with pytest.raises(UserError, match="no picture has texts under unseen and caption"):
        run("minimal_pairs", Guess(), captions=["unseen", "caption"])


TEXTS = {  # captions, join -> the texts of a picture
    "caption": (None, lambda row: [row["caption"]]),
    "sub_captions": (None, lambda row: row["sub_captions"]),
    "long_caption": (None, lambda row: [row["long_caption"]]),
    "names/de": (", ", lambda row: [", ".join(row["names"]["de"])]),
    "names/ja": (", ", lambda row: [", ".join(row["names"]["ja"])]),
}


@pytest.mark.parametrize("field", TEXTS)
def test_retrieval_by_hand(field):
    join, of = TEXTS[field]
    metrics = run("retrieval", GUESS, captions=field, join=join, gallery=3).metrics
    said = [(i, text) for i, row in enumerate(records()) for text in of(row)]
    of_text = {text: {i for i, other in said if other == text} for _, text in said}  # identical texts: right for all
    images = GUESS.embed_image_batch([seen(row["image"]) for row in records()]).astype(np.float64)
    scores = (images @ GUESS.embed_texts([text for _, text in said]).astype(np.float64).T).astype(np.float32)
    right = np.array([[i in of_text[text] for _, text in said] for i in range(50)])

    def within(scores, right, k):
        best = np.max(scores, where=right, initial=-2)
        return int(np.sum((scores > best) & ~right) < k and not np.any((scores == best) & ~right))

    for k in (1, 5, 10):
        for name, s, r in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            assert metrics[f"{name}/recall@{k}"] == share([within(s[i], r[i], k) for i in range(len(s))])
    assert (metrics["texts"], metrics["images"], metrics["ties"]) == (len(said), 50, 0)
    known = run("retrieval", Truth((row["image"], of(row)) for row in records()), captions=field, join=join).metrics
    assert known["image_to_text/recall@1"] == known["text_to_image/recall@1"] == 1.0


@pytest.mark.parametrize("query", ["sum", "image"])
def test_composed_retrieval_by_hand(query):
    result = run("composed_retrieval", GUESS, query=query)
    first, changed = (
        GUESS.embed_image_batch([seen(image) for image in images]).astype(np.float64)
        for images in zip(*((row["image"], row["edit"]["image"]) for row in records()), strict=True)
    )
    ranks = []
    for i, row in enumerate(records()):
        wanted = first[i] + (GUESS.embed_texts([row["edit"]["text"]])[0].astype(np.float64) if query == "sum" else 0)
        gallery = [changed[i], *np.delete(changed, i, 0), *np.delete(first, i, 0)]
        ranks.append(sum(other @ wanted > gallery[0] @ wanted for other in gallery))
    for k in (1, 5, 10):
        assert result.metrics[f"recall@{k}"] == share([rank < k for rank in ranks])
    assert result.artifacts["ranks"]["rank"].tolist() == ranks and len(gallery) == result.metrics["gallery"] == 99


def test_composed_retrieval_by_one_who_knows():
    knows = Truth(
        one for row in records() for one in ((row["image"], []), (row["edit"]["image"], [row["edit"]["text"]]))
    )
    metrics = run("composed_retrieval", knows).metrics
    assert (metrics["recall@1"], metrics["examples"], metrics["ties"]) == (1.0, 50, 0)
    assert run("composed_retrieval", knows, query="image").metrics["recall@1"] < 0.1
    with pytest.raises(UserError, match="the query of composed_retrieval is `both`; expected one of: sum, image, text"):
        run("composed_retrieval", knows, query="both")
    with pytest.raises(UserError, match="no picture has a text under unseen"):
        run("composed_retrieval", knows, text="unseen")


def said(row):
    """(kind, texts of the choices, index of the answer) of a scene's questions."""
    asked = zip(*(row["questions"][name] for name in ("kind", "question", "answer", "choices")), strict=True)
    return [(kind, [f"{question} {c}" for c in choices], choices.index(a)) for kind, question, a, choices in asked]


@pytest.mark.parametrize("model", [Guess(), Writer()])
def test_questions_by_hand(model):
    right, chance = {"": []}, {"": []}
    for row in records():
        for kind, texts, answer in said(row):
            scores = [model.fits(row["image"], text) for text in texts]
            for name in ("", f"/{kind}"):
                right.setdefault(name, []).append(
                    all(scores[answer] > s for s in scores[:answer] + scores[answer + 1 :])
                )
                chance.setdefault(name, []).append(1 / len(texts))
    metrics = run("questions", model).metrics
    assert {name for name in metrics if "/" in name} == {
        f"{m}{k}" for m in ("exact_match", "chance") for k in right if k
    }
    for name, own in right.items():
        assert metrics[f"exact_match{name}"] == share(own) and metrics[f"chance{name}"] == share(chance[name])
    assert (metrics["questions"], metrics["examples"], metrics["ties"]) == (len(right[""]), 50, 0)
    assert metrics["left_out_questions"] == 0 and len(right) == 6


def test_questions_by_one_who_knows():
    known = Truth((row["image"], [texts[answer] for _, texts, answer in said(row)]) for row in records())
    metrics = run("questions", known).metrics
    assert metrics["exact_match"] == metrics["exact_match/what"] == 1.0
    ignorant = run("questions", Truth((row["image"], []) for row in records())).metrics
    assert ignorant["exact_match"] == pytest.approx(ignorant["chance"]), "all choices are equal"
    section = {"type": "questions", "uri": URI, "question": "edit/text", "choices": "tags", "kind": None}
    found = evaluators.build(section | {"answer": "edit/kind"})
    with pytest.raises(UserError, match="a question under `edit/text` whose `edit/kind` is among its `tags`"):
        found(known)
    one = evaluators.build(section | {"question": "style", "answer": "style", "choices": "style"})(known).metrics
    assert (one["questions"], one["exact_match"], one["chance"]) == (50, 1.0, 1.0), "one choice"


WORDS = ("no", "one", "two", "three", "four", "five", "six")


@pytest.mark.parametrize("model", [Guess(), Writer()])
def test_counting_by_hand(model):
    right, errors, pictures = [], [], set()
    for i, row in enumerate(records()):
        for name, count in row["counts"].items():
            if count > 1:
                scores = [model.fits(row["image"], f"I see {WORDS[n]} {plural(name)}") for n in (2, 3, 4)]
                best = 2 + scores.index(max(scores))
                right.append(best == count)
                errors.append(abs(best - count))
                pictures.add(i)
    metrics = run("counting", model, numbers=[2, 4, 3], template="I see {number} {things}").metrics
    assert (metrics["accuracy"], metrics["mean_absolute_error"]) == (share(right), share(errors)) and sum(right)
    assert (metrics["questions"], metrics["examples"]) == (len(right), len(pictures))
    assert metrics["left_out"] == 50 - len(pictures) and metrics["chance"] == pytest.approx(1 / 3)


def test_counting_by_one_who_knows():
    one = lambda name, n: f"{WORDS[n]} {name if n == 1 else plural(name)}"
    known = Truth((row["image"], [one(*pair) for pair in row["counts"].items()]) for row in records())
    for numbers, questions in (((2, 3, 4, 5, 6), None), (range(1, 7), sum(len(row["counts"]) for row in records()))):
        metrics = run("counting", known, numbers=list(numbers)).metrics
        assert (metrics["accuracy"], metrics["mean_absolute_error"]) == (1.0, 0.0)
        assert questions in (None, metrics["questions"])
    for changes, message in (({"numbers": [2]}, "numbers are"), ({"template": "{number}"}, "no `{things}`")):
        with pytest.raises(UserError, match=message):
            run("counting", known, **changes)
    with pytest.raises(UserError, match="no picture has a thing under `style`"):
        run("counting", known, counts="style")


@pytest.fixture
def patches(monkeypatch):
    """Models of the tests give their patches themselves."""
    monkeypatch.setattr(
        attention_maps, "patch_embedding_batch", lambda model, images: model.patch_embedding_batch(images)
    )


def test_regions_by_hand(patches):
    model, pointing, chance, ious = Looks(8), [], [], []
    for row in records()[:20]:
        of_patches = model.of_patches(seen(row["image"])).astype(np.float64)
        for text, box, i in zip(*(row["regions"][name] for name in ("text", "box", "object")), strict=True):
            scores = of_patches @ model.embed_texts([text])[0].astype(np.float64)
            inside, predicted = np.zeros((8, 8)), np.zeros((64, 64), bool)
            for y in range(8):
                for x in range(8):
                    inside[y, x] = box[0] <= 8 * x + 4 < box[2] and box[1] <= 8 * y + 4 < box[3]
                    predicted[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = scores[y, x] > scores.mean()
            true = mask_of(row["objects"]["mask"][i], 64, 64)
            pointing.append(inside[scores == scores.max()].mean())
            chance.append(inside.mean())
            ious.append(np.sum(predicted & true) / np.sum(predicted | true))
    metrics = run("regions", model, uri="scenes:?examples=20").metrics
    assert (metrics["pointing"], metrics["chance"], metrics["mean_iou"]) == (
        share(pointing),
        share(chance),
        share(ious),
    )
    pictures = sum(len(row["regions"]["text"]) > 0 for row in records()[:20])
    assert (metrics["regions"], metrics["examples"], metrics["left_out_regions"]) == (len(ious), pictures, 0)


def test_regions_by_one_who_sees(patches):
    metrics = run("regions", Sees(records())).metrics
    assert (metrics["pointing"], metrics["mean_iou"]) == (1.0, 1.0) and metrics["chance"] < 0.3
    assert metrics["examples"] + metrics["left_out"] == 50 and metrics["regions"] > 60


def test_regions_pass_through_the_preprocessing(patches):
    """Cropped, then on a white margin: what is cut off does not count, and the margin is in no region."""
    scenes, (kept, lost) = records()[:2], [0, 0]
    for row in scenes:
        for i in row["regions"]["object"]:
            kept += (inside := bool(mask_of(row["objects"]["mask"][i], 64, 64)[24:40, 24:40].any()))
            lost += not inside
    ops = "central_crop(16) | pad(48) | to_float"
    result = run("regions", Looks(48), uri="scenes:?examples=2", ops=ops)  # one patch: it is the highest
    assert (result.metrics["regions"], result.metrics["left_out_regions"]) == (kept, lost) and lost
    assert result.metrics["mean_iou"] == 0, "no patch is above the mean of one"
    boxes = [box for row in scenes for box in row["regions"]["box"]]
    middle = [b[0] <= 32 < b[2] and b[1] <= 32 < b[3] for b in boxes]
    assert result.artifacts["regions"]["pointing"].sum() == sum(middle)
    with pytest.raises(UserError, match="crops by content"):
        run("regions", Looks(8), ops="crop_to_content | resize(32) | to_float")
    with pytest.raises(UserError, match="the image tower of this model has none"):
        run("regions", GUESS)


def test_hallucinated_objects_by_hand():
    """Captions are those of the next scene: names are found by letters, spaces around them, the longest first."""
    rows, wrong, there, captions = records(), [], [], []
    forms = {form: name for row in rows for name in row["names"]["en"] for form in (name, plural(name))}
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        text, found = f" {other['long_caption'].lower().replace('.', '').replace(',', '')} ", set()
        for form in sorted(forms, key=len, reverse=True):
            if f" {form.lower()} " in text:
                text = text.replace(f" {form.lower()} ", " | ")
                found.add(forms[form])
        wrong += [name not in row["names"]["en"] for name in found]
        there += [name in found for name in row["names"]["en"]]
        captions.append(any(name not in row["names"]["en"] for name in found))
    says = Says((row["image"], other["long_caption"]) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True))
    result = run("captions", says, captions="caption", objects="names/en", gallery=0)
    assert (result.metrics["chair_i"], result.metrics["chair_s"]) == (share(wrong), share(captions))
    assert result.metrics["object_recall"] == share(there) and len(wrong) > 100
    assert all(result.intervals[name][0] <= result.metrics[name] for name in ("chair_i", "chair_s", "object_recall"))


def test_hallucinated_objects_of_one_who_tells_the_truth():
    section = {"captions": "caption", "objects": "counts", "gallery": 0}
    metrics = run("captions", Says((row["image"], row["long_caption"]) for row in records()), **section).metrics
    assert (metrics["chair_i"], metrics["chair_s"], metrics["object_recall"]) == (0.0, 0.0, 1.0)
    silent = Says((row["image"], "a thing, or two unicorns") for row in records())
    metrics = run("captions", silent, **section).metrics
    assert metrics["object_recall"] == metrics["chair_s"] == 0 and "chair_i" not in metrics
    metrics = run("captions", silent, **section, vocabulary=["unicorn"]).metrics
    assert metrics["chair_i"] == metrics["chair_s"] == 1
    with pytest.raises(UserError, match="vocabulary is given without objects"):
        run("captions", silent, captions="caption", vocabulary=["unicorn"])
    with pytest.raises(UserError, match="no picture has names under thing"):
        run("captions", silent, captions="caption", objects="thing")


MAMMALS = {"subgroup": ["animal-mammal"]}
TWO = {"subgroup": ["animal-mammal"], "style": ["twemoji", "fluent-emoji"]}


@functools.cache
def emoji(split, styles=None):
    """(picture, concept) of the embedded pictures of mammals."""
    source = open_source("tfds:emoji", split)
    rows = [source[int(i)] for i in select(source, TWO if styles else MAMMALS)]
    return [(np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")), row["concept"]) for row in rows]


def test_image_retrieval_across_styles_by_hand():
    queries, gallery = emoji("unseen_style"), emoji("train[:2000]", "two")
    section = {"uri": "tfds:emoji", "split": "unseen_style", "where": MAMMALS}
    section |= {"gallery_split": "train[:2000]", "gallery_where": TWO}
    a, b = (GUESS.embed_image_batch([seen(image) for image, _ in rows]).astype(float) for rows in (queries, gallery))
    ranks = []
    for query, (_, concept) in zip(a, queries, strict=True):
        scores = [float(np.float32(query @ other)) for other in b]
        right = [own == concept for _, own in gallery]
        if any(right):
            best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
            ranks.append(sum(s > best and not is_right for s, is_right in zip(scores, right, strict=True)))
    metrics = run("image_retrieval", GUESS, **section).metrics
    for k in (1, 5, 10):
        assert metrics[f"recall@{k}"] == share([rank < k for rank in ranks])
    assert metrics["gallery"] == len(gallery) == 60 and metrics["examples"] == len(ranks) == 30
    assert metrics["left_out"] == len(queries) - len(ranks)
    metrics = run("image_retrieval", Labels([*queries, *gallery]), **section).metrics
    assert (metrics["recall@1"], metrics["ties"]) == (1.0, 0)


def test_a_query_is_not_in_its_own_gallery():
    rows = emoji("train[:2000]", "two")
    one = TWO | {"style": ["twemoji"]}
    section = {"uri": "tfds:emoji", "split": "train[:2000]", "where": TWO, "gallery_where": TWO}
    metrics = run("image_retrieval", Labels(rows), **section).metrics
    assert metrics["examples"] == metrics["gallery"] == 60 and metrics["recall@1"] == 1.0, "in the other style"
    a = GUESS.embed_image_batch([seen(image) for image, _ in rows]).astype(float)
    ranks = []
    for i, (_, concept) in enumerate(rows):
        scores = [(float(np.float32(a[i] @ a[j])), rows[j][1] == concept) for j in range(60) if j != i]
        ((best, _),) = [pair for pair in scores if pair[1]]
        ranks.append(sum(score > best for score, _ in scores))
    assert run("image_retrieval", GUESS, **section).metrics["recall@10"] == share([rank < 10 for rank in ranks])
    with pytest.raises(UserError, match="no picture's `concept` is that of a picture of"):
        run("image_retrieval", GUESS, **section | {"where": one, "gallery_where": one})
    with pytest.raises(UserError, match="has no field `colour`"):
        run("image_retrieval", GUESS, **section, label="colour")
