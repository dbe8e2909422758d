"""A report from the files of a run, whole and in part."""

import html.parser
import json
import re

import numpy as np
import pytest

from vlm_jax import __version__, report
from vlm_jax.report import document, figures, tables
from vlm_jax.report.figures.evaluation import pictures_of

NAMES = ["a cat", "a <dog>", "$ and $", "an owl", "a fox", "a cow with a very long name that fits no line at all"]


def artifacts():
    images = np.full((4, 12, 12, 3), 200, np.uint8)
    return {
        "classes": NAMES,
        "per_class": np.array([1.0, 0.5, np.nan]),
        "confusions": [("a cat", "a <dog>", 3), ("$ and $", "an owl", 1)],
        "class_pictures": {"names": ["a cat", "a <dog>", "$ and $"], "images": images[:3]},
        "gallery": {
            "images": images,
            "truth": ["a cat", "a fox", NAMES[5], "$ and $"],
            "names": [NAMES[:5]] * 4,
            "scores": np.tile(np.array([0.9, 0.4, 0.1, -0.1, -0.2], np.float32), (4, 1)),
        },
        "predictions": {
            "label": np.array([0, 0, 1, 2]),
            "predicted": np.array([0, 1, 1, 3]),
            "confidence": np.array([0.9, 0.6, 0.8, 0.7], np.float32),
        },
        "similarity": {"images": images[:2], "texts": NAMES[:2], "scores": np.eye(2, dtype=np.float32)},
        "space": {"image": np.eye(4, dtype=np.float32), "text": -np.eye(4, dtype=np.float32), "names": NAMES[:4]},
        "attention": {"images": images, "maps": np.arange(16.0).reshape(4, 2, 2), "titles": NAMES[:4]},
        "found": {
            "queries": NAMES[:2],
            "images": images[None, :2].repeat(2, 0),
            "scores": np.eye(2, dtype=np.float32),
            "right": np.eye(2, dtype=bool),
        },
    }


@pytest.fixture
def workdir(tmp_path):
    workdir = tmp_path / "demo"
    workdir.mkdir()
    lines = [
        {"step": 1, "loss": 5.0, "lr": 0.1, "examples": 8},
        {"step": 2, "loss": 4.0, "lr": 0.2, "examples": 16, "seen/top1": 0.25, "new/top1": 0.5},
        {"step": 3, "seen/top1": 0.5, "new/top1": 0.5, "seen/pixel_top1": 0.4, "seen/examples": 732.0},
    ]
    # a kill cut the last line short
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    results = {
        "step": 3, "params_sha256": "abc", "train/seconds": 12.5, "train/data_wait_fraction": 0.031,
        "data/bad_examples": 3,
        "data/read_examples": 800, "data/bad/decode": 3, "seen/left_out": 20,
        "seen/top1/interval": [0.58, 0.65], "seen/notes": ["1 class <b> has no picture"],
        "seen/top1": 0.612, "seen/top5": 0.831, "seen/examples": 732.0, "seen/pixel_top1": 0.474,
        "new/top1": 0.108, "captions/image_to_text/recall@5": 0.5,
    }  # fmt: skip
    (workdir / "results.json").write_text(json.dumps(results))
    (workdir / "config.json").write_text('{"batch_size": 256, "note": "a < b"}')
    report.save_artifacts(workdir, "seen", artifacts())
    report.save_artifacts(workdir, "new/one", {"confusions": [["a cat", "an owl", 1]]})
    report.save_artifacts(workdir, "nothing", {})
    return workdir


