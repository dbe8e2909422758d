"""Plans a train step, compiled for chips that this machine does not have."""

import collections
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from vlm_jax import config, models
from vlm_jax.data import mixture, naflex, ops
from vlm_jax.data.rows import collate
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.params import optim, sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.plan import hlo
from vlm_jax.plan.collectives import Collective, collectives
from vlm_jax.plan.replicated import replicated
from vlm_jax.plan.schedule import in_all, schedule
from vlm_jax.run import flops, stages
from vlm_jax.run.chips import Chip
from vlm_jax.run.compiler_options import compiler_options
from vlm_jax.run.program import Program, batch_sizes, build_program
from vlm_jax.zoo.load import load

PACKAGED = ("tfds:emoji", "scenes:")  # data sets whose records are at hand
EXAMPLES = 10**9  # stands in for the data set's number of examples, in durations in epochs


class Plan(NamedTuple):
    """The memory, FLOPs, traffic and time bounds of a train step.

    Attributes:
      devices: number of devices of the slice.
      mesh: sizes of the mesh's axes.
      parameters: number of the model's parameters.
      memory: bytes of a device: its shares of `parameters` and `optimizer` (with EMA and the objective's state), of
        frozen `teachers`, its `batch`, and `temporaries`, all else at the compiled step's peak: activations, gradients.
      flops: of the step on a device, with recomputation and the optimizer's products; see `run.flops`.
      model_flops: on a device, of the loss and its gradients alone.
      hbm_bytes: a lower bound on the bytes that the compiled step moves on a device; see `plan.hlo.hbm_bytes`.
      collectives: of the compiled step.
      replicated: lines about arrays that each device holds whole, against the sharding; see `plan.replicated`.
      chip: peak FLOPs, memory and bandwidths of a device.
      table: the parameters and their shardings, to read.
      compiled: False if the compiler ran out of a device's memory; hbm_bytes and collectives are then unknown.
      rows: of a batch.
      lengths: length of `data.naflex` -> its plan; the plan of all is that of the length that takes most memory.
    """

    devices: int
    mesh: dict[str, int]
    parameters: int
    memory: dict[str, int]
    flops: float
    model_flops: float
    hbm_bytes: int
    collectives: list[Collective]
    replicated: list[str]
    chip: Chip
    table: str
    compiled: bool
    rows: int = 0
    lengths: Mapping[int, "Plan"] = {}

    @property
    def fits(self) -> bool:
        return self.compiled and sum(self.memory.values()) <= self.chip.hbm

    @property
    def bounds(self) -> dict[str, float]:
        """Lower bounds on a step's seconds: at peak FLOPs, at full HBM bandwidth, with all links busy."""
        sent = sum(one.bytes for one in self.collectives)
        return dict(
            matmul=self.flops / self.chip.flops,
            hbm=self.hbm_bytes / self.chip.bandwidth,
            interconnect=sent / self.chip.links,
        )

    @property
    def seconds(self) -> float:
        """The largest of the bounds: the step's time if all other work overlaps."""
        return max(self.bounds.values())

    @property
    def mean_seconds(self) -> float:
        """The mean of `seconds` over all lengths, which are equally frequent."""
        plans = self.lengths.values() or [self]
        return sum(one.seconds for one in plans) / len(plans)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of a step of `seconds`, an upper bound for any run."""
        return self.model_flops / (self.chip.flops * self.seconds)

    def json(self) -> dict[str, Any]:
        """All fields and properties, JSON-able."""
        rest = dict(fits=self.fits, bounds=self.bounds, seconds=self.seconds, mfu=self.mfu)
        nested = dict(chip=self.chip._asdict(), collectives=[one._asdict() for one in self.collectives])
        lengths = {str(length): one.json() for length, one in self.lengths.items()}
        return self._asdict() | nested | rest | dict(mean_seconds=self.mean_seconds, lengths=lengths)


class Traced(NamedTuple):
    """A train step before compilation: the program; FLOPs as in `Plan`."""

    program: Program
    flops: float
    model_flops: float


def plan(settings: Mapping[str, Any], devices: Sequence[jax.Device], chip: Chip, codegen: bool = True) -> Plan:
    """Compiles the train step of a config for some devices.

    Args:
      settings: a config of `vlm_jax.train`.
      devices: of a slice, real or described.
      chip: the properties of a device.
      codegen: see `compiled`.

    Raises:
      UserError: the config does not fit the devices' mesh.
    """
    buckets = naflex.read(settings["data"].get("naflex"))
    if buckets is None:
        return compiled(traced(settings, devices), chip, codegen)
    plans = {length: compiled(traced(settings, devices, length), chip, codegen) for length in buckets.lengths}
    largest = max(plans.values(), key=lambda one: (not one.compiled, sum(one.memory.values())))
    return largest._replace(lengths=plans)


def of_stages(
    settings: Mapping[str, Any], devices: Sequence[jax.Device], chip: Chip, codegen: bool = True
) -> list[tuple[int | None, Plan]]:
    """Returns (steps, plan) of each stage of a config; the steps of epochs are not known. Arguments as of `plan`."""
    settings = config.plain(settings)
    known = "epoch" not in str(settings["duration"])
    found = stages.read(settings, _durations(settings)("100%"))
    steps = [stage.last - stage.first if known else None for stage in found]
    return [(count, plan(stage.settings, devices, chip, codegen)) for count, stage in zip(steps, found, strict=True)]


def chip_hours(plans: Sequence[tuple[int | None, Plan]]) -> float | None:
    """A lower bound on the chip-hours of all stages; None if a stage's steps or time are not known."""
    if not all(steps and result.compiled and math.isfinite(result.chip.flops) for steps, result in plans):
        return None
    return sum(steps * result.mean_seconds * result.devices for steps, result in plans) / 3600


