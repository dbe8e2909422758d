"""The pages of the site that are tables: methods from the catalogue, configs from their docstrings.

Links are those of the repository; `hooks.py` makes them the site's.
"""

import ast
import re
from pathlib import Path

from vlm_jax import catalogue
from vlm_jax.command import configs

ROOT = Path(__file__).parents[1]


def methods_page() -> str:
    """docs/methods.md: a row for each declared method, with links to code, study and test."""
    rows = []
    for one in catalogue.read():
        study, test = one.claim.partition(":")[0], one.test
        rows.append([
            f"[{one.name}](../{one.path}#L{one.line})", papers(one.paper), one.family, papers(one.differs),
            f"`{one.run}`", f"[{one.claim}](../experiments/{study}/README.md)" if study else "", one.verdict,
            f"[test](../{test})" if test else "",
        ])  # fmt: skip
    head = ["name", "paper", "family", "differs", "run", "claim", "verdict", "test"]
    return f"# Methods\n\nPublished methods, as they are declared beside their code.\n\n{table(head, rows)}"


def configs_page() -> str:
    """docs/configs.md: a row for each config, and what each says of itself."""
    rows, parts = [], []
    for name in configs.names():
        text = ast.get_docstring(ast.parse((catalogue.CONFIGS / f"{name}.py").read_text(encoding="utf-8")))
        run = re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?:(\S+)", text)
        rows.append([f"[{name}](#{name})", papers(text.splitlines()[0]), f"`vlm-jax train --config={run[1]}:{run[2]}`"])
        parts.append(f"## {name}\n\n{papers(text)}\n\n[configs/{name}.py](../configs/{name}.py)\n")
    about = "A config is an experiment: `vlm-jax train --config=NAME:VARIANT --workdir=FOLDER` runs it.\n"
    return "\n".join(["# Configs\n", about, table(["config", "what", "run"], rows), *parts])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def papers(text: str) -> str:
    """A text with its arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