class Page(html.parser.HTMLParser):
    """Collects table rows, names of figures and links of a page."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.labels, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "svg":
            self.labels.append(attributes["aria-label"])
        self.links += [value for key, value in attributes.items() if key in ("href", "src", "xlink:href")]

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.lasttag in ("td", "th", "code"):
            self.rows[-1][-1] += data.strip()


def test_report_of_a_whole_run(workdir):
    path = report.write(workdir)
    assert path == workdir / "report" / "index.html"
    text = path.read_text()
    page = Page(text)
    assert page.rows[0] == ["", "top-1", "pixel top-1", "top-5", "examples"]
    assert page.rows[1] == ["seen", "61.2 %", "47.4 %", "83.1 %", "732"]
    assert page.rows[2] == ["new", "10.8 %", "", "", ""]
    assert "<small>58.0 to 65.0 %</small>" in text and "<li>seen: 1 class &lt;b&gt; has no picture</li>" in text
    assert page.rows[3:5] == [["", "image → text recall@5"], ["captions", "50.0 %"]], "nothing in common: its own table"
    facts = ["data wait fraction", "3.1 %"], ["seconds", "12.5"], ["training", "800", "797", "3", ""]
    facts += ["seen", "752", "732", "", "20"], ["a cat", "50 %", "2", "a <dog> 1"], ["$ and $", "0 %", "1", "an owl 1"]
    assert all(fact in page.rows for fact in facts)
    headings = ["what pictures find", "where it looks", "what texts find", "pictures and texts", "worst confusions"]
    headings += ["confusion matrix", "calibration", "the space of both"]
    assert page.labels == [
        "curves over training steps",
        *(f"seen: {one}" for one in headings),
        "new/one: worst confusions",
    ]
    assert all(link.startswith(("data:image/", "#")) for link in page.links), "the page needs no other file"
    assert sorted(path.parent.iterdir()) == [path] and "<script" not in text
    defined, used = re.findall(r' id="([^"]+)"', text), re.findall(r'(?:url\(|href=")#([^)"]+)', text)
    assert len(defined) == len(set(defined)) and set(used) <= set(defined), "figures do not mix their parts up"
    assert "a &lt; b" in text and "a &lt;dog&gt;" in text and "a <dog>" not in text


def test_report_leaves_out_what_is_absent(tmp_path):
    page = Page(report.write(tmp_path).read_text())
    assert page.rows == page.labels == []
    (tmp_path / "results.json").write_text('{"seen/top1": 0.5}')
    page = Page(report.write(tmp_path).read_text())
    assert page.rows == [["", "top-1"], ["seen", "50.0 %"]]


def test_artifacts_return_as_they_were_saved(workdir):
    saved = report.load_artifacts(workdir)
    assert list(saved) == ["new/one", "seen"]
    np.testing.assert_array_equal(saved["seen"]["gallery/images"], artifacts()["gallery"]["images"])
    assert saved["seen"]["gallery/truth"] == artifacts()["gallery"]["truth"]
    assert saved["new/one"] == {"confusions": [["a cat", "an owl", 1]]}


def test_series_ends_at_a_broken_line_and_drops_single_points(workdir):
    found = report.series(workdir)
    assert found == {
        "loss": ([1, 2], [5.0, 4.0]), "lr": ([1, 2], [0.1, 0.2]),
        "seen/top1": ([2, 3], [0.25, 0.5]), "new/top1": ([2, 3], [0.5, 0.5]),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("unseen/top1", 0.61234, "61.2 %"), ("pixel_top5", 0.637, "63.7 %"), ("text_to_image/recall@10", 1, "100.0 %"),
        ("pixel_examples", 732.0, "732"), ("step", 12000, "12,000"), ("train/examples_per_second", 1822.2, "1,822"),
        ("foils/order", 0.9981, "99.8 %"), ("foils/order_pairs", 1017.0, "1,017"), ("exact_match", 0.3, "30.0 %"),
        ("foils/relation", 0.5, "50.0 %"), ("foils/count_left_out", 38.0, "38"),
        ("loss", 0.123456, "0.1235"), ("loss", float("nan"), "nan"), ("params_sha256", "abc", "abc"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(name, value, shown):
    assert report.format_value(name, value) == shown


def test_a_header_says_what_ran(tmp_path):
    params = {"w": np.zeros((3, 4)), "b": np.zeros(4)}
    report.save_about(tmp_path, "evaluation: zeroshot", "runs/<mine>", "tfds:emoji", params)
    rows = dict(Page(report.write(tmp_path).read_text()).rows)
    assert rows["what"] == "evaluation: zeroshot" and rows["model"] == "runs/<mine>: 16 parameters"
    assert (
        rows["data"] == "tfds:emoji" and rows["device"].endswith("cpu") and f"vlm_jax {__version__}" in rows["version"]
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+", rows["finished"])


def test_photographs_shrink_and_drawings_stay():
    noise = np.random.default_rng(0).normal(0, 20, (160, 160, 3))
    photograph = np.clip(np.arange(160)[:, None, None] + noise, 0, 255).astype(np.uint8)
    drawn = document.figure(figures.maps([photograph], np.ones((1, 1, 1))), "a photograph", "a")
    assert "data:image/jpeg" in drawn and len(drawn) < 200_000
    assert "data:image/jpeg" not in document.figure(figures.confusion_map([0, 1], [0, 1], ["a", "b"]), "a matrix", "b")


def test_all_classes_are_in_the_table():
    rng = np.random.default_rng(0)
    label, names = np.arange(400) % 40, [f"class {i}" for i in range(41)]
    found = {"classes": names, "predictions/label": label, "predictions/predicted": rng.permutation(label)}
    page = Page(tables.class_table(found))
    assert len(page.rows) == 41 and page.rows[0] == ["class", "right", "pictures", "taken for"]
    for name, right, pictures, taken in page.rows[1:]:
        counts = [int(one.rsplit(" ", 1)[1]) for one in taken.split(", ")]
        assert sum(counts) + round(int(right[:-2]) / 100 * 10) == int(pictures) == 10
        assert counts == sorted(counts, reverse=True) and name in names
    assert [shown.kind for shown in pictures_of(found)] == ["matrix", "map"]
    assert Page(tables.class_table({"classes": names[:2], "per_class": np.array([0.5, np.nan])})).rows[1:] == [
        ["class 0", "50.0 %"]
    ]
