"""Speed and traces of a run."""

import gzip
import json
from types import SimpleNamespace

import jax
import pytest

from tests.support.pictures import write_pictures
from tests.support.runs import on_pictures
from vlm_jax.errors import UserError
from vlm_jax.run import throughput
from vlm_jax.run.chips import CHIPS, chip_of
from vlm_jax.run.throughput import Profile, Throughput
from vlm_jax.train import train


def test_chips_are_known_by_what_devices_call_themselves():
    device = lambda kind, place: SimpleNamespace(device_kind=kind, coords=place)
    assert chip_of([device("TPU v5 lite", (0, 0, 0)), device("TPU v5 lite", (1, 0, 0))]) == CHIPS["v5e"]
    assert chip_of([device("TPU7x", (0, 0, 0)), device("TPU7x", (0, 0, 0))]) == CHIPS["tpu7x"].shared(2)
    assert chip_of([SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")]) == CHIPS["h100"]
    assert chip_of(jax.devices()) is None


def test_mfu_and_memory_of_accelerators(monkeypatch):
    monkeypatch.setattr(throughput, "chip_of", lambda _: CHIPS["v5e"])
    memory = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**30, "bytes_limit": 12 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [memory])
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Throughput(SimpleNamespace(wait_seconds=0.0), seconds=5.0)
    for _ in range(10):
        clock.count(16, 197e12 * 8 / 100)
    now[0] += 0.5
    numbers = clock.metrics()
    # 20 steps a second, each of which is 1/100 s of eight chips at their best
    assert (numbers["mfu"], numbers["examples_per_second"]) == (pytest.approx(0.2), 320.0)
    assert (numbers["hbm_gib"], numbers["hbm_fraction"]) == (3.0, 0.25)
    assert clock.progress()["seconds"] == 5.5


def test_a_run_traces_the_steps_that_are_asked_for(tmp_path):
    write_pictures(tmp_path, 64)
    settings = on_pictures(tmp_path) | {
        "duration": "6 steps",
        "profile": {"steps": "2:4"},
        "checkpoint": {"every": "6 steps"},
    }
    settings["log"] |= {"every": "1 steps"}
    train(settings, tmp_path / "run")
    (trace,) = (tmp_path / "run" / "profile").glob("**/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})} == {2, 3}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in lines) and "mfu" not in lines[0]


@pytest.mark.parametrize("steps", ["5", "5:5", "a:b", "0:3"])
def test_steps_to_trace_are_checked(steps, tmp_path):
    with pytest.raises(UserError, match=f"config.profile.steps is `{steps}`; expected first:end, e.g. 100:105"):
        Profile(tmp_path, steps)
