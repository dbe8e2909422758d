"""Trains any model with any objective, or continues a run that was interrupted.

    vlm-jax train --config=clip:tiny --workdir=runs/demo
    vlm-jax train --config=clip:smoke --workdir=runs/smoke --config.optimizer.lr=1e-3

Top to bottom: read the data, build the program from the config, place the program on the mesh, continue from the newest
checkpoint, loop over stages and steps, evaluate, report. The same command after any interruption gives the same result,
bit for bit. On several hosts, run the same command on each host with --distributed=auto.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from absl import flags

from vlm_jax import command, config, evaluators, objectives, report
from vlm_jax.data import loader, tokenizers
from vlm_jax.data.files import write_json
from vlm_jax.errors import UserError
from vlm_jax.models import vocabulary
from vlm_jax.params import optim, sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.run import processes
from vlm_jax.run import stages as staging
from vlm_jax.run.checkpoint import Checkpointer, check_same_config, finished, params_sha256
from vlm_jax.run.divergence import check_finite
from vlm_jax.run.flops import model_flops
from vlm_jax.run.folder import locked
from vlm_jax.run.metric_writer import MetricWriter
from vlm_jax.run.program import Program, TrainState, batch_sizes, build_program
from vlm_jax.run.summary import summary
from vlm_jax.run.throughput import Profile, Throughput
from vlm_jax.zoo import tokenizer_files
from vlm_jax.zoo.load import load
from vlm_jax.zoo.model_init import read as read_init


def train(settings: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Trains by the config `settings` in `workdir` and returns the content of results.json; at once if it has ended.

    Raises:
      UserError: the config or the data is wrong, or another run holds the folder. Earlier checkpoints stay.
    """
    settings = config.plain(settings)
    workdir = Path(workdir).expanduser().absolute()
    with locked(workdir):
        results = finished(workdir, settings)
        if results is None:
            return config.call(_train, settings, "config", settings=settings, workdir=workdir)
        processes.say(f"{workdir} holds the results of this config; to train again, give another --workdir")
        if processes.is_first() and not (workdir / "report" / "index.html").is_file():
            report.write(workdir)
        return results


