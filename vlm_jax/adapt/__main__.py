"""Adapts a model to a few labelled pictures, and says how well over several draws of them.

    python -m vlm_jax.adapt --model=runs/demo --method=lora --data=tfds:emoji --split=unseen_style \\
        --classes=emoji:subgroups --label=subgroup --shots=16 --out=runs/lora

prints a table and leaves results.json and one small file a seed in --out, which hold only what was trained:

    vlm_jax.load("runs/demo").with_adapter("runs/lora/lora_0.safetensors").classify(pictures)

Several methods are compared by --method=zero_shot,gda,lora,coop; all of them: vlm_jax/adapt/methods.py. Pictures to
train on are drawn from --train_split; --base_to_new trains on half of the classes and tests on the others, too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import vlm_jax
from vlm_jax import command, evaluators
from vlm_jax.adapt.files import save_adapter
from vlm_jax.checkpoint import write_json
from vlm_jax.errors import UserError
from vlm_jax.evaluators.progress import Progress
from vlm_jax.model_flags import MODEL, define_model_flags, definers, given
from vlm_jax.pretrained import Pretrained


def adapt(pretrained: Pretrained, out: str | Path, *, show: bool = False, **section: Any) -> dict[str, float]:
    """Adapts a model, writes results.json and `METHOD_SEED.safetensors` into `out`, and returns the results.

    Args:
      pretrained: a two-tower model.
      out: the folder.
      show: shows progress.
      **section: the arguments of `evaluators.few_shot`.
    """
    out = Path(out)
    if (out / "results.json").exists():
        raise UserError(f"{out} holds results; give another --out")

    def keep(method: str, seed: int, adapted: Pretrained) -> None:
        save_adapter(out / f"{method}_{seed}.safetensors", pretrained, adapted)

    evaluator = evaluators.build({"type": "few_shot", "keep": keep, **section})
    out.mkdir(parents=True, exist_ok=True)
    numbers = evaluator(pretrained, progress=Progress(show=show)).metrics
    write_json(out / "results.json", numbers)
    return numbers


def table(numbers: Mapping[str, float], methods: Sequence[str]) -> str:
    """A line for each method: top-1 in percent with its standard deviation over seeds, of every test."""
    columns = {name.partition("/")[2] for name in numbers if name.endswith(("top1", "harmonic_mean"))}
    columns = sorted(columns, key=lambda name: (name != "top1", name))
    lines = [f"{'':20}" + "".join(f"{name.removesuffix('/top1'):>18}" for name in columns)]
    for method in methods:
        cells = []
        for column in columns:
            spread = column.replace("top1", "spread").replace("harmonic_mean", "harmonic_spread")
            value = numbers.get(f"{method}/{column}")
            cell = "" if value is None else f"{100 * value:.1f} +- {100 * numbers[f'{method}/{spread}']:.1f}"
            cells.append(f"{cell:>18}")
        lines.append(f"{method:20}" + "".join(cells))
    return "\n".join(lines)


DATA = (
    "split", "train_split", "label", "classes", "templates", "where", "train_where", "shots", "seeds", "base_to_new",
)  # fmt: skip


def main(_: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    section = given(values, DATA) | {"uri": values.data, "methods": values.method}
    section["options"] = given(values, ["option"]).get("option", {})
    pretrained = vlm_jax.load(values.model, **given(values, MODEL))
    pretrained = dataclasses.replace(pretrained, batch_size=values.batch_size)
    numbers = adapt(pretrained, values.out, show=True, batch_size=values.batch_size, **section)
    print(table(numbers, values.method))
    print(f"adapters: {Path(values.out).absolute()}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    define_model_flags(values)
    text, several, listed = definers(values)
    listed("method", help="One or several of vlm_jax/adapt/methods.py: gda, tip_adapter_f, lora, coop, maple, ...")
    text("out", help="Folder for results.json and the adapters")
    flags.mark_flags_as_required(["model", "method", "data", "out"], values)
    text("train_split", help="The split to draw pictures from (train); --train_split= where there are none")
    several("option", help="Of the methods: steps=100, learning_rate=1e-3, rank=8; repeatable")
    several("train_where", help="Which of its records count; repeatable")
    flags.DEFINE_integer("shots", 16, "Training pictures of each class", flag_values=values)
    flags.DEFINE_integer("seeds", 3, "Draws of them", flag_values=values)
    flags.DEFINE_bool("base_to_new", False, "Train on half of the classes, test the others as well", flag_values=values)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    command.run(main)