def traced(settings: Mapping[str, Any], devices: Sequence[jax.Device], length: int | None = None) -> Traced:
    """Traces the train step of a config; arguments as of `plan`.

    `length` is one of `data.naflex`; it defaults to the longest.
    """
    settings = config.plain(settings)
    mesh = config.call(sharding.make_mesh, settings.get("mesh") or {}, "config.mesh", devices=devices)
    sizes = batch_sizes(settings["data"], settings["batch_size"], mesh, settings.get("accumulate", 1))
    if buckets := naflex.read(settings["data"].get("naflex")):
        length = length or buckets.lengths[-1]
        sizes = sizes[length]
    example = examples_of(settings["data"], length)
    steps = _durations(settings)
    optional = {"partition": sharding.RULES, "accumulate": 1, "ema": None, "seed": 0}
    sections = {key: settings[key] for key in ("model", "objective", "optimizer")}
    sections |= {key: settings.get(key, default) for key, default in optional.items()}
    program = build_program(example, sizes, mesh, steps, **sections, load=load)
    counts = flops.hardware_flops(program.trace_step().jaxpr), flops.model_flops(program)
    return Traced(program, *(count / mesh.size for count in counts))


def compiled(step: Traced, chip: Chip, codegen: bool = True) -> Plan:
    """Compiles a train step for the devices of its mesh; without codegen, TPU programs get no machine code."""
    program = step.program
    mesh, state = program.mesh, program.abstract_state
    kinds = _held(step)
    shape = {axis: int(size) for axis, size in mesh.shape.items()}
    number = models.count(state.params)
    about = mesh.size, shape, number, kinds, step.flops, step.model_flops
    rows = max((leaf.shape[0] for leaf in jax.tree.leaves(program.abstract_batch)), default=0)
    try:
        written, total = _written(step, codegen)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kinds["temporaries"] = _wanted(str(error), chip.hbm)
        return Plan(*about, 0, [], [], chip, program.table, compiled=False, rows=rows)
    kinds["temporaries"] = max(total - sum(kinds.values()), 0)
    parsed = hlo.parse(written)
    params = {name: leaf.shape for name, leaf in named_leaves(state.params).items()}
    shapes = {name: leaf.shape for name, leaf in named_leaves(program.abstract_batch).items()}
    images = [shape for name, shape in shapes.items() if name.endswith(("image", "image/patches"))]
    pictures = next((shape for shape in images if len(shape) > 2), None)
    found = replicated(parsed, mesh.shape, params, pictures)
    return Plan(*about, hlo.hbm_bytes(parsed), collectives(parsed, mesh.shape), found, chip, program.table, True, rows)


