"""The embedded data set: what is shipped, and that the builder makes it from tarballs, the same bytes every time."""

import collections
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_jax.data import emoji
from vlm_jax.data.emoji import build, names, packs, render, splits
from vlm_jax.errors import UserError

REPORT = json.loads((emoji.PREPARED / "report.json").read_text())
STYLES = tuple(pack.style for pack in packs.PACKS)
TRAIN_STYLES = {"twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji"}


def read_records(directory: Path, split: str) -> list[dict]:
    """Every record's fields, text decoded. Without TFDS's decoding, which takes 2 ms a record."""
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    reader = array_record_module.ArrayRecordReader(str(directory / f"emoji-{split}.array_record-00000-of-00001"))
    records = []
    for raw in reader.read_all():
        features = tf_example_pb2.Example.FromString(raw).features.feature
        record = {key: list(value.int64_list.value) or list(value.bytes_list.value) for key, value in features.items()}
        records.append({"raw": raw, **record})
    return records


@pytest.fixture(scope="module")
def records():
    return {split: read_records(emoji.PREPARED, split) for split in splits.SPLITS}


@pytest.fixture(scope="module")
def pixels(records):
    """Split -> uint8 [n, 64, 64, 3]."""
    decode = lambda data: np.asarray(Image.open(io.BytesIO(data)))
    return {split: np.stack([decode(r["image"][0]) for r in rows]) for split, rows in records.items()}


def test_counts_by_split_and_style(records):
    counts = {
        split: dict(sorted(collections.Counter(r["style"][0].decode() for r in rows).items()))
        for split, rows in records.items()
    }
    assert counts == REPORT["pictures"]
    assert counts == {
        "train": {"emojione": 993, "fluent-emoji": 1433, "fluent-emoji-flat": 1457, "fxemoji": 577, "twemoji": 1485},
        "unseen_style": {"noto": 1503},
        "unseen_concepts": {
            "emojione": 100,
            "fluent-emoji": 127,
            "fluent-emoji-flat": 126,
            "fxemoji": 68,
            "noto": 129,
            "noto-v1": 100,
            "twemoji": 129,
        },
        "near_style": {"noto-v1": 1044},
    }


def test_concepts():
    seen, held_out = emoji.concepts(), emoji.concepts(held_out=True)
    assert (len(seen), len(held_out)) == (732, 129)
    assert not set(seen) & set(held_out)
    assert len(emoji.concepts(groups=range(10))) == 1644 - 129
    assert emoji.concepts(groups=(0,))[0] == "grinning face"
    assert emoji.concepts(groups=(0,), language="de")[0] == "grinsendes Gesicht"
    table = emoji.concept_table()
    assert [row["id"] for row in table] == list(range(1644))
    assert len({row["names"]["en"] for row in table}) == 1644
    rule = splits.held_out(row["hexcode"] for row in table if row["group"] in splits.HELD_OUT_GROUPS)
    assert rule == {row["hexcode"] for row in table if row["held_out"]}


def test_nothing_leaks_between_splits(records, pixels):
    held_out = set(emoji.concepts(held_out=True))
    styles = {split: {r["style"][0].decode() for r in rows} for split, rows in records.items()}
    concepts = {split: {r["concept"][0] for r in rows} for split, rows in records.items()}
    assert styles["train"] == TRAIN_STYLES
    assert concepts["unseen_concepts"] == held_out
    assert not held_out & (concepts["train"] | concepts["unseen_style"] | concepts["near_style"])
    for concept_held_out in (False, True):
        assert len({splits.split_of(style, concept_held_out) for style in ("fluent-emoji", "fluent-emoji-flat")}) == 1
    seen_in_training = {p.tobytes() for p in pixels["train"]}
    for split in ("unseen_style", "unseen_concepts", "near_style"):
        assert not any(p.tobytes() in seen_in_training for p in pixels[split]), split


def test_one_picture_per_concept_and_style(records, pixels):
    """And no two concepts of a style with the same pixels, and nothing that was left out."""
    seen, drawn = set(), set()
    for split, rows in records.items():
        for record, picture in zip(rows, pixels[split], strict=True):
            style, concept = record["style"][0], record["concept"][0]
            assert (style, concept) not in seen
            assert (style, picture.tobytes()) not in drawn, (style, concept)
            seen.add((style, concept))
            drawn.add((style, picture.tobytes()))
    left_out = [(style.encode(), concept) for rows in REPORT["left_out"].values() for style, concept, _ in rows]
    assert not seen & set(left_out)
    assert {reason: len(rows) for reason, rows in REPORT["left_out"].items()} == {"ambiguous": 116, "blank": 1}


def test_every_picture_is_an_rgb_webp_with_ink(records, pixels):
    for split, array in pixels.items():
        assert array.shape == (len(records[split]), 64, 64, 3)
        assert array.dtype == np.uint8
        assert min(render.ink(p) for p in array) >= render.INK_SHARE
        assert all(r["image"][0][8:12] == b"WEBP" for r in records[split])


