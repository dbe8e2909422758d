"""Every study has the shape that experiments/README.md tells, and shows what its results.json holds. Nothing runs."""

import importlib
import re

import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import study

FOLDERS = sorted(path.name for path in study.HERE.iterdir() if path.is_dir() and any(path.glob("*.*")))
SECTIONS = ["Question", "Claim", "Protocol", "Command", "Result", "Verdict"]
WORDS = r"\**((?:Partly |Not )?(?:reproduced|reached)|Partly)\b"
NUMBER = re.compile(r"\d(?:[\d,.]*\d)?")


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
    run = importlib.import_module(f"experiments.{name}.run")
    made = study.tables(run.table(study.read(name)))
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
    figure = importlib.import_module(f"experiments.{name}.run").plot(results)
    assert isinstance(figure, Figure)
    assert all(axes.has_data() for axes in figure.axes)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_index_says_what_the_study_says(name):
    found, cells = sections(name), row(name)
    assert words(cells[3]) == words(found["Verdict"])
    numbers = NUMBER.findall("\n".join(study.tables(found["Result"])))
    headline = NUMBER.findall(re.sub(r"\b[A-Z]+\d*/\d+\b", "", cells[4]))  # L/14 is a name
    assert headline and set(headline) <= set(numbers), f"not in the tables: {set(headline) - set(numbers)}"
