"""Writes api.md, the page of all public names, from their signatures and docstrings: python docs/make_api.py"""

import importlib
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
HEAD = """# API

Every public name, from its docstring: `python docs/make_api.py` writes this page. Letters of shapes are B (batch), L
(length), H (heads), D (width), N (patches), V (vocabulary), C (classes). What a user can mend raises
`vlm_jax.UserError`, whose one line names the thing and the fix.
"""
SECTIONS = {  # title: modules, each with its public names or some of them
    "Models, ready to use": ["vlm_jax: load Pretrained save_pretrained UserError"],
    "Commands": [
        "vlm_jax.train: train", "vlm_jax.evaluate: evaluate", "vlm_jax.adapt.__main__: adapt",
        "vlm_jax.convert: convert describe", "vlm_jax.precompute: precompute", "vlm_jax.plan.train_step: plan Plan",
    ],
    "Models": ["vlm_jax.models"],
    "Objectives": ["vlm_jax.objectives", "vlm_jax.objectives.contrastive", "vlm_jax.objectives.captioning",
                   "vlm_jax.objectives.coca"],
    "Kernels": ["vlm_jax.kernels"],
    "Evaluators": ["vlm_jax.evaluators"],
    "Adapt": ["vlm_jax.adapt.heads", "vlm_jax.adapt.tune", "vlm_jax.models.insertion", "vlm_jax.adapt.coupled",
              "vlm_jax.params.masks", "vlm_jax.params.averages", "vlm_jax.adapt.files"],
    "Optimizers": ["vlm_jax.params.optim", "vlm_jax.params.schedules"],
    "Sharding": ["vlm_jax.params.sharding"],
    "Data": ["vlm_jax.data.sources: open_source", "vlm_jax.data.source: Source select field BadExample",
             "vlm_jax.data.loader: train_loader eval_batches",
             "vlm_jax.data.tokenizers: build train", "vlm_jax.data.ops: parse Pipeline op"],
    "Figures": ["vlm_jax.report.figures", "vlm_jax.pretrained.attention_maps"],
}  # fmt: skip
PARTS = ("Args", "Attributes", "Returns", "Raises", "Metrics")


def public(module: Any) -> list[str]:
    """The names of `__all__`, or of the functions and classes that a module defines itself."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    names = getattr(module, "__all__", own)
    return [name for name in names if not name.startswith("_") and callable(getattr(module, name))]


def documented() -> Iterator[tuple[str, str, list[tuple[str, Any]]]]:
    """(title, module, [(name, value)]) of each section; modules that are not there are left out."""
    for title, modules in SECTIONS.items():
        for spec in modules:
            path, _, names = spec.partition(": ")
            if importlib.util.find_spec(path):
                module = importlib.import_module(path)
                yield title, path, [(name, getattr(module, name)) for name in names.split() or public(module)]


def signature(value: Any) -> str:
    """`(a, *, b=1)`: without types, which the docstring says, and without what every flax module has."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return ""
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name not in ("parent", "self")]
    is_module = hasattr(value, "clone") and hasattr(value, "bind")
    parameters = [p for p in parameters if not (is_module and p.name == "name")]
    parameters = [p.replace(default=...) if len(repr(p.default)) > 60 else p for p in parameters]  # a table of rules
    text = str(found.replace(parameters=parameters, return_annotation=found.empty))
    return re.sub(r"<(\w+) (\S+?)( at 0x\w+)?( from .*?)?>", r"\2", text)


def docstring(value: Any) -> str:
    """Its own docstring; a NamedTuple's or dataclass's that Python made up does not count."""
    text = inspect.cleandoc(value.__doc__ or "")
    return "" if re.match(rf"{getattr(value, '__name__', '')}\(", text) else text


def markdown(text: str) -> str:
    """A docstring in the form of Google's: its parts as lists, what is indented as it stands."""
    lines = []
    for block in re.split(r"\n(?=\S)", text):
        head, _, body = block.partition("\n")
        if head.rstrip(":") in PARTS and head.endswith(":"):
            items = re.split(r"\n(?=\S)", textwrap.dedent(body))
            lines += ["", f"{head[:-1]}:", ""]
            for item in items:
                name, colon, rest = item.partition(":")
                item = f"`{name}`:{rest}" if colon and re.fullmatch(r"[\w*., ]+", name) else item
                lines.append("- " + " ".join(item.split()))
        elif body.strip() and all(line.startswith("  ") for line in body.split("\n") if line):
            lines += [head, "", textwrap.indent(textwrap.dedent(body.strip("\n")), "    "), ""]
        else:
            lines += [head, *body.split("\n")] if body or block.endswith("\n") else [head]
    return "\n".join(lines)


def entry(name: str, value: Any) -> list[str]:
    """The text of a name."""
    lines = [f"### {name}", "", f"    {name}{signature(value)}", "", markdown(docstring(value)), ""]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for method, function in vars(value).items():
            function = getattr(function, "fget", None) or inspect.unwrap(getattr(function, "__func__", function))
            if method.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            shown = "" if isinstance(vars(value)[method], property) else signature(function)
            first = " ".join(inspect.cleandoc(function.__doc__).split("\n\n")[0].split())
            lines.append(f"- `.{method}{shown}`: {first}")
    return [*lines, ""]


def table(rows: dict[str, Any]) -> list[str]:
    """Names of a registry, how they are called, and the first sentence of what they say of themselves."""
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        first = " ".join(docstring(value).split("\n\n")[0].split())
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in INJECTED]
        shown = str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))
        lines.append(f"| `{name}{'' if shown == '()' else shown}` | {first} |".replace(" || ", " or "))
    return lines


def page() -> str:
    """The page's text."""
    from vlm_jax.data import ops

    global INJECTED
    INJECTED = ops.INJECTED
    lines, title = [HEAD], None
    for section, module, names in documented():
        if section != title:
            lines += [f"## {section}", ""]
            title = section
        about = inspect.cleandoc(importlib.import_module(module).__doc__ or "").split("\n\n")[0].split(": python -m")[0]
        lines += [f"**`{module}`** " + " ".join(about.split()).removeprefix(f"{module}: "), ""]
        for name, value in names:
            lines += entry(name, value)
    own = {name: value for name, value in sorted(ops.OPS.items()) if value.__module__.startswith("vlm_jax.data")}
    lines += ["## Ops", "", "What an op string is made of, `decode | resize(32) | normalize`.", "", *table(own), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in "\n".join(lines).split("\n"))).strip() + "\n"


def lacking() -> list[str]:
    """Public names without a docstring."""
    from vlm_jax.data.ops import OPS

    names = [(f"{module}.{name}", value) for _, module, found in documented() for name, value in found]
    return [name for name, value in [*names, *OPS.items()] if not docstring(value)]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(
        f"{PAGE}: {len(PAGE.read_text().splitlines())} lines",
        *(f"no docstring: {name}" for name in lacking()),
        sep="\n",
    )
