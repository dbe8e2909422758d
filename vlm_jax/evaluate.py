"""Evaluates a model on a data set: names, captions, retrieval, probes.

    vlm-jax evaluate --model=pkg:vlm_jax/zoo/clip_tiny --task=zeroshot --data=tfds:emoji --split=unseen_style \\
        --classes=emoji:seen --out=runs/zeroshot
    vlm-jax evaluate --model=runs/demo --task=probe --data=tfds:emoji --split=unseen_style --label=group --out=runs/p

The command prints a table and writes results.json, artifacts/ and report/index.html to --out. After an interruption the
same command continues after the last complete chunk and gives the same results, bit for bit. On several hosts, run the
same command on each host with --distributed=auto.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm_jax import __version__, catalogue, command, config, evaluators, report
from vlm_jax.command.commands import LOADING
from vlm_jax.command.values import data_uri, given
from vlm_jax.data.files import read_kept, write_json
from vlm_jax.errors import UserError
from vlm_jax.evaluators.hosts import Hosts
from vlm_jax.evaluators.progress import Progress
from vlm_jax.params import sharding
from vlm_jax.pretrained import Pretrained
from vlm_jax.run import processes
from vlm_jax.run.checkpoint import params_sha256
from vlm_jax.run.folder import claim, locked, released_on_failure
from vlm_jax.zoo.load import load


def evaluate(
    pretrained: Pretrained,
    task: str,
    out: str | os.PathLike | None = None,
    *,
    model: str | None = None,
    show: bool = False,
    **section: Any,
) -> dict[str, Any]:
    """Evaluates a model and returns the content of results.json: "zeroshot/top1" and so on, see `Result.as_results`.

    Args:
      pretrained: the model; runs on the devices of `pretrained.mesh`.
      task: name of an evaluator, see `vlm-jax methods --family=evaluators`.
      out: the folder for results, artifacts, report and progress; None writes nothing.
      model: name of the model in the results.
      show: shows a progress bar.
      **section: the arguments of the evaluator; `uri` is needed.

    Raises:
      UserError: the task or an argument is unknown, the data set or the classes cannot be read, or the folder holds
        other results.
    """
    if not isinstance(pretrained, Pretrained):
        raise UserError(f"the model is {pretrained!r:.60}; load it first: vlm_jax.load({pretrained!r:.60})")
    section = {"batch_size": pretrained.batch_size} | section
    return _evaluate(pretrained, task, _evaluator(task, section), section, out, model, show)


def _evaluator(task: str, section: Mapping[str, Any]) -> Callable[..., evaluators.Result]:
    catalogue.get("evaluators", task, "the task")
    return evaluators.build({"type": task, **section})


def _evaluate(
    pretrained: Pretrained,
    task: str,
    evaluator: Callable[..., evaluators.Result],
    section: Mapping[str, Any],
    out: str | os.PathLike | None,
    model: str | None,
    show: bool,
) -> dict[str, Any]:
    pretrained.lacks.check()
    if pretrained.preprocess is None and "ops" not in section:
        raise UserError("this model has no image tower")
    pretrained = dataclasses.replace(pretrained, batch_size=section["batch_size"])
    named = {"model": model, "data": section["uri"], "split": section.get("split"), "classes": section.get("classes")}
    named = {key: value for key, value in named.items() if isinstance(value, str)}
    run = lambda progress: evaluator(pretrained, progress)
    numbers = lambda result: named | result.as_results(task)
    if out is None:
        return numbers(run(Progress(show=show)))

    hosts, out = Hosts(pretrained.mesh, section["batch_size"]), Path(out).expanduser().absolute()
    settings = {"task": task, **named, **_model_facts(pretrained), "version": __version__, "evaluator": section}
    with locked(out, hosts.several):
        mistake = hosts.from_first(claim(out, config.plain(settings), "evaluator") if hosts.first else None)
        if mistake:
            raise UserError(f"{out} holds {mistake}")
        progress = Progress(out / "progress" if hosts.first else None, show and hosts.first)
        results = hosts.from_first(read_kept(out / "results.json"))
        if results is None:
            with released_on_failure(out) if hosts.first else contextlib.nullcontext():
                result = run(progress)
            results = numbers(result)
            if hosts.first:
                report.save_artifacts(out, task, result.artifacts)
                write_json(out / "results.json", results)
                about = ", ".join(named[key] for key in ("data", "split", "classes") if key in named)
                report.save_about(out, f"evaluation: {task}", model or pretrained.model, about, pretrained.params)
        if hosts.first:
            report.write(out)
            progress.delete()
    return results


def _model_facts(pretrained: Pretrained) -> dict[str, str]:
    """Returns the facts that tell two models of one name apart."""
    return {
        "params_sha256": params_sha256(pretrained.params),
        "architecture": " ".join(repr(pretrained.model).split()),
        "tokenizer": getattr(pretrained.tokenizer, "spec", None),
        "preprocess": pretrained.preprocess,
        "tokenize": pretrained.tokenize,
    }


DATA = (
    "split", "where", "batch_size", "memory_share", "gallery",
    "classes", "templates", "label", "captions", "template", "ks",
)  # fmt: skip


@processes.joins()
def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer | None:
    section = given(values, DATA)
    section |= {"train_uri": data_uri(values, "train_data")} if values.train_data else {}
    section |= {"uri": data_uri(values)} | given(values, ["option"]).get("option", {})
    evaluator = _evaluator(values.task, section)  # before the model is loaded: errors in the data appear early
    mesh = config.call(sharding.make_mesh, given(values, ("mesh",)).get("mesh", {}), "--mesh", devices=None)
    with command.doing(f"loading {values.model}", processes.is_first()):
        pretrained = load(values.model, mesh=mesh, **given(values, [flag.name for flag in LOADING]))
    with command.doing(f"evaluating {values.task}", processes.is_first()):
        results = _evaluate(pretrained, values.task, evaluator, section, values.out, values.model, show=True)
    if processes.is_first():
        page = str(Path(values.out).absolute() / "report" / "index.html")
        return command.Answer(results | {"report": page}, f"{_table(results)}\nreport: {page}")


def _table(results: Mapping[str, Any]) -> str:
    """Returns a line about the evaluation, one line for each metric, and the notes."""
    about = ", ".join(f"{name} {value}" for name, value in results.items() if "/" not in name)
    numbers = {name.partition("/")[2]: value for name, value in results.items() if "/" in name}
    return f"{about}\n{report.format_results(numbers)}"


if __name__ == "__main__":
    command.run("evaluate", main)