def _written(step: Traced, codegen: bool) -> tuple[str, int]:
    """The text of the compiled step, and all bytes of a device that it takes."""
    program, device = step.program, step.program.mesh.devices.flat[0]
    if device.platform == "tpu":
        return schedule(program.lower_step(), compiler_options(device), codegen)
    binary = program.compile_step()
    return binary.as_text(), in_all(binary.memory_analysis())


def examples_of(data: Mapping[str, Any], length: int | None = None) -> dict[str, Any]:
    """Returns `example_of` a config's `data`; {row set: example} of sources that form other row sets than "batch"."""
    one = lambda source: example_of(source["ops"], length, _packaged_record(source))
    if data.get("sources") is None:
        return one(data)
    found = {part.rows: one(data["sources"][name]) for name, part in mixture.parts(data["sources"]).items()}
    return found if set(found) - {"batch"} else found["batch"]


def _packaged_record(source: Mapping[str, Any]) -> dict[str, Any] | None:
    return open_source(source["uri"], source.get("split"))[0] if source["uri"].startswith(PACKAGED) else None


def example_of(
    op_string: str, max_patches: int | None = None, record: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Returns a batch of one example, made by the data ops from a record, or a made-up one; only the shapes count."""
    pipeline = ops.parse(op_string, _Tokenizer(), max_patches)
    if not pipeline.keeps:
        raise UserError("config.data.ops should end with keep('image', 'token_ids', ...), a batch's fields")
    example = pipeline(record or _made_up(pipeline), np.random.default_rng(0))
    # a value that no op has made is a label
    return collate([{name: 0 if isinstance(value, str) else value for name, value in example.items()}])


def _made_up(pipeline: ops.Pipeline) -> dict[str, Any]:
    steps, picture, file = (*pipeline.before, *pipeline.after), Image.new("RGB", (256, 256)), io.BytesIO()
    picture.save(file, "PNG")
    is_file = any(step.name == "decode" for step in steps)  # scenes need no `decode`
    image = file.getvalue() if is_file else np.asarray(picture)
    record: dict[str, Any] = collections.defaultdict(dict, image=image, text="a text")
    made_up = {step.kwargs.get(option): value for step in steps for option, value in MADE_UP.items()}
    for path in sorted(pipeline.paths - set(ops.SUBJECTS)):
        where, (*folders, name) = record, path.split("/")
        for folder in folders:
            where = where[folder]
        where[name] = made_up.get(path, "a text")
    return record


MADE_UP = {  # values of fields that an op reads by an option of this name
    "boxes": (0, 0, 1, 1),
    "foils": {},
    "objects": {"name": [], "attributes": []},
    "relations": {"subject": [], "relation": [], "object": []},
}


class _Tokenizer:
    """Stands in for any tokenizer: shapes do not depend on it."""

    pad_id, bos_id, eos_id, vocab_size = 0, 2, 1, 3

    def encode(self, text: str) -> list[int]:
        return [2] * len(text)

    def __call__(self, texts: Sequence[str], length: int, **_) -> np.ndarray:
        return np.ones((len(texts), length), np.int32)


def _durations(settings: Mapping[str, Any]) -> Callable[[int | str], int]:
    batch_size = settings["batch_size"]
    total = optim.duration_to_steps(settings["duration"], batch_size, EXAMPLES)
    return lambda length: optim.duration_to_steps(length, batch_size, EXAMPLES, total)


def _held(step: Traced) -> dict[str, int]:
    """Bytes of a device before a step, by kind."""
    state, parameters = step.program.abstract_state, _bytes(step.program.abstract_state.params)
    kinds = dict(parameters=parameters, optimizer=_bytes(state) - parameters, batch=_bytes(step.program.abstract_batch))
    teachers = _bytes(step.program.abstract_frozen)
    return kinds | ({"teachers": teachers} if teachers else {})


def _bytes(tree: Any) -> int:
    """Bytes of a device's share of arrays."""
    share = lambda leaf: int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    return sum(map(share, jax.tree.leaves(tree)))


def _wanted(message: str, hbm: int) -> int:
    """Bytes for which the compiler lacked room, from its "HLO temporaries (22.79G)"; defaults to all of HBM."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMG])", message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]]) if found else hbm


def text(result: Plan) -> str:
    """The plan as lines to read."""
    used = sum(result.memory.values())
    unit, power = ("GiB", 30) if used >= 2**30 else ("MiB", 20)
    memory = lambda number: f"{number / 2**power:8.2f} {unit}"
    floats, scale = ("TFLOP", 1e12) if result.flops >= 1e12 else ("GFLOP", 1e9)
    axes = " x ".join(f"{name} {count}" for name, count in result.mesh.items())
    lines = [
        f"{result.devices} device{'s'[: result.devices > 1]}: {axes}; {result.parameters / 1e6:,.1f}M parameters",
        "",
    ]
    lines += [f"{name:14}{memory(number)}" for name, number in result.memory.items()]
    lines.append(f"{'together':14}{memory(used)} of {result.chip.hbm / 2**30:.0f} GiB: {used / result.chip.hbm:.0%}")
    lines += ["", f"{'model':14}{result.model_flops / scale:8.2f} {floats} a device"]
    lines.append(f"{'hardware':14}{result.flops / scale:8.2f} {floats} a device, recomputation with it")
    if result.compiled:
        lines += ["", *_traffic(result), "", *(f"REPLICATED: {line}" for line in result.replicated)]
        lines += [] if result.replicated else ["nothing that is split is whole on a device"]
    if result.compiled and math.isfinite(result.chip.flops):
        lines += ["", "a step takes at least"]
        lines += [f"{name:14}{seconds * 1e3:8.1f} ms" for name, seconds in result.bounds.items()]
        lines.append(f"{'best MFU':14}{result.mfu:8.1%}")
    lines += _lengths(result)
    lines += ["", "it fits" if result.fits else "it does not fit: more fsdp, remat, accumulate, or a smaller batch"]
    return "\n".join(lines)


def text_of_stages(plans: Sequence[tuple[int | None, Plan]]) -> str:
    """The plans of all stages as lines to read, and the chip-hours of the run."""
    blocks = [text(result) for _, result in plans]
    if len(plans) > 1:
        counts = [f": {steps:,} steps" if steps else "" for steps, _ in plans]
        blocks = [
            f"stage {n}{count}\n\n{block}" for n, (count, block) in enumerate(zip(counts, blocks, strict=True), 1)
        ]
    hours = chip_hours(plans)
    shown = f"{hours:,.0f}" if hours and hours >= 100 else f"{hours or 0:.3g}"
    return "\n\n".join([*blocks, *([f"all steps take at least {shown} chip-hours"] if hours else [])])


def _lengths(result: Plan) -> list[str]:
    """The lengths of batches, a line each."""
    if not result.lengths:
        return []
    lines = ["", f"{'length':>7}{'rows':>9}{'GiB':>8}{'TFLOP':>9}{'ms':>9}"]
    for length, one in result.lengths.items():
        line = f"{length:7,}{one.rows:9,}{sum(one.memory.values()) / 2**30:8.2f}{one.flops / 1e12:9.3f}"
        known = one.compiled and math.isfinite(one.chip.flops)
        lines.append(line + (f"{one.seconds * 1e3:9,.1f}" if known else "") + ("" if one.fits else "  does not fit"))
    return [*lines, "the numbers above are of the length that takes most memory"]


def _traffic(result: Plan) -> list[str]:
    """The collectives, a line each."""
    lines = [f"{'collective':20}{'over':14}{'a step':>7}{'MB sent':>10}{'largest MB':>12}"]
    for one in result.collectives:
        megabytes = f"{one.bytes / 1e6:10,.1f}{one.largest / 1e6:12,.1f}"
        waits = "" if one.asynchronous else "  waited for"
        lines.append(f"{one.kind:20}{' x '.join(one.axes):14}{one.count:7,}{megabytes}{waits}")
    return lines if result.collectives else ["no collectives"]
