"""Plans: the memory of the program that trains, by kind, bounds on its time, and what is wrong in words."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from configs import clip, ul2
from vlm_jax import models
from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.plan import train_step
from vlm_jax.run.chips import Chip, here, slice_of
from vlm_jax.run.program import TrainState

CHIP = Chip(hbm=2**30, bandwidth=1e9, flops=1e11, links=1e8)


@pytest.fixture(scope="module")
def planned():
    settings = clip.get_config("smoke")
    settings.mesh.fsdp = 4
    return train_step.plan(settings, jax.devices(), CHIP)


def test_memory_by_kind(planned):
    """Parameters over fsdp = 4 but for small ones; two moments of AdamW or one of Muon; pictures of 8 examples."""
    section = clip.get_config("smoke").model.to_dict()
    inputs = np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 8), np.int32)
    shapes = jax.eval_shape(models.build(section).init, jax.random.key(0), *inputs)["params"]
    whole = 4 * models.count(shapes)
    assert planned.parameters * 4 == whole
    assert whole / 4 < planned.memory["parameters"] < whole / 3
    assert planned.memory["parameters"] < planned.memory["optimizer"] < 2.5 * planned.memory["parameters"]
    assert planned.memory["batch"] == 64 // 8 * (32 * 32 * 3 * 4 + 8 * 4 + 4)
    assert planned.memory["temporaries"] > planned.memory["batch"]
    assert planned.mesh == dict(data=2, fsdp=4, tensor=1) and planned.flops > 0


def test_it_fits_or_it_does_not(planned):
    assert planned.fits and train_step.text(planned).endswith("it fits")
    small = planned._replace(chip=CHIP._replace(hbm=2**20))
    assert not small.fits and "it does not fit" in train_step.text(small)


def test_stages_are_planned_one_by_one(planned):
    """The chip-hours of a run are the sum over its stages."""
    small = planned._replace(flops=planned.flops / 4, hbm_bytes=planned.hbm_bytes // 4, collectives=[])
    plans = [(300, small), (100, planned)]
    hours = 8 * (300 * small.seconds + 100 * planned.seconds) / 3600
    assert train_step.chip_hours(plans) == pytest.approx(hours) and small.seconds < planned.seconds
    text = train_step.text_of_stages(plans)
    assert text.startswith("stage 1: 300 steps\n") and text.endswith(f"at least {hours:,.3g} chip-hours")
    assert train_step.chip_hours([(300, planned._replace(chip=here()[1]))]) is None

    assert train_step.chip_hours([(None, planned)]) is None, "epochs of an unknown data set"
    assert train_step.text_of_stages([(None, planned)]) == train_step.text(planned)

    settings = clip.get_config("smoke").to_dict() | dict(stages=(dict(share="75%"), dict(share="25%", accumulate=2)))
    (first, whole), (second, halved) = train_step.of_stages(settings, jax.devices()[:2], CHIP)
    assert (first, second) == (30, 10) and halved.memory["temporaries"] < whole.memory["temporaries"]


def test_every_length_is_planned_and_the_largest_reported(planned, monkeypatch):
    settings = clip.get_config("smoke").to_dict()
    settings["model"]["image"] |= dict(pool="map", image_size=32)
    ops = settings["data"]["ops"].replace("| normalize", "| resize_to_patches(8) | normalize | pack_patches(8)")
    settings["data"] |= dict(ops=ops, naflex=dict(lengths=(8, 32), budget=256))

    def compiled(step, chip, codegen):
        """Instead of a compiler: the shapes that it would be given."""
        rows, length, _ = step.program.abstract_batch["image"]["patches"].shape
        return planned._replace(memory=dict(batch=length), flops=1e9 * rows, hbm_bytes=0, collectives=[], rows=rows)

    monkeypatch.setattr(train_step, "compiled", compiled)
    found = train_step.plan(settings, jax.devices()[:1], CHIP)
    assert {length: one.rows for length, one in found.lengths.items()} == {8: 32, 32: 8}
    assert found.rows == 8 and found.seconds == 0.08 and found.mean_seconds == pytest.approx(0.2)
    assert train_step.chip_hours([(9, found)]) == pytest.approx(9 * 0.2 * 8 / 3600)
    lines = [line.split() for line in train_step.text(found).splitlines()]
    assert ["8", "32", "0.00", "0.032", "320.0"] in lines and ["32", "8", "0.00", "0.008", "80.0"] in lines
    assert json.loads(json.dumps(found.json()))["lengths"]["32"]["rows"] == 8


def test_this_machine(planned):
    """A CPU has memory of a known size, and no known speed."""
    devices, chip = here()
    assert devices == jax.devices() and chip.hbm * len(devices) > 2**28
    lines = train_step.text(planned._replace(chip=chip)).splitlines()
    assert lines[-1] == "it fits" and lines[2].split()[2] == "MiB"
    assert not any("a step takes" in line or "MFU" in line for line in lines)


def test_bounds(planned):
    """Each resource at its peak; the largest bounds the step, and the MFU with it."""
    sent = sum(one.bytes for one in planned.collectives)
    bounds = dict(matmul=planned.flops / 1e11, hbm=planned.hbm_bytes / 1e9, interconnect=sent / 1e8)
    assert planned.bounds == bounds and planned.seconds == max(bounds.values())
    assert planned.mfu == pytest.approx(planned.model_flops / 1e11 / planned.seconds)
    # read and written: parameters and moments, at least
    assert planned.hbm_bytes > 2 * (planned.memory["parameters"] + planned.memory["optimizer"])
    assert 0 < planned.model_flops < planned.flops  # Muon's products are not the model's


def test_the_chips_talk(planned):
    """Parameters over fsdp are gathered, gradients reduced over all; a CPU's program waits for each."""
    over = {one.kind: set() for one in planned.collectives}
    for one in planned.collectives:
        over[one.kind] |= set(one.axes)
    assert "fsdp" in over["all-gather"] and {"data", "fsdp"} <= over["all-reduce"]
    assert train_step.text(planned).count("waited for") == len(planned.collectives)


