"""Adapts a model to a few labelled pictures and reports the accuracy over several draws.

    vlm-jax adapt --model=pkg:vlm_jax/zoo/clip_tiny --method=zero_shot,gda,lora --data=tfds:emoji \\
        --split=unseen_style --classes=emoji:subgroups --label=subgroup --shots=16 --out=runs/adapted

prints a table and writes results.json, report/index.html and a small file for each method and seed, with the trained
parameters alone:

    clip = vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")
    vlm_jax.load_adapter("runs/adapted/lora_0.safetensors", clip).classify(pictures)

--method takes several methods, separated by commas; `vlm-jax methods` lists them. Training pictures are drawn from
--train_split. --base_to_new trains on half of the classes and tests the other half, too. After an interruption the same
command continues after the last finished fit.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlm_jax import __version__, command, config, evaluators, report
from vlm_jax.command.commands import ADAPTED
from vlm_jax.command.values import data_uri, given
from vlm_jax.data.files import read_kept, write_json
from vlm_jax.errors import UserError
from vlm_jax.evaluators.progress import Progress
from vlm_jax.pretrained import Pretrained
from vlm_jax.run import processes
from vlm_jax.run.checkpoint import params_sha256
from vlm_jax.run.folder import claim, locked, released_on_failure
from vlm_jax.zoo.adapters import save_adapter
from vlm_jax.zoo.load import load


def adapt(
    pretrained: Pretrained,
    out: str | Path,
    *,
    methods: Sequence[str],
    seeds: int = 3,
    model: str | None = None,
    show: bool = False,
    **section: Any,
) -> dict[str, Any]:
    """Adapts a model, writes results.json, `METHOD_SEED.safetensors` and a report into `out`, and returns the results.

    After an interruption the same call continues after the last finished fit; after the end it returns the results.

    Args:
      pretrained: a two-tower model.
      out: the folder.
      methods, seeds: of `protocol.few_shot`.
      model: name of the model in the report.
      show: shows progress.
      **section: the other arguments of `protocol.few_shot`.

    Raises:
      UserError: `out` holds an adaptation of other settings, or something else.
    """
    pretrained.lacks.check()
    out, bar = Path(out).expanduser(), None

    def keep(method: str, seed: int, adapted: Pretrained) -> None:
        nonlocal bar
        save_adapter(out / f"{method}_{seed}.safetensors", pretrained, adapted)
        if show and bar is None:  # after the bars of embedding
            bar = command.bar(total=len(methods) * seeds, desc="adapt", unit="fit")
        if show:
            bar.update()

    section = {"methods": methods, "seeds": seeds, **section}
    evaluator = evaluators.build({"type": "few_shot", "keep": keep, **section})
    settings = {"adapter": section, "params_sha256": params_sha256(pretrained.params), "version": __version__}
    with locked(out):
        if mistake := claim(out, config.plain(settings), "adapter"):
            raise UserError(f"{out} holds {mistake}")
        if (numbers := read_kept(out / "results.json")) is not None:
            return numbers
        progress = Progress(out / "progress" if processes.is_first() else None, show)
        with released_on_failure(out):
            numbers = evaluator(pretrained, progress=progress).as_results()
        if bar is not None:
            bar.close()
        write_json(out / "results.json", numbers)
        data = " ".join(filter(None, (section["uri"], section.get("split"))))
        few = f"{section.get('shots', 16)} pictures a class"
        few = f"{section['budget']} labels" if section.get("budget") else few
        what = f"adaptation: {', '.join(methods)}, {seeds} draws of {few}"
        report.save_about(out, what, model or pretrained.model, data, pretrained.params)
        report.write(out)
        progress.delete()
    return numbers


def table(numbers: Mapping[str, Any], methods: Sequence[str]) -> str:
    """A line for each method, then the notes.

    Cells: top-1 of every test in percent, the standard deviation over seeds, and the 95 % interval in brackets.
    """
    columns = {name.partition("/")[2] for name in numbers if name.endswith(("top1", "harmonic_mean"))}
    columns = sorted(columns, key=lambda name: (name != "top1", name))
    rows = [["", *(name.removesuffix("/top1") for name in columns)]]
    for method in methods:
        rows.append([method])
        for column in columns:
            spread = column.replace("top1", "spread").replace("harmonic_mean", "harmonic_spread")
            rows[-1].append(_cell(numbers, f"{method}/{column}", f"{method}/{spread}"))
    return "\n".join([command.table(rows), *(f"note: {note}" for note in numbers.get("notes", ()))])


def _cell(numbers: Mapping[str, Any], name: str, spread: str) -> str:
    if name not in numbers:
        return ""
    deviation = f" +- {100 * numbers[spread]:.1f}" if spread in numbers else ""
    low, high = numbers[f"{name}/interval"]
    return f"{100 * numbers[name]:.1f}{deviation} ({100 * low:.1f} to {100 * high:.1f})"


DATA = (
    "split", "train_split", "label", "classes", "templates", "where", "train_where", "shots", "pool", "seen",
    "budget", "rounds", "acquisition", "seeds", "base_to_new",
)  # fmt: skip


def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer:
    section = given(values, DATA) | {"uri": data_uri(values), "methods": values.method}
    section |= {"train_uri": data_uri(values, "train_data")} if values.train_data else {}
    section["options"] = given(values, ["option"]).get("option", {})
    with command.doing(f"loading {values.model}"):
        pretrained = load(values.model, **given(values, [flag.name for flag in ADAPTED]))
    pretrained = dataclasses.replace(pretrained, batch_size=values.batch_size)
    with command.doing("adapting"):
        numbers = adapt(pretrained, values.out, model=values.model, show=True, batch_size=values.batch_size, **section)
    folder = Path(values.out).absolute()
    page = str(folder / "report" / "index.html")
    shown = f"{table(numbers, values.method)}\nadapters: {folder}\nreport: {page}"
    return command.Answer(numbers | {"adapters": str(folder), "report": page}, shown)


if __name__ == "__main__":
    command.run("adapt", main)