def _train(
    *,
    settings: Mapping[str, Any],
    workdir: Path,
    model: Mapping[str, Any],
    objective: Mapping[str, Any],
    data: Mapping[str, Any],
    preprocess: str | None,
    optimizer: Mapping[str, Any],
    batch_size: int,
    duration: int | str,
    tokenizer: str | None = None,
    tokenize: str | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    seed: int = 0,
    mesh: Mapping[str, int] | None = None,
    partition: Sequence = sharding.RULES,
    model_init: str | Mapping[str, str] | None = None,
    stages: Sequence[Mapping[str, Any]] | None = None,
    evals: Mapping[str, Mapping[str, Any]] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    log: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    mesh = config.call(sharding.make_mesh, mesh or {}, "config.mesh")
    doing = partial(command.doing, seen=processes.is_first())

    def opened(data: Mapping[str, Any]) -> loader.Loader:
        rows = sharding.rows_of_process(mesh, batch_sizes(data, batch_size, mesh))
        fixed = dict(batch_size=batch_size, seed=seed, tokenizer=tokenizer, rows=rows)
        batches = config.call(loader.train_loader, data, "config.data", **fixed)
        processes.check_equal(batches.fingerprints, "data")
        return batches

    with doing("opening the data set"):
        if tokenizer:  # else the model is an image tower alone
            tokenizer = tokenizers.build(tokenizer_files.kept(tokenizer, workdir, missing=True))
        of_config = opened(data)
    total = optim.duration_to_steps(duration, batch_size, of_config.num_examples)
    if not total:
        raise UserError(f"config.duration is {duration!r}; expected 1 step or more")
    steps = lambda length: optim.duration_to_steps(length, batch_size, of_config.num_examples, total)
    parts = staging.read(settings, total)

    @cache
    def built(stage: staging.Stage) -> tuple[loader.Loader, Program]:
        own = stage.settings
        with doing("building the model"):
            batch_sizes(own["data"], batch_size, mesh, own.get("accumulate", 1))
            batches = of_config if own["data"] == data else opened(own["data"])
            first, *others = batches.examples
            program = build_program(
                batches.examples[first], batches.size_of(first), mesh, steps, model=own["model"],
                objective=own["objective"], optimizer=own["optimizer"], partition=partition,
                accumulate=own.get("accumulate", 1), ema=ema, seed=seed, tokenizer=tokenizer, load=load,
                first=stage.first,
            )  # fmt: skip
            if tokenizer is None and vocabulary.vocab_size(program.model):
                raise UserError("config.tokenizer is missing, and the model reads texts; set it, and config.tokenize")
            for length in others:  # finds mistakes in any of them now
                program.on(batches.examples[length], batches.size_of(length)).trace_step()
            objectives.check_stored(program.objective, batches.teachers)
            return batches, program

    for before, stage in pairwise([parts[0], *parts]):  # finds mistakes in any of them now
        staging.check(built(before)[1].abstract_state, built(stage)[1].abstract_state, stage)
    evals = [Evaluation(name, section, steps) for name, section in (evals or {}).items()]

    def seen(step: int) -> int:
        """Returns the number of examples in the batches up to a step."""
        counts = [(built(stage)[0].count, stage) for stage in parts if stage.first < step]
        return sum(count(min(step, stage.last)) - count(stage.first) for count, stage in counts)

    def pretrained(state: TrainState, stage: staging.Stage) -> Pretrained:
        own, params = stage.settings, objectives.of_model(state.params if state.ema is None else state.ema)
        return Pretrained(built(stage)[1].model, params, tokenizer, own["preprocess"], own.get("tokenize"), own, mesh)

    checkpoint, log = {"every": "20%", **(checkpoint or {})}, {"every": "10 steps", **(log or {})}
    save_every, log_every = steps(checkpoint.pop("every")), steps(log.pop("every"))
    config.check_least(1, "config.checkpoint", every=save_every)
    config.check_least(1, "config.log", every=log_every)
    saver = config.call(Checkpointer, checkpoint, "config.checkpoint", workdir=workdir)
    tracer = config.call(Profile, profile or {}, "config.profile", workdir=workdir)
    check_same_config(workdir / "config.json", settings)
    if processes.is_first() and tokenizer:
        tokenizer_files.keep(settings["tokenizer"], workdir, begun=saver.latest_step() is not None)
    if saver.latest_step() is None:
        batches, program = built(parts[0])
        with doing("making the parameters"):
            own = named_leaves(objectives.of_model(program.abstract_state.params))
            given = read_init(model_init, own) if model_init else {}
            with jax.set_mesh(mesh):
                state = program.init(jax.random.key(seed), given)
        progress = {"seconds": 0.0, "data_wait": 0.0, "data": None}
    else:
        with doing("reading the checkpoint"):
            state, progress = saver.restore(lambda step: built(staging.saved_by(parts, step))[1].abstract_state)
        processes.say(f"continuing from step {int(state.step)} of {total}")
        batches, _ = built(staging.saved_by(parts, int(state.step)))
    if progress["data"]:
        others = {"read": 0, "bad": 0, "kinds": {}}  # the first process keeps the counts of all
        batches.set_state(progress["data"] | ({} if processes.is_first() else others))

    first = int(state.step)
    writer = config.call(MetricWriter, log, "config.log", workdir=workdir, start_step=first)
    stop = processes.StopSignal()

    def take(stage: staging.Stage, state: TrainState, progress: Mapping[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """Takes the steps of a stage that are left; returns the state and the counts after them."""
        batches, program = built(stage)
        batches.start()  # reads data while the step compiles
        with doing("compiling the train step"):
            programs = {key: program.on(one, batches.size_of(key)) for key, one in batches.examples.items()}
            train_steps, frozen = {key: one.compile_step() for key, one in programs.items()}, program.frozen()
        step_flops = {key: model_flops(one) for key, one in programs.items()}
        every = {"checkpoints": save_every, "metrics": log_every}
        if len(parts) > 1:
            processes.say(
                f"stage {stage.number} of {len(parts)}, {stage.last - stage.first:,} steps to step {stage.last:,}"
            )
        processes.say(summary(program, data_name(stage), batches, total, seen(total), step_flops, workdir, every))
        first, known_ids, before = int(state.step), vocabulary.vocab_size(program.model), None
        clock = Throughput(batches, progress["seconds"], progress["data_wait"])
        bar = command.bar(total=total, initial=first, desc="train", unit="step", disable=not processes.is_first())
        with closing(batches), closing(bar):
            for step in range(first + 1, stage.last + 1):
                with tracer.step(step):
                    batch = next(batches)
                    vocabulary.check_ids(batch, known_ids, "config.data")
                    batch = sharding.to_global(batch, mesh, batches.size_of(batches.length))
                    state, metrics, norms = train_steps[batches.length](state, batch, frozen)
                    state = staging.merged(state, stage) if step == stage.last else state
                clock.count(batches.count(step) - batches.count(step - 1), step_flops[batches.length])
                tracer.after(step, metrics)
                if before:  # checks the step before, so that the device never waits for the host
                    check_finite(*before, saver.latest_step())
                before = step, metrics, norms
                stopped_by = stop.at(step)
                save = step % save_every == 0 or step == stage.last or stopped_by
                if save or step % log_every == 0:
                    check_finite(*before, saver.latest_step())
                    speed = clock.metrics()
                    shown = f"loss {metrics['loss']:.3f}, {speed['examples_per_second']:,.0f} examples/s"
                    bar.set_postfix_str(f"{shown}, MFU {speed['mfu']:.0%}" if "mfu" in speed else shown, refresh=False)
                    writer.write(step, {**metrics, "examples": seen(step), **speed, **batches.taken()})
                bar.update()
                if save:
                    saver.save(step, state, {**clock.progress(), "data": position(batches), "stage": stage.number})
                if stopped_by:
                    raise SystemExit(
                        f"{stopped_by}: saved step {step} of {total}; the same command continues from there"
                    )
                for evaluation in evals:
                    if evaluation.every and step % evaluation.every == 0 and step < total:
                        bar.set_postfix_str(f"evaluating {evaluation.name}")
                        with clock.paused(), doing("evaluating"):
                            writer.write(step, evaluation.metrics(evaluation.run(pretrained(state, stage))))
        return state, clock.progress()

    # however the loop ends, pending checkpoints are written
    with closing(saver), closing(writer), closing(tracer):
        for stage in staging.left(parts, first):
            if stage.first == int(state.step) > 0:
                before, (batches, program) = batches, built(stage)
                batches.go_on(before.get_state())
                with jax.set_mesh(mesh):
                    begin = partial(program.init, jax.random.key(seed), {})
                    refreshed = objectives.refreshed(program.objective)
                    state = staging.carried(state, program.abstract_state, stage, begin, refreshed)
            state, progress = take(stage, state, progress)
        with doing("writing the checkpoint"):
            saver.wait()
        stop.close()
        results = {
            "step": total,
            "params_sha256": params_sha256(state.params),
            "train/seconds": progress["seconds"],
            "train/examples_per_second": seen(total) / progress["seconds"],
            "train/data_wait_fraction": progress["data_wait"] / progress["seconds"],
            **counts_of(position(batches), batches),
        }
        for evaluation in evals:
            with doing(f"evaluating {evaluation.name}"):
                result = evaluation.run(pretrained(state, parts[-1]))
            if processes.is_first():
                report.save_artifacts(workdir, evaluation.name, result.artifacts)
            writer.write(total, evaluation.metrics(result))
            results |= result.as_results(evaluation.prefix)
    if processes.is_first():
        write_json(workdir / "results.json", results)
        report.save_about(workdir, "training", built(parts[-1])[1].model, data_name(parts[-1]), state.params, mesh)
        with doing("writing the report"):
            report.write(workdir)
    return results


def data_name(stage: staging.Stage) -> str:
    """Returns the URIs of a stage's data."""
    data = stage.settings["data"]
    return data.get("uri") or ", ".join(part["uri"] for part in data["sources"].values())


def position(batches: loader.Loader) -> dict[str, Any]:
    """Returns the data position with the counts of all processes; processes with the same rows count once."""
    by_row = {}
    for row, state in processes.exchange([batches.first_row, batches.get_state()]):
        by_row.setdefault(row, state)
    kinds = sum((Counter(state["kinds"]) for state in by_row.values()), Counter())
    counts = {name: sum(state[name] for state in by_row.values()) for name in ("read", "bad")}
    return by_row[0] | counts | {"kinds": dict(kinds)}


def counts_of(position: Mapping[str, Any], batches: loader.Loader) -> dict[str, int]:
    """Returns how many examples were read, how many of them were bad, by kind, and what is no example."""
    kinds = {f"data/bad/{kind}": count for kind, count in sorted(position["kinds"].items())}
    counts = {"data/read_examples": position["read"], "data/bad_examples": position["bad"], **kinds}
    counts |= {"data/left_out": sum(batches.left_out.values())}
    return counts | {f"data/{name}": count for name, count in sorted(batches.requests.items())}


class Evaluation:
    """An evaluator of the config.

    Args:
      name: name of the evaluation.
      section: the evaluator's arguments, and two more: `every`, a duration (defaults to only at the end), and `prefix`
        of the metrics' names (defaults to `name`).
      steps: duration -> number of steps.
    """

    def __init__(self, name: str, section: Mapping[str, Any], steps: Callable[[int | str], int]):
        section = dict(section)
        every = section.pop("every", None)
        self.name = name
        self.every = steps(every) or None if every else None
        self.prefix = section.pop("prefix", name)
        self._evaluator = evaluators.build(section)

    def run(self, pretrained: Pretrained) -> evaluators.Result:
        return self._evaluator(pretrained)

    def metrics(self, result: evaluators.Result) -> dict[str, float]:
        return {f"{self.prefix}/{name}": value for name, value in result.metrics.items()}


@processes.joins(preemptible=True)
def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer | None:
    results = train(values.config.to_dict(), values.workdir)
    if processes.is_first():
        page = str(Path(values.workdir).absolute() / "report" / "index.html")
        shown = report.format_results({name: value for name, value in results.items() if name != "params_sha256"})
        return command.Answer(results | {"report": page}, f"{shown}\nreport: {page}")


if __name__ == "__main__":
    command.run("train", main)
