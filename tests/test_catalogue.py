"""Declarations: what is wrong in them is named, and one decorator is all that a method needs."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from vlm_jax import catalogue
from vlm_jax.errors import UserError

DECLARED = '''
@method(family="modules", paper="arXiv:0000.00000", differs="a throw-away {what}"{more})
def {name}(model, *, rank: int = 2) -> Inserted:
    """A throw-away method."""
    return Inserted((LowRank(rank=rank),))
'''
IMPORTS = """
from vlm_jax.adapt.recipe import Inserted
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.low_rank import LowRank
"""


def source(name="throw_away", what="adapter", more=', count="4 * rank * (L_t * D_t + L_v * D_v)", identity=True'):
    return IMPORTS + DECLARED.format(name=name, what=what, more=more)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty package in the place of vlm_jax, without configs."""
    (tmp_path / "vlm_jax" / "configs").mkdir(parents=True)
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path / "vlm_jax")
    monkeypatch.setattr(catalogue, "CONFIGS", tmp_path / "vlm_jax" / "configs")
    catalogue.read.cache_clear()
    yield tmp_path / "vlm_jax"
    catalogue.read.cache_clear()


def test_declarations_are_read_and_not_imported(folder):
    (folder / "one.py").write_text("import nothing_like_this\n" + source())
    (only,) = catalogue.read()
    assert (only.name, only.family, only.paper, only.module) == (
        "throw_away", "modules", "arXiv:0000.00000", "vlm_jax.one",
    )  # fmt: skip
    assert only.options == {"rank": "2"} and only.verdict == ""
    assert only.run == "vlm-jax adapt --method=throw_away"
    assert only.path == "vlm_jax/one.py"
    assert "def throw_away" in (folder / "one.py").read_text().splitlines()[only.line - 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([source(), source()], r"two methods are called `throw_away`, in .*one\.py:7 and .*two\.py:7; rename one"),
        ([source().replace("modules", "modul")], r"one\.py:7.* names no family: `modul` \(did you mean `modules`\?\)"),
        ([source(more=', claim="few_shot: LoRA above zero"')], r"no study has the claim `few_shot: LoRA above zero` "
         r"\(did you mean `few_shot: LoRA above zero-shot`\?\)"),
        ([source(more=", claim=CLAIM")], "has an argument that is no literal; write its value"),
        ([source(more=", papers='x'")], "got an unexpected keyword argument 'papers'"),
        ([source().replace('differs="a throw-away adapter"', "identity=False")], "missing 1 required keyword-only"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(folder, files, message):
    for name, text in zip(("one.py", "two.py"), files, strict=False):
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        catalogue.read()
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(UserError, match=r"config\.objective\.penalty is `sigmod`; expected one of: softmax, sigmoid"):
        catalogue.get("penalties", "sigmod", "config.objective.penalty")
    with pytest.raises(UserError, match=r"there is no family `head` \(did you mean `heads`\?\)"):
        catalogue.of("head")


def test_a_function_outside_the_package_is_known_from_then_on(monkeypatch):
    monkeypatch.setattr(catalogue, "_OWN", {})

    @catalogue.method(family="penalties", differs="nothing is penalised")
    def none():
        """No penalty."""

    assert catalogue.get("penalties", "none", "config.objective.penalty") is none
    assert "none" not in catalogue.of("penalties")  # the catalogue is of the package


def test_every_published_system_has_its_row():
    """The systems that work are found by the names of their papers."""
    known = """
        BitFit CapPa CrossModal-FewShot Elsa-freeze FewShot-Survey FILIP GDA-CLIP LayerNorm-tuning LiT MaPLe Model-soups
        P-Tuning-v2 ProLIP RECO TencentPretrain UL2 Unified-PETL UPT VPT XAttn-only
    """
    assert {d.system for d in catalogue.read()} >= set(known.split())
    assert len(catalogue.read()) >= 35
    for declaration in catalogue.read():
        assert callable(declaration.load())


@pytest.mark.subprocess
def test_a_method_needs_one_declaration(tmp_path):
    """In a copy of the repository: list, help, documentation and conformance suite know it without another edit."""
    copy = tmp_path / "repository"
    links = shutil.copytree(ROOT / "vlm_jax", copy / "vlm_jax", ignore=_heavy, copy_function=os.link)
    for name in ("configs", "tests", "experiments", "docs", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    for heavy in ("data/emoji/prepared", "zoo/clip_tiny"):
        (links / heavy).symlink_to(ROOT / "vlm_jax" / heavy)
    (copy / "vlm_jax" / "adapt" / "modules" / "throw_away.py").write_text('"""A throw-away method."""\n' + source())

    def output(*words):
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    listed = json.loads(output("-m", "vlm_jax", "methods", "throw_away", "--json"))["methods"]
    assert [(m["name"], m["family"], m["differs"]) for m in listed] == [
        ("throw_away", "modules", "a throw-away adapter")
    ]
    assert "throw_away" in output("-m", "vlm_jax", "adapt", "--help")
    assert "throw_away" in output("-c", "from docs import tables; print(tables.methods_page())")
    suite = "tests/conformance/test_adaptation.py"
    assert "1 passed" in output(
        "-m",
        "pytest",
        "-n0",
        "-p",
        "no:cacheprovider",
        suite,
        "-k",
        "throw_away",
        "-o",
        "addopts=--import-mode=importlib",
    )


def _heavy(folder, names):
    return [name for name in names if name in ("__pycache__", "prepared", "clip_tiny")]
