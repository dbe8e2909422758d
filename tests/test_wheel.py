"""The wheel, unpacked into an empty folder: it trains an experiment by its name and loads the packaged model.

The environment of the tests has the checkout installed. `python -S` reads no .pth file, so what can be imported is what
PYTHONPATH names: the wheel and the dependencies.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "vlm_jax", "configs")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
pytestmark = pytest.mark.subprocess


def pip(*arguments):
    own = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([*own, *map(str, arguments)], check=True)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what is built: builds leave files behind, and take in what earlier ones left."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        copy = shutil.copy if (ROOT / name).is_file() else lambda *pair: shutil.copytree(*pair, ignore=LEFT_OUT)
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def installed(sources, tmp_path_factory):
    """The folder into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (wheel,) = folder.glob("*.whl")
    pip("install", "--no-index", "--no-deps", "--no-compile", "--target", folder / "installed", wheel)
    return folder / "installed"


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python in an empty folder and returns what it prints."""

    def run(*arguments, fails=False):
        paths = os.pathsep.join((str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        done = subprocess.run(
            [sys.executable, "-S", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr if fails else done.stdout

    return run


def test_all_files_travel_and_nothing_else(sources, installed):
    assert files(installed / "vlm_jax" / "configs") == files(sources / "configs")
    package = {name for name in files(installed / "vlm_jax") if not name.startswith("configs/")}
    assert package == files(sources / "vlm_jax")
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"bin", "vlm_jax"}


def test_a_config_given_by_name_trains(installed, python, tmp_path):
    flags = ("--config.duration=2 steps", "--config.evals={}", "--config.log.tensorboard=False", "--json")
    told = json.loads(python("-m", "vlm_jax", "train", "--config=clip:smoke", "--workdir=runs/smoke", *flags))
    assert told["step"] == 2 and told["report"] == str(tmp_path / "runs" / "smoke" / "report" / "index.html")
    assert "did you mean `clip`?" in python("-m", "vlm_jax", "plan", "--config=clp", "--topology=v5e:2x2", fails=True)


def test_a_config_of_ones_own_imports_those_of_the_wheel(python, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("from configs.clip import get_config\n")
    program = """
import sys
from absl import flags
from vlm_jax.command import commands, configs
sys.path.insert(0, "")
values = flags.FlagValues()
commands.define("train", values)
configs.parse(values, ["train", "--config=configs/mine.py:smoke", "--config.batch_size=3", "--workdir=a"])
print(values.config.batch_size, values.config.duration)
"""
    assert python("-c", program) == "3 40 steps\n"


def test_the_packaged_model_loads(installed, python):
    program = """
import numpy as np, vlm_jax
from vlm_jax.data.sources import open_source
print(vlm_jax.__file__)
clip = vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")
picture = open_source("tfds:emoji", "unseen_style")[0]["image"]
print(clip.classify([picture], ["face", "umbrella"]).shape)
"""
    assert python("-c", program).splitlines() == [str(installed / "vlm_jax" / "__init__.py"), "(1, 2)"]
