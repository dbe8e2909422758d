"""The command `adapt`, in process."""

import json

import pytest
from absl import flags

import vlm_jax
from vlm_jax.adapt import __main__ as adapt_command
from vlm_jax.adapt.methods import search_rate
from vlm_jax.command import commands
from vlm_jax.errors import UserError


def test_an_interrupted_adaptation_continues_after_its_last_fit(base, tmp_path, monkeypatch):
    given = dict(
        methods=["zero_shot", "gda", "tip_adapter"], seeds=2, uri="tfds:emoji", split="unseen_style[:600]", shots=2,
        train_split="train[:2000]", label="concept", classes={0: "grinning face", 570: "a"},
    )  # fmt: skip
    whole, fits, save = adapt_command.adapt(base, tmp_path / "whole", **given), [], adapt_command.save_adapter

    def interrupted(path, *models):
        fits.append(path.stem)
        if len(fits) == 3:
            raise KeyboardInterrupt
        save(path, *models)

    monkeypatch.setattr(adapt_command, "save_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapt_command.adapt(base, tmp_path / "out", **given)
    assert (tmp_path / "out" / "gda_0.safetensors").exists() and not (tmp_path / "out" / "lock").exists()
    with pytest.raises(UserError, match=r"an adaptation with adapter.shots = 2, not 1; choose another --out or delete"):
        adapt_command.adapt(base, tmp_path / "out", **given | {"shots": 1})
    assert adapt_command.adapt(base, tmp_path / "out", **given) == whole
    assert fits == ["zero_shot_0", "gda_0", "tip_adapter_0", "tip_adapter_0", "zero_shot_1", "gda_1", "tip_adapter_1"]
    assert not (tmp_path / "out" / "progress").exists()


def test_the_command(base, tmp_path, monkeypatch):
    """From flags to a table, results, and a file that `load(...)` takes."""
    monkeypatch.setattr(adapt_command, "load", lambda spec, **_: base)
    monkeypatch.setitem(search_rate.__kwdefaults__, "steps", 5)
    values = flags.FlagValues()
    commands.define("adapt", values)
    given = [
        "--model=m",
        "--method=zero_shot,gda,lora",
        "--data=tfds:emoji",
        "--split=unseen_style[:600]",
        "--train_split=train[:2000]",
        f"--out={tmp_path / 'o'}",
    ]
    given += [
        "--label=concept",
        "--classes={0: 'grinning face', 570: 'a', 571: 'b', 572: 'c'}",
        "--where=concept=0,570,571,572",
    ]
    given += ["--train_where=concept=0,570,571,572", "--shots=2", "--seeds=2", "--base_to_new"]
    values(["adapt", *given])
    answer = adapt_command.main([], values)
    assert "zero_shot" in answer.text and "harmonic_mean" in answer.text and "+-" in answer.text
    numbers = json.loads((tmp_path / "o" / "results.json").read_text())
    page = tmp_path / "o" / "report" / "index.html"
    assert answer.results == numbers | {"adapters": str(tmp_path / "o"), "report": str(page)}
    assert "2 draws of 2 pictures a class" in page.read_text() and "<td>lora</td>" in page.read_text()
    assert {"lora/top1", "lora/new/top1", "lora/harmonic_mean", "gda/top1"} <= numbers.keys()
    assert "gda/new/top1" not in numbers
    assert vlm_jax.load_adapter(tmp_path / "o" / "lora_1.safetensors", base).classes == ("grinning face", "a")
    assert adapt_command.main([], values) == answer  # at once
    values.seeds = 3
    with pytest.raises(UserError, match=r"holds an adaptation with adapter\.seeds = 2, not 3; choose another --out"):
        adapt_command.main([], values)
