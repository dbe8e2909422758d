"""Lists the published methods: paper, difference, command, claim and verdict.

    vlm-jax methods
    vlm-jax methods lora
    vlm-jax methods --family=prompts --json

With names, the command shows only these methods, in full; with --family, one family. A decorator declares each method,
see `vlm_jax.catalogue`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from vlm_jax import catalogue, command
from vlm_jax.catalogue import FAMILIES, Declaration
from vlm_jax.errors import UserError


def describe(declaration: Declaration) -> dict[str, Any]:
    """Returns a method as JSON: the whole declaration, its verdict, the places of code and test."""
    fields = declaration._asdict()
    order = ("name", "family", "system", "paper", "where", "differs", "claim")
    return {
        **{name: fields[name] for name in order},
        "verdict": declaration.verdict,
        "run": declaration.run,
        "options": dict(declaration.options),
        "parameters": declaration.count,
        "code": f"{declaration.path}:{declaration.line}",
        "test": declaration.test,
    }


def table(declarations: Iterable[Declaration]) -> str:
    """Returns all families with one line a method: name, paper, what the method changes, verdict."""
    declarations, lines = list(declarations), []
    width = max((len(d.name) for d in declarations), default=0)
    for family in FAMILIES:
        own = [d for d in declarations if d.family == family]
        if own:
            about = FAMILIES[family]
            lines += ["", f"{family}: {about.takes}", f"  {about.run.format(name='NAME')}", ""]
            lines += [f"  {d.name:{width}}  {d.paper:16}  {_short(d)}".rstrip() for d in own]
    return "\n".join(lines[1:])


def _short(declaration: Declaration) -> str:
    verdict = f" [{declaration.verdict}]" if declaration.verdict else ""
    return f"{declaration.differs}{verdict}"


def page(declaration: Declaration) -> str:
    """Returns all facts about one method, one a line."""
    about = describe(declaration)
    facts = {
        "system": about["system"],
        "paper": ", ".join(filter(None, (about["paper"], about["where"]))),
        "differs": about["differs"],
        "run": about["run"],
        "options": ", ".join(f"{name}={value}" if value else name for name, value in about["options"].items()),
        "trains": about["parameters"],
        "claim": f"{about['claim']} [{about['verdict']}]" if about["claim"] else "",
        "code": about["code"],
        "test": about["test"],
    }
    lines = [f"  {name:8}  {fact}" for name, fact in facts.items() if fact]
    return "\n".join([f"{about['name']} ({about['family']})", *lines])


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    families = [values.family] if values.family else list(FAMILIES)
    catalogue.of(*families)  # raises if a family does not exist
    chosen = [d for d in catalogue.read() if d.family in families]
    names = argv[1:]
    known = dict.fromkeys(name for d in chosen for name in (d.name, d.system) if name)
    for name in names:
        if name not in known:
            raise UserError(catalogue.unknown(f"there is no method `{name}`", name, known))
    if names:
        chosen = [d for d in chosen if d.name in names or d.system in names]
    text = "\n\n".join(map(page, chosen)) if names else table(chosen)
    return command.Answer({"methods": [describe(d) for d in chosen]}, text)


if __name__ == "__main__":
    command.run("methods", main)
