"""Says whether a run fits a slice before it is booked.

    python -m vlm_jax.plan --config=configs/ul2.py:20b --topology=v5p:4x8x8 --config.mesh.fsdp=64 --config.mesh.tensor=4

Compiles the train step that `vlm_jax.train` would run, for chips that are not there (needs `pip install 'vlm_jax[tpu]'`
and no TPU), and prints what it takes of a chip's memory.
"""

import collections
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from PIL import Image

from vlm_jax import command, config, models, optim, sharding
from vlm_jax.data import ops
from vlm_jax.data.examples import collate
from vlm_jax.data.registry import SUBJECTS
from vlm_jax.errors import UserError
from vlm_jax.program import build_program

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}  # GiB of a device
EXAMPLES = 10**9  # of a data set that is not there: durations in epochs are as long as this makes them


class Plan(NamedTuple):
    """What a train step takes.

    Attributes:
      devices: of the slice.
      mesh: sizes of its axes.
      parameters: of the model.
      memory: bytes of a device: `parameters` and `optimizer` (EMA and objective's state with it), each its share,
        `batch`, and `temporaries`, all else that the compiled step has at its peak.
      flops: of the step on a device, as XLA counts them: the body of a scan once.
      hbm: bytes of a device.
    """

    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]
    flops: float
    hbm: int

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= self.hbm


def plan(settings: Mapping[str, Any], devices: Sequence[jax.Device], hbm: int) -> Plan:
    """Compiles the train step of a config for some devices.

    Args:
      settings: a config of `vlm_jax.train`.
      devices: of a slice, there or not.
      hbm: bytes of a device.

    Raises:
      UserError: a config that does not fit the devices' mesh.
    """
    settings = config.plain(settings)
    mesh = config.call(sharding.make_mesh, settings.get("mesh") or {}, "config.mesh", devices=devices)
    batch_size = settings["batch_size"]
    sharding.check_batch_size(batch_size, mesh)
    example = example_of(settings["data"]["ops"])
    total = optim.duration_to_steps(settings["duration"], batch_size, EXAMPLES)
    steps = lambda length: optim.duration_to_steps(length, batch_size, EXAMPLES, total)
    optional = {"partition": sharding.RULES, "accumulate": 1, "ema": None, "seed": 0}
    sections = {key: settings[key] for key in ("model", "objective", "optimizer")}
    program = build_program(
        example, mesh, steps, **sections, **{key: settings.get(key, default) for key, default in optional.items()}
    )
    compiled = program.compile_step(example, batch_size)
    state = program.abstract_state
    memory = compiled.memory_analysis()
    parameters, whole = _bytes(state.params), _bytes(state)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    kinds = dict(
        parameters=parameters,
        optimizer=whole - parameters,
        batch=_bytes(sharding.abstract_batch(example, batch_size, mesh)),
    )
    kinds["temporaries"] = memory.temp_size_in_bytes + max(held - sum(kinds.values()), 0)
    shape = {axis: int(size) for axis, size in mesh.shape.items()}
    flops = float((compiled.cost_analysis() or {}).get("flops", 0))
    return Plan(mesh.size, shape, models.count(state.params), kinds, flops, hbm)


def example_of(op_string: str) -> dict[str, np.ndarray]:
    """A batch of one example as the data ops make it, of a record made up for them: only its shapes count."""
    pipeline = ops.parse(op_string, _Tokenizer())
    if not pipeline.keeps:
        raise UserError("config.data.ops should end with keep('image', 'token_ids', ...): what a batch has")
    picture = io.BytesIO()
    Image.new("RGB", (256, 256)).save(picture, "PNG")
    record: dict[str, Any] = collections.defaultdict(dict, image=picture.getvalue(), text="a text")
    for path in sorted(pipeline.paths - set(SUBJECTS)):
        where, (*folders, name) = record, path.split("/")
        for folder in folders:
            where = where[folder]
        where[name] = "a text"
    example = pipeline(record, np.random.default_rng(0))
    # what no op has made is a label
    return collate([{name: 0 if isinstance(value, str) else value for name, value in example.items()}])


class _Tokenizer:
    """Stands in for any tokenizer: shapes do not depend on it."""

    pad_id, bos_id, eos_id, vocab_size = 0, 2, 1, 3

    def encode(self, text: str) -> list[int]:
        return [2] * len(text)

    def __call__(self, texts: Sequence[str], length: int, **_) -> np.ndarray:
        return np.ones((len(texts), length), np.int32)


def _bytes(tree: Any) -> int:
    """Bytes of a device's share of arrays."""
    share = lambda leaf: int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    return sum(map(share, jax.tree.leaves(tree)))


def slice_of(topology: str) -> tuple[list, int]:
    """(devices, bytes of one's memory) of a slice that is not there, "v5e:16x16", "v5p:4x8x8", ...

    Raises:
      UserError: no libtpu, or no such slice.
    """
    hbm = config.choose(HBM, topology.partition(":")[0], "--topology's chip") * 2**30
    # without them libtpu looks for a TPU and asks the cloud who it is
    defaults = dict(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices, hbm
    except Exception as error:  # of several kinds, none of jax's own
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={topology}: {reason}; expected e.g. v5e:16x16, and libtpu: pip install 'vlm_jax[tpu]'"
        ) from error


def text(result: Plan) -> str:
    """The plan as lines to read."""
    size = lambda number: f"{number / 2**30:8.2f} GiB"
    axes = " x ".join(f"{name} {count}" for name, count in result.mesh.items())
    lines = [f"{result.devices} devices: {axes}; {result.parameters / 1e6:,.1f}M parameters"]
    lines += [f"{name:12}{size(number)}" for name, number in result.memory.items()]
    used = sum(result.memory.values())
    lines.append(f"{'together':12}{size(used)} of {result.hbm / 2**30:.0f}: {used / result.hbm:.0%}")
    lines.append("it fits" if result.fits else "it does not fit: more fsdp, remat, accumulate, or a smaller batch")
    return "\n".join(lines)


def main(_: Sequence[str]) -> None:
    result = plan(command.read_config(_CONFIG), *slice_of(_TOPOLOGY.value))
    print(json.dumps(result._asdict() | {"fits": result.fits}, indent=1) if _JSON.value else text(result))
    sys.exit(0 if result.fits else 1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/ul2.py:20b", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, e.g. v5e:16x16")
    _JSON = flags.DEFINE_bool("json", False, "Print JSON")
    flags.mark_flags_as_required(["config", "topology"])
    command.run(main)
