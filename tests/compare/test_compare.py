"""Runs side by side: what is read, what is said, the page."""

import json

import numpy as np
import pytest
from absl import flags

from vlm_jax.command import commands
from vlm_jax.compare import __main__ as command
from vlm_jax.compare import compare, page, read, text
from vlm_jax.errors import UserError
from vlm_jax.report import save_artifacts
from vlm_jax.report.figures.curves import compared


def run(folder, lr, top1, **more):
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / step, "lr": lr, "seen/top1": top1} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    interval = [top1 - 0.1, top1 + 0.1]
    results = {"step": 2, "params_sha256": "x", "seen/top1": top1, "seen/top1/interval": interval, "seen/notes": ["n"]}
    (folder / "results.json").write_text(json.dumps(results | more))
    (folder / "config.json").write_text(
        json.dumps({"optimizer": {"lr": lr, "name": "adam"}, "only <b>" * (lr > 0.1): 1})
    )
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return [run(tmp_path / "one" / "a", 0.1, 0.5), run(tmp_path / "two" / "a", 0.2, 0.6, **{"new/top1": 0.25})]


def test_results_and_settings_that_differ(runs, tmp_path):
    found = compare(read([runs[0], f"{runs[1]}/results.json"]))
    assert list(found["runs"]) == ["one/a", "two/a"], "as much of the path as tells them apart"
    assert found["results"] == {
        "step": {"one/a": 2, "two/a": 2}, "seen/top1": {"one/a": 0.5, "two/a": 0.6}, "new/top1": {"two/a": 0.25},
    }  # fmt: skip
    assert found["intervals"] == {"seen/top1": {"one/a": [0.4, 0.6], "two/a": [0.5, 0.7]}}
    assert found["differences"]["optimizer.lr"] == {"one/a": 0.1, "two/a": 0.2}
    assert found["differences"]["only <b>"] == {"two/a": 1} and "optimizer.name" not in found["differences"]


def test_the_command(runs, tmp_path):
    values = flags.FlagValues()
    commands.define("compare", values)
    values(["compare", f"--out={tmp_path / 'page.html'}"])
    answer = command.main(["compare", *runs], values)
    lines = [line.split("  ") for line in answer.text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert ["seen/top1", "50.0 % (40.0 to 60.0 %)", "60.0 % (50.0 to 70.0 %)"] in cells
    assert ["optimizer.lr", "0.1", "0.2"] in cells and ["only <b>", "-", "1"] in cells
    assert answer.results["page"] == str(tmp_path / "page.html") and json.dumps(answer.results)
    written = (tmp_path / "page.html").read_text()
    assert (
        written.count("<svg") == 2 and "only &lt;b&gt;" in written and "href=" not in written.replace("xlink:href", "")
    )
    (tmp_path / "folder").mkdir()
    values.out = str(tmp_path / "folder")
    assert command.main(["compare", *runs], values).results["page"].endswith("folder/index.html")


def test_the_same_examples_are_compared_one_by_one(runs):
    kept = lambda predicted: {"predictions": dict(
        position=np.array([4, 7, 9, 11]), label=np.array([0, 1, 2, 3]), predicted=np.array(predicted)
    )}  # fmt: skip
    save_artifacts(runs[0], "seen", kept([0, 0, 2, 0]))
    save_artifacts(runs[1], "seen", kept([0, 1, 0, 3]))
    save_artifacts(runs[0], "other", kept([0, 0, 2, 0]))
    found = compare(both := read(runs))["paired"]
    assert list(found) == ["seen"] and list(found["seen"]) == ["two/a"]
    one = found["seen"]["two/a"]
    assert (one["gained"], one["lost"], one["difference"], one["against"]) == (2, 1, 0.25, "one/a")
    assert "+25.0" in text(both, compare(both)) and json.dumps(compare(both))


def test_shares_begin_at_zero_and_others_say_their_range():
    lines = {"loss": ([1, 2], [5.0, 4.0]), "new/top1": ([1, 2], [0.5, 0.6])}
    loss, share = compared({"a": lines, "b": lines}).axes
    assert loss.get_title(loc="left") == "loss" and loss.get_title(loc="right") == "4 to 5" and loss.get_ylim()[0] > 3
    assert share.get_ylim()[0] == 0 and not share.get_title(loc="right")
    assert [text.get_text() for text in share.get_legend().get_texts()] == ["a", "b"]


def test_mistakes(runs, tmp_path):
    for paths, expected in (
        (runs[:1], "two runs or more can be compared; got 1"),
        ([runs[0], runs[0]], "given twice"),
        ([runs[0], str(tmp_path)], "is no run: it has neither results.json nor metrics.jsonl"),
    ):
        with pytest.raises(UserError, match=expected):
            read(paths)
    results = tmp_path / "one" / "a" / "results.json"
    for damaged in ("{", "[]", "\udcff", "[" * 99_999):
        results.write_text(damaged, errors="surrogateescape")
        with pytest.raises(UserError, match=r"results\.json (is not JSON|holds a list)"):
            read(runs)
    odd = {"a": None, "b/top1": 0.5, "b/top1/interval": 3, "b/notes": 1, "c": [1], "d/top1": float("nan"), "e": True}
    results.write_text(json.dumps(odd))
    found = compare(read(runs))
    assert found["results"]["b/top1"] == {"one/a": 0.5} and not {"a", "c", "e"} & found["results"].keys()
    assert text(read(runs), found) and page(read(runs), found, tmp_path / "page.html").is_file()