def test_every_language_has_words_and_matches_the_table(records):
    table = emoji.concept_table()
    for rows in records.values():
        for record in rows:
            row = table[record["concept"][0]]
            assert record["group"] == [row["group"]]
            assert record["subgroup"][0].decode() == row["subgroup"]
            for language in names.LANGUAGES:
                assert record[f"name/{language}"][0].decode() == row["names"][language] != ""
                assert all(record[f"keywords/{language}"])
    assert len(names.LANGUAGES) >= 9


def test_size_and_checksums():
    package = Path(emoji.__file__).parent
    shipped = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in shipped) <= 17_000_000
    recorded = dict(reversed(line.split("  ")) for line in (emoji.PREPARED / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in emoji.PREPARED.iterdir() if path.name != "SHA256SUMS"}
    assert recorded == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_notice_names_every_pack_and_its_counts():
    notice = (Path(emoji.__file__).parent / "NOTICE").read_text(encoding="utf-8")
    for pack in (*packs.PACKS, packs.WORDS):
        assert f"{pack.package} {pack.version}" in notice
    counted = {words[0]: words[1:] for words in map(str.split, notice.splitlines()) if len(words) == 6}
    for style in STYLES:
        kept = sum(by_style.get(style, 0) for by_style in REPORT["pictures"].values())
        left_out = {r: sum(row[0] == style for row in rows) for r, rows in REPORT["left_out"].items()}
        reasons = [left_out.get(reason, 0) for reason in ("blank", "ambiguous", "leak")]
        assert counted[style] == [str(n) for n in (kept, *reasons, REPORT["unmatched_icons"][style])]


def test_reads_without_tensorflow_and_imports_cheaply():
    program = """
import sys
from vlm_jax.data import emoji
emoji.concepts()
assert not {"tensorflow_datasets", "jax", "numpy", "array_record"} & set(sys.modules), sorted(sys.modules)
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(str(emoji.PREPARED)).as_data_source("unseen_style")
record = source[0]
assert record["image"].shape == (64, 64, 3), record["image"].shape
assert record["style"] == b"noto"
assert record["name"]["en"] == b"grinning face"
assert b"smile" in record["keywords"]["en"]
assert len(source) == 1503
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The builder, from tarballs small enough to write here.


def concept(id: int, hexcode: str, *slugs: str) -> names.Concept:
    return names.Concept(id, hexcode, 3, "animal", {}, {}, slugs)


def iconify(icons: dict[str, str], aliases=None, chars=None) -> dict:
    bodies = {name: {"body": body} for name, body in icons.items()}
    collection = {"icons": bodies, "aliases": aliases or {}, "width": 16, "height": 16}
    return {"icons.json": collection, "chars.json": chars or {}}


def test_match_prefers_code_points_then_icons_then_aliases():
    cricket, game, dog = concept(0, "1F997", "cricket"), concept(1, "1F3CF", "cricketgame"), concept(2, "1F415", "dog")
    old_pack = iconify({"cricket-game": ""}, {"cricket": {"parent": "cricket-game"}})
    assert packs.match(old_pack, [cricket, game]) == {1: "cricket-game"}
    assert packs.match(iconify({"hound": "", "dog": ""}, chars={"1f415-fe0f": "hound"}), [dog]) == {2: "hound"}
    assert packs.match(iconify({"dog": ""}), [dog], {"dog": "dog face"}) == {}
    assert packs.match(iconify({"hound": ""}), [dog], {"hound": "dog"}) == {2: "hound"}
    assert packs.match(iconify({"dog": ""}), [dog], {"dog": None}) == {}
    keycaps = [concept(3, "23-20E3", "keycap"), concept(4, "2A-20E3", "keycap", "keycapasterisk")]
    assert packs.match(iconify({"keycap": "", "keycap-asterisk": ""}), keycaps) == {4: "keycap-asterisk"}
    flipped = iconify({"left": ""}, {"right": {"parent": "left", "hFlip": True}})
    assert packs.match(flipped, [concept(5, "2190", "left"), concept(6, "2192", "right")]) == {5: "left", 6: "right"}


def test_squeeze_and_code_points():
    assert names.squeeze("Men’s room: piñata & co") == "mensroompinataandco"
    assert names.strip_fe0f("1f441-fe0f-200d-1f5e8-fe0f") == "1F441-200D-1F5E8"


def test_render_centres_flips_and_lies_on_white():
    left = '<path d="M0 0h8v16H0z" fill="#f00"/>'
    pack = iconify({"left": left}, {"right": {"parent": "left", "hFlip": True}})
    picture, mirrored = render.render(packs.svg(pack, "left")), render.render(packs.svg(pack, "right"))
    np.testing.assert_array_equal(picture[:, :32], np.broadcast_to([255, 0, 0], (64, 32, 3)))
    np.testing.assert_array_equal(picture[:, 32:], np.full((64, 32, 3), 255))
    np.testing.assert_array_equal(mirrored, picture[:, ::-1])
    pack["icons.json"]["icons"]["left"]["width"] = 8
    tall = render.render(packs.svg(pack, "left"))
    np.testing.assert_array_equal(tall[:, 16:48], np.broadcast_to([255, 0, 0], (64, 32, 3)))
    assert render.ink(tall) == 0.5
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(render.encode(tall)))), tall)


def test_left_out():
    white, red, blue, green = (np.full((64, 64, 3), colour, np.uint8) for colour in (255, [255, 0, 0], [0, 0, 255], 99))
    pictures = [("a", 0, white), ("a", 1, red), ("a", 2, red), ("b", 1, blue), ("noto", 1, blue), ("b", 2, green)]
    reasons = render.left_out(pictures, styles_apart=("noto",))
    assert reasons == {("a", 0): "blank", ("a", 1): "ambiguous", ("a", 2): "ambiguous", ("b", 1): "leak"}


def write_tarball(directory: Path, pin: packs.Tarball, files: dict[str, object]) -> packs.Tarball:
    """Writes it and returns the pin with its sha256."""
    path = directory / pin.filename
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packs.Tarball(pin.package, pin.version, hashlib.sha256(path.read_bytes()).hexdigest(), pin.style)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, words, packs): eight animals and a flag, in three styles."""
    directory = tmp_path_factory.mktemp("tarballs")
    rows = [
        {"hexcode": f"1F40{i}", "label": f"animal {i}", "order": 9 - i, "group": 3, "subgroup": 1, "tags": [f"tag {i}"]}
        for i in range(8)
    ] + [{"hexcode": "1F3F3", "label": "flag", "order": 99, "group": 9, "subgroup": 2}]
    words = {
        "meta/groups.json": {
            "groups": {"3": "animals-nature", "9": "flags"},
            "subgroups": {"1": "animal-mammal", "2": "flag"},
        },
        "meta/unicode-names.json": {},
        "en/shortcodes/cldr.json": {},
        "en/shortcodes/emojibase.json": {"1F400": ["animal_0", "rat"]},
        **{f"{language}/data.json": rows for language in names.LANGUAGES},
    }
    draw = lambda i, colour: f'<circle cx="{i + 4}" cy="8" r="{4 + i / 4}" fill="{colour}"/>'
    styles = {"noto": "#800", "noto-v1": "#080", "twemoji": "#008"}
    icons = {
        style: {f"animal-{i}": draw(i, colour) for i in range(8)} | {"flag": draw(0, colour)}
        for style, colour in styles.items()
    }
    icons["twemoji"]["animal-7"] = icons["twemoji"]["animal-6"]
    pins = tuple(
        write_tarball(directory, packs.Tarball(f"@iconify-json/{style}", "1.0.0", "", style), iconify(icons[style]))
        for style in styles
    )
    return directory, write_tarball(directory, packs.Tarball("emojibase-data", "1.0.0", ""), words), pins


def test_builds_the_same_bytes_in_any_process(tiny, tmp_path):
    directory, words, pins = tiny
    build.build(directory, tmp_path / "here", words=words, pack_tarballs=pins)
    program = f"""
from pathlib import Path
from vlm_jax.data.emoji import build
from vlm_jax.data.emoji.packs import Tarball
build.build(Path({str(directory)!r}), Path({str(tmp_path / "there")!r}), words={words!r}, pack_tarballs={pins!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / side).iterdir()} for side in ("here", "there"))
    assert here == there

    report = json.loads(here["report.json"])
    held_out = [row["id"] for row in json.loads(here["concepts.json"]) if row["held_out"]]
    assert len(held_out) == 1
    assert report["unmatched_icons"] == {"noto": 1, "noto-v1": 1, "twemoji": 1}
    # emojibase's order decides the ids: animal 7 is concept 0.
    assert report["left_out"] == {"ambiguous": [["twemoji", 0, "animal-7"], ["twemoji", 1, "animal-6"]]}
    assert {split: sum(counts.values()) for split, counts in report["pictures"].items()} == {
        "train": 5 + (held_out[0] in (0, 1)),
        "unseen_style": 7,
        "unseen_concepts": 3 - (held_out[0] in (0, 1)),
        "near_style": 7,
    }
    first = read_records(tmp_path / "here", "unseen_style")[0]
    assert first["style"] == [b"noto"]
    assert first["keywords/ja"] == [b"tag 7" if held_out != [0] else b"tag 6"]


def test_build_errors_name_the_fix(tiny, tmp_path, monkeypatch):
    directory, words, pins = tiny
    with pytest.raises(UserError, match=r"1\.0\.0\.tgz is missing; run `npm pack emojibase-data@1\.0\.0`"):
        packs.read_json(tmp_path, words, names.FILES)
    with pytest.raises(UserError, match="expected 00; delete it and fetch it again"):
        packs.read_json(directory, packs.Tarball("emojibase-data", "1.0.0", "00"), names.FILES)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"lacks emojibase-data@9 and npm is not installed"):
        build.fetch(directory, (words, packs.Tarball("emojibase-data", "9", "")))
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files than a prepared data set"):
        build.build(directory, tmp_path, words=words, pack_tarballs=pins)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"needs resvg_py, which is missing; pip install 'vlm_jax\[emoji\]'"):
        render.render("<svg/>")
