"""The search over meshes, remat and accumulation: what is compiled, in which order, and what is found."""

import json
from types import SimpleNamespace

import pytest

from configs import cappa, clip, lit
from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.plan import search, train_step
from vlm_jax.run.chips import Chip

CHIP = Chip(hbm=100, bandwidth=1.0, flops=1.0, links=1.0)
FLOPS = dict(none=1.0, dots=1.1, full=1.4)


@pytest.fixture
def compiles(monkeypatch):
    """Stands in for tracing and compiling: 64 bytes of state over fsdp and tensor, activations by remat."""
    seen = []

    def traced(settings, devices):
        mesh, remat = settings["mesh"], settings["model"]["image"]["remat"]
        if mesh["tensor"] == 4:
            raise UserError("four do not divide the heads")
        flops = FLOPS[remat] + (0.3 if settings["accumulate"] > 1 else 0) + 0.1 * mesh["tensor"]
        return SimpleNamespace(settings=settings, flops=flops)

    def compiled(step, chip):
        settings = step.settings
        mesh, remat, accumulate = settings["mesh"], settings["model"]["image"]["remat"], settings["accumulate"]
        seen.append((mesh["fsdp"], mesh["tensor"], remat, accumulate))
        activations = activations_of[remat] // accumulate
        memory = dict(parameters=64 // mesh["fsdp"] // mesh["tensor"], temporaries=activations)
        known = 8, mesh, 1, memory, step.flops, 1.0, 0, [], [], chip, ""
        return train_step.Plan(*known, compiled=sum(memory.values()) <= chip.hbm)

    activations_of = dict(none=400, dots=90, full=40)
    monkeypatch.setattr(train_step, "traced", traced)
    monkeypatch.setattr(train_step, "compiled", compiled)
    return SimpleNamespace(seen=seen, activations=activations_of)


def settings_of():
    towers = dict(image=dict(remat="dots"), text=dict(remat="dots"))
    return dict(model=dict(**towers, scale_init=1.0), accumulate=1, batch_size=1024, mesh=dict(data=-1))


def test_few_are_compiled(compiles):
    """Unsplit, only full remat has room; split in eight, dots has; what computes more than the best is not compiled."""
    tried = search.search(settings_of(), range(8), CHIP)
    found = search.best(tried)
    one = [(1, 1, "none", 1), (1, 1, "dots", 1)]
    assert compiles.seen[:3] == [*one, (1, 1, "full", 1)]
    assert found.mesh == dict(fsdp=8, tensor=1) and found.remat == "dots" and found.accumulate == 1
    assert all(remat != "full" or fsdp == 1 for fsdp, _, remat, _ in compiles.seen)
    best = "best: --config.mesh.fsdp=8 --config.mesh.tensor=1 --config.accumulate=1, remat `dots` in all towers"
    assert search.text(tried).endswith(best)
    json.dumps([trial.json() for trial in tried])


def test_accumulation_when_remat_does_not_do(compiles):
    """Beside 64 bytes of state is room for 36, which 400 may fit in 16 parts; fewer are not compiled."""
    compiles.activations.update(none=400, dots=390, full=300)
    tried = search.search(settings_of(), range(1), CHIP)
    assert compiles.seen == [(1, 1, remat, 1) for remat in ("none", "dots", "full")] + [(1, 1, "none", 16)]
    assert search.best(tried).accumulate == 16


def test_nothing_fits(compiles):
    compiles.activations.update(none=4000_000, dots=4000_000, full=4000_000)
    tried = search.search(settings_of(), range(2), CHIP)
    assert search.best(tried) is None
    assert search.text(tried).endswith("none fits: take more chips, or a smaller batch")


def test_no_mesh_is_possible(monkeypatch):
    def traced(*_):
        raise UserError("no such batch")

    monkeypatch.setattr(train_step, "traced", traced)
    with pytest.raises(UserError, match="no mesh of 8 devices is possible; the last error: no such batch"):
        search.search(settings_of(), range(8), CHIP)


def test_every_device_has_whole_examples(compiles):
    compiles.activations.update(none=400, dots=390, full=300)
    tried = search.search(settings_of() | dict(batch_size=8), range(1), CHIP)
    assert {trial.accumulate for trial in tried} == {1} and search.best(tried) is None


def test_only_keys_that_a_config_has():
    shipped = config.plain(clip.get_config("B/32"))
    assert search.ladder(shipped)[:4] == [("none", 1), ("dots", 1), ("full", 1), ("none", 2)]
    assert [k for _, k in search.ladder(config.plain(cappa.get_config("B/16")))] == [None] * 3
    assert [r for r, _ in search.ladder(config.plain(lit.get_config("smoke")))][:1] == [None]
    trial = search.Trial(dict(fsdp=4, tensor=2), "full", 8)
    changed = search.changed(shipped, trial)
    assert changed["model"]["image"]["remat"] == changed["model"]["text"]["remat"] == "full"
    assert changed["mesh"] == dict(data=-1, fsdp=4, tensor=2) and changed["accumulate"] == 8
    assert shipped["model"]["image"]["remat"] == "dots" and shipped["mesh"]["fsdp"] == 1


def test_meshes():
    sizes = [(mesh["fsdp"], mesh["tensor"]) for mesh in search.meshes(12)]
    assert sizes == [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
