"""`--config=clip:smoke` is configs/clip.py with the variant smoke, wherever the command runs; a path is a path."""

import sys

import pytest
from absl import flags

from vlm_jax.catalogue import CONFIGS
from vlm_jax.command import commands, configs
from vlm_jax.errors import UserError


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The config of `train` with some flags, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *(path for path in sys.path if path not in ("", ".", str(CONFIGS.parent)))])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)

    def run(*given):
        values = flags.FlagValues()
        commands.define("train", values)
        configs.parse(values, ["train", *given])
        return values.config

    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]


def test_names_are_those_of_the_folder():
    assert "clip" in configs.names() and "embedded" not in configs.names()
    assert all((CONFIGS / f"{name}.py").is_file() for name in configs.names())


@pytest.mark.parametrize("name", configs.names())
def test_a_name_is_its_file(name, read):
    path = f"{CONFIGS / name}.py"
    assert (configs.locate(name), configs.locate(f"{name}:a:b")) == (path, f"{path}:a:b")
    assert read(f"--config={name}").to_dict() == read(f"--config={path}").to_dict()


@pytest.mark.parametrize("path", ["mine.py", "./mine", "configs/clip.py:smoke", "/some/where/mine.py:x", "."])
def test_a_path_stays(path):
    assert configs.locate(path) == path


def test_overrides(read):
    config = read("--config=clip:smoke", "--config.batch_size=3")
    assert (config.batch_size, config.duration) == (3, "40 steps")


@pytest.mark.parametrize(
    ("spec", "hint"), [("clp:smoke", "did you mean `clip`?"), ("x", f"known: {', '.join(configs.names())};")]
)
def test_an_unknown_name_is_told(spec, hint, read):
    with pytest.raises(UserError, match="there is no config `") as told:
        configs.locate(spec)
    assert hint in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(flags.Error, match=f"--config={spec}: there is no config"):
        read(f"--config={spec}")


def test_neighbours_of_a_name_are_those_that_come_with_it(read, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "embedded.py").write_text("raise ImportError('another embedded')\n")
    assert read("--config=clip:smoke").duration == "40 steps"


def test_a_file_of_ones_own_imports_both(read, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "size.py").write_text("SIZE = 5\n")
    mine = "from configs import clip, size\ndef get_config(variant):\n    config = clip.get_config(variant)\n"
    (tmp_path / "configs" / "mine.py").write_text(mine + "    config.batch_size = size.SIZE\n    return config\n")
    config = read("--config=configs/mine.py:smoke")
    assert (config.batch_size, config.duration) == (5, "40 steps")


def test_what_an_override_may_be(read):
    """Keys and sections that the config lacks, durations in steps, nested literals; a type that fits."""
    config = read(
        "--config=clip:smoke", "--config.seed=7", "--config.duration=10", "--config.profile.steps=2-3",
        "--config.optimizer.lr=1", "--config.batch_size=1e2", "--config.mesh.data=2", "--config.model.image.remat=None",
        "--config.optimizer.params=[['.*/bias', {'lr': 0.5}], ['.*', {}]]", "--config.checkpoint.every=3 epochs",
        "--config.evals={}", "--config.tokenize=tokenize(8)",
    )  # fmt: skip
    assert (config.seed, config.duration, config.profile.steps, config.batch_size) == (7, "10", "2-3", 100)
    assert type(config.optimizer.lr) is float and config.optimizer.params == [[".*/bias", {"lr": 0.5}], [".*", {}]]
    assert (config.model.image.remat, config.checkpoint.every, config.evals.to_dict()) == (None, "3 epochs", {})
    for wrong, message in {
        "batch_size=many": r"--config.batch_size=many should be a whole number; the config has \d+",
        "batch_size=1.5": "should be a whole number",
        "batchsize=3": "the config has no key `batchsize`; did you mean `batch_size`?",
        "optimizer.lrr=3": "the config has no key `optimizer.lrr`; did you mean `optimizer.lr`?",
        "batch_size.x=3": r"--config.batch_size.x: `batch_size` is \d+ and has no keys",
    }.items():
        with pytest.raises(UserError, match=message):
            read("--config=clip:smoke", f"--config.{wrong}")
    with pytest.raises(UserError, match=r"--config\.seed has no value; write --config.seed=VALUE"):
        read("--config=clip:smoke", "--config.seed", "3")
