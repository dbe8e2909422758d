"""The output of `vlm-jax` and `vlm-jax COMMAND --help`, read from docstrings without importing the modules."""

import ast
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from vlm_jax import catalogue
from vlm_jax.command.commands import COMMANDS, EVERY, Flag

GROUPS = {
    "train": ("train", "precompute", "plan"),
    "use a model": ("evaluate", "adapt", "convert"),
    "look up": ("compare", "methods", "models"),
    "prepare data": ("inspect", "index", "score", "select", "data.train_tokenizer", "data.emoji.build"),
}
FIRST = ("evaluate", "train")  # the overview shows the first example of these commands


def overview() -> str:
    """Returns all commands by group, and examples to try."""
    lines = ["vlm-jax COMMAND: contrastive and generative vision-language models in JAX"]
    for heading, names in GROUPS.items():
        lines += ["", heading, *(_row(name, summary(name)) for name in names)]
    lines += ["", "try", *(_shown(examples(name)[0]) for name in FIRST)]
    return "\n".join([*lines, "", "vlm-jax COMMAND --help has its flags and more examples"])


def help_of(name: str) -> str:
    """Returns a command's summary, usage and examples, and its flags, one a line."""
    command = COMMANDS[name]
    needed = [f"--{flag.name}=..." for flag in command.all() if flag.needed]
    lines = [summary(name), "", " ".join(filter(None, ["usage: vlm-jax", name, command.arguments, *needed, "[flags]"]))]
    lines += ["", "examples", *map(_shown, examples(name))]
    for heading, group in command.flags.items():
        lines += ["", heading or "flags", *map(_line, group)]
        if any(flag.name == "config" for flag in group):
            lines.append(_row("--config.KEY=VALUE", "Any value of the config, e.g. --config.optimizer.lr=1e-3"))
    if command.families:
        lines += ["", "methods", *_methods(command.families)]
    return "\n".join([*lines, "", "any command", *map(_line, EVERY)])


def summary(name: str) -> str:
    """Returns the first line of a command's docstring."""
    return _doc(name).splitlines()[0]


def examples(name: str) -> list[str]:
    """Returns the command lines in a command's docstring; long ones keep their backslashes."""
    return re.findall(r"^    (vlm-jax (?:.*\\\n)*.*)", _doc(name), re.MULTILINE)


def module_of(name: str) -> str:
    """Returns the name of the module with a command's `main`."""
    module = COMMANDS[name].module or name
    return f"vlm_jax.{module}" if _path(name).is_file() else f"vlm_jax.{module}.__main__"


def _path(name: str) -> Path:
    return Path(__file__).parents[1].joinpath(*(COMMANDS[name].module or name).split(".")).with_suffix(".py")


def _doc(name: str) -> str:
    path = _path(name)
    path = path if path.is_file() else path.with_suffix("") / "__main__.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def _methods(families: Sequence[str]) -> list[str]:
    """Returns the names of the methods, one row a family."""
    return [_row(family, ", ".join(catalogue.of(family))) for family in families]


def _shown(example: str) -> str:
    return "  " + example.replace("\n    ", "\n  ")


def _line(flag: Flag) -> str:
    default = "" if flag.default in (None, False) else f" ({flag.default})"
    return _row(f"--{flag.name}", f"{flag.help}{default}")


def _row(label: str, text: str) -> str:
    """Returns a label and its text, in lines of at most 120 characters."""
    wrap = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(text, 120, initial_indent=f"  {label:22}", subsequent_indent=" " * 24, **wrap)