def test_json_has_all(planned):
    read = json.loads(json.dumps(planned.json()))
    assert read["fits"] and read["mfu"] == planned.mfu and read["chip"]["hbm"] == 2**30
    assert read["collectives"][0]["kind"] == planned.collectives[0].kind and "blocks_0" in read["table"]


@pytest.mark.parametrize(
    ("message", "temporaries"),
    [
        ("E1000: Ran out of memory on HBM, required for HLO temporaries (22.50G) exceeds HBM (15.75G).", 22.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.00M of 256.00M hbm.", 2**29),
        ("no room", 2**30),
    ],
)
def test_what_the_compiler_has_no_room_for_does_not_fit(message, temporaries):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    mesh = jax.make_mesh((8, 1, 1), ("data", "fsdp", "tensor"))
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)), {}, {})
    nothing = dict(abstract_batch={}, abstract_frozen={}, table="")
    program = SimpleNamespace(mesh=mesh, abstract_state=state, compile_step=fail, **nothing)
    result = train_step.compiled(train_step.Traced(program, 2e11, 1e11), CHIP)
    assert result.memory["temporaries"] == temporaries and not result.compiled and not result.fits
    assert "it does not fit" in train_step.text(result) and "MFU" not in train_step.text(result)


@pytest.mark.parametrize(
    ("topology", "places", "hbm"),
    [("v5e:2x1", [(0, 0), (1, 0)], 16), ("tpu7x:1x1x1", [(0, 0, 0), (0, 0, 0)], 96), ("h100:1x1x8", None, 80)],
)
def test_a_device_has_its_share_of_a_chip(monkeypatch, topology, places, hbm):
    asked = {}
    devices = (
        [SimpleNamespace(id=i) for i in range(8)] if places is None else [SimpleNamespace(coords=p) for p in places]
    )

    def describe(**options):
        asked.update(options)
        return SimpleNamespace(devices=devices)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    found, chip = slice_of(topology)
    assert found == devices and chip.hbm == hbm * 2**30
    assert asked["platform"] == ("cuda" if places is None else "tpu")
    assert chip.flops == {16: 197e12, 96: 2307e12 / 2, 80: 989e12}[hbm]


def test_slices_that_cannot_be_described(monkeypatch):
    def fail(**_):
        raise RuntimeError("no plugin here\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"--topology=h100:1x1x8: no plugin here; .*'vlm_jax\[cuda\]'"):
        slice_of("h100:1x1x8")
    with pytest.raises(UserError, match=r"--topology=v5e:3x3: no plugin here; .*'vlm_jax\[tpu\]'"):
        slice_of("v5e:3x3")


def test_examples_are_as_the_ops_make_them():
    example = train_step.example_of(ul2.get_config("base").data.ops)
    assert {name: (array.shape, array.dtype) for name, array in example.items()} == dict(
        input_ids=((1, 512), np.int32), token_ids=((1, 512), np.int32), denoiser=((1,), np.int32)
    )
    example = train_step.example_of(clip.get_config("B/32").data.ops)
    assert example["image"].shape == (1, 224, 224, 3) and example["token_ids"].shape == (1, 77)
    with pytest.raises(UserError, match="should end with keep"):
        train_step.example_of("decode | resize(8)")


def test_what_is_wrong_is_named():
    with pytest.raises(UserError, match=r"--topology's chip is `v9`; expected one of: v4, v5e"):
        slice_of("v9:2x2")
    with pytest.raises(UserError, match=r"config\.batch_size 10 cannot be split over 8 devices"):
        settings = clip.get_config("smoke")
        settings.batch_size = 10
        train_step.plan(settings, jax.devices(), CHIP)
