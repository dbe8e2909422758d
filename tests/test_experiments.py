"""Every study has the shape that experiments/README.md tells, and shows what its results.json holds. Nothing runs."""

import importlib
import json
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import study
from vlm_jax import catalogue

FOLDERS = sorted(path.name for path in study.HERE.iterdir() if path.is_dir() and any(path.glob("*.*")))
SECTIONS = ["Question", "Claim", "Protocol", "Command", "Result", "Verdict"]
WORDS = r"\**((?:Partly |Not )?(?:reproduced|reached)|Partly)\b"
NUMBER = re.compile(r"\d(?:[\d,.]*\d)?")
RUNS = {name: importlib.import_module(f"experiments.{name}.run") for name in study.NAMES}
VERDICTS = {name: run.verdicts(study.read(name)) for name, run in RUNS.items() if hasattr(run, "verdicts")}


def sections(name):
    """{heading: text}, in order."""
    parts = re.split(r"^## (.*)$", (study.HERE / name / "README.md").read_text(), flags=re.M)
    assert re.match(r"# \S", parts[0]), f"{name}/README.md should begin with `# Title`"
    return dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))


def row(name):
    """The study's cells in the index."""
    rows = [
        line for line in (study.HERE / "README.md").read_text().splitlines() if line.startswith(f"| [{name}]({name}/)")
    ]
    assert len(rows) == 1, f"experiments/README.md should have one row `| [{name}]({name}/) | ...`; it has {len(rows)}"
    return [cell.strip() for cell in rows[0].strip("|").split("|")]


def words(text):
    found = re.match(WORDS, text, flags=re.I)
    assert found and found[1][0].isupper(), (
        f"a verdict begins with Reproduced, Not reached, Partly ...; got {text[:40]!r}"
    )
    return found[1]


def test_the_index_has_no_row_of_a_study_that_is_gone():
    linked = re.findall(r"^\| \[(\w+)\]", (study.HERE / "README.md").read_text(), flags=re.M)
    assert sorted(linked) == FOLDERS == study.NAMES


@pytest.mark.parametrize("name", FOLDERS)
def test_readme(name):
    found = sections(name)
    assert list(found) == SECTIONS
    assert all(found.values()), f"an empty section: {[head for head, text in found.items() if not text]}"
    assert f"experiments.{name}.run" in found["Command"]
    assert found["Result"].count("](plot.png)") == 1
    for file in re.findall(r"`(\w+\.(?:py|json|png|md))`", "".join(found.values())):
        near = study.HERE / name / file, study.HERE / file
        assert any(path.exists() for path in near), f"{name}/README.md names {file}, which is not there"


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tables_are_those_of_the_results(name):
    made = study.tables(RUNS[name].table(study.read(name)))
    assert made
    assert study.tables(sections(name)["Result"]) == made, f"python -m experiments.study {name} makes them again"


@pytest.mark.parametrize("name", FOLDERS)
def test_the_plot_is_that_of_the_results(name):
    results = study.read(name)
    assert [path.name for path in (study.HERE / name).glob("*.png")] == ["plot.png"]
    with Image.open(study.HERE / name / "plot.png") as image:
        image.load()
        stale = f"plot.png shows other results; python -m experiments.study {name} draws it again"
        assert image.info.get("results") == study.digest(results), stale
    figure = RUNS[name].plot(results)
    assert isinstance(figure, Figure)
    assert all(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_index_says_what_the_study_says(name):
    found, cells = sections(name), row(name)
    assert words(cells[3]) == words(found["Verdict"])
    numbers = NUMBER.findall("\n".join(study.tables(found["Result"])))
    headline = NUMBER.findall(re.sub(r"\b[A-Z]+\d*/\d+\b", "", cells[4]))  # L/14 is a name
    assert headline and set(headline) <= set(numbers), f"not in the tables: {set(headline) - set(numbers)}"


def test_verdicts_are_those_of_the_results():
    assert json.loads(catalogue.VERDICTS.read_text()) == VERDICTS, "python -m experiments.study makes them again"


def test_claims_of_the_catalogue_are_rows_of_studies():
    claims = [one.claim.split(": ", 1) for one in catalogue.read() if one.claim]
    assert claims
    assert [claim for name, claim in claims if claim not in VERDICTS[name]] == []


@pytest.mark.parametrize("name", VERDICTS)
def test_the_verdict_is_that_of_the_rows(name):
    found = set(VERDICTS[name].values()) - {"not run"}
    together = found.pop() if len(found) == 1 else "partly reproduced"
    assert words(sections(name)["Verdict"]).lower() == together


@pytest.mark.parametrize("name", VERDICTS)
def test_claims_without_results_are_not_run(name):
    assert set(RUNS[name].verdicts({}).values()) == {"not run"}


A, B = study.Number(0.5, 0.1), study.Number(0.3, 0.02)


@pytest.mark.parametrize(
    ("a", "b", "above", "rivals"),
    [
        (A, B, False, True),  # by exactly twice the larger spread
        (study.Number(0.501, 0.1), B, True, True),
        (B, study.Number(0.501, 0.1), False, False),
        (B, A, False, True),
        (study.Number(0.31), study.Number(0.3), True, True),
        (study.Number(0.3), study.Number(0.31), False, False),
        (A, None, None, None),
        (None, A, None, None),
    ],
)
def test_comparisons(a, b, above, rivals):
    assert study.above(a, b) is above
    assert study.rivals(a, b) is rivals


def test_a_verdict_is_that_of_its_comparisons():
    assert study.verdict(True, True) == "reproduced"
    assert study.verdict(True, False) == "partly reproduced"
    assert study.verdict(False, False) == "not reproduced"
    assert study.verdict(True, None) == "not run"


def test_numbers_over_seeds():
    results = {"CLIP 0": {"top1": 0.1}, "CLIP 1": {"top1": 0.3}}
    top1 = lambda found: found["top1"]
    assert study.over(results, "CLIP", (0, 1), top1) == pytest.approx((0.2, 0.02**0.5))
    assert study.over(results, "CLIP", (1,), top1) == (0.3, 0.0)
    assert study.over(results, "CLIP", (0, 1, 2), top1) is None


def test_a_new_head_enters_the_few_shot_study(monkeypatch):
    run, results = RUNS["few_shot"], study.read("few_shot")
    of, heads = catalogue.of, catalogue.of("heads")
    shown = {name for name in heads if f"{run.SHOTS[0]} shots {name}" in results}
    declared = dict.fromkeys([f"head_{i}" for i in range(9)], next(iter(heads.values())))
    monkeypatch.setattr(catalogue, "of", lambda *families: of(*families) | (declared if "heads" in families else {}))
    more = {
        f"{shots} shots {name}": results[f"{shots} shots {next(iter(heads))}"]
        for shots in run.SHOTS
        for name in declared
    }
    rows = [line for line in run.table(results | more).splitlines() if line.startswith("| head_")]
    assert len(rows) == len(declared)
    left, right = run.plot(results | more).axes
    assert {text.get_text() for text in left.get_legend().get_texts()} == shown | declared.keys()
    assert declared.keys() < {text.get_text() for text in right.get_yticklabels()}
