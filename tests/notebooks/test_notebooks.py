"""The notebooks of colab/: as they are stored, and executed (make notebooks; minutes each, so not among the others)."""

import base64
import importlib.util
import io
import re

import nbformat
import pytest
from PIL import Image

from tests.support.paths import ROOT

COLAB = ROOT / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
NAMES = ["01_zero_shot", "02_train_clip", "03_caption", "04_adapt_few_shot", "05_ul2", "06_plan_a_pod"]
BYTES = 1_500_000


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("execute", COLAB / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


def cells_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures_of(notebook):
    data = [output.get("data", {}) for cell in cells_of(notebook) for output in cell.outputs]
    pictures = [Image.open(io.BytesIO(base64.b64decode(one["image/png"]))) for one in data if "image/png" in one]
    return [picture.size for picture in pictures if min(picture.size) > 100]


def text_of(output):
    data = output.get("data", {})
    return "".join([output.get("text", ""), *(data[kind] for kind in ("text/plain", "text/html") if kind in data)])


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == NAMES


def test_first_cells_are_the_same():
    """Which of the package's extras is installed is the one thing that differs."""
    first = {nbformat.read(path, as_version=4).cells[0].source.replace('"tpu"', '"hf"') for path in NOTEBOOKS}
    assert len(first) == 1
    assert "%pip install" in first.pop()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = cells_of(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.cells[0].cell_type == "code"
    assert pictures_of(notebook)
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in outputs}
    for output in outputs:  # no folder of the machine that executed it
        assert not re.search(r"(?<![\w.:/])/\w+/\w", text_of(output))
    assert path.stat().st_size < BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_executes(path, execute):
    notebook = execute(path)
    stored = nbformat.read(path, as_version=4)
    assert len(pictures_of(notebook)) == len(pictures_of(stored))
    for now, before in zip(cells_of(notebook), cells_of(stored), strict=True):
        kinds = [{o.output_type for o in cell.outputs if o.get("name") != "stderr"} for cell in (now, before)]
        assert kinds[0] == kinds[1]
        said = "".join(o.text for o in now.outputs if o.get("name") == "stderr")
        assert "warning" not in said.lower(), said
