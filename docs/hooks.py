"""What `make site` adds to docs/: README, studies, tables of configs and methods, the API, source files.

A page of the repository keeps its links: a page leads to its page, a source file to a page that shows it.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import vlm_jax
from vlm_jax import catalogue
from vlm_jax.command import configs

ROOT = Path(__file__).parents[1]

FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
SHOWN = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "bash", ".json": "json"}  # source files, as pages
WIDE = {  # pages that leave out what stands beside a page
    "index.md": ["navigation"], "configs.md": ["navigation"], "methods.md": ["navigation", "toc"],
    "experiments/index.md": ["toc"],
}  # fmt: skip
LOADS = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^>]*>|<link\b[^>]*\bhref=\"(?:https?:)?//[^>]*>"
)


# --- pages of the repository ------------------------------------------------------------------------------------------


def pages() -> list[str]:
    """The Markdown files that become pages, as paths in the repository."""
    found = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md")]
    return [path.relative_to(ROOT).as_posix() for path in sorted(found)]


def place(path: str) -> str:
    """Where a file of the repository, or a package, stands in the site, as a source of MkDocs."""
    folder, name = posixpath.split(path)
    if (ROOT / path / "__init__.py").is_file():
        return f"api/{path.replace('/', '.')}.md"
    if Path(path).suffix in SHOWN:
        return f"source/{path}.md"
    return posixpath.join(folder, "index.md" if name == "README.md" else name).removeprefix("docs/")


def target(page: str, link: str) -> str:
    """The file of the repository, or the package, to which a link of a page leads; any other folder is its README."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    readme = posixpath.join(path, "README.md")
    return readme if (ROOT / readme).is_file() else path


def relinked(page: str, text: str) -> str:
    """A page's text with links between places of the site; the words after a fence's language are left out."""

    def link(match: re.Match) -> str:
        path, anchor = target(page, match[1]), match[2] or ""
        if Path(path).suffix in SHOWN:
            anchor = re.sub(r"#L(\d+)", r"#__codelineno-0-\1", anchor)
        return f"]({posixpath.relpath(place(path), posixpath.dirname(place(page)) or '.')}{anchor})"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    parts[1::2] = [re.sub(r"\A```(\w+) .*", r"```\1", part) for part in parts[1::2]]
    return "".join(parts)


def linked() -> set[str]:
    """Files of the repository to which pages link and which are no pages."""
    found = set()
    for page in pages():
        for part in FENCED.split((ROOT / page).read_text(encoding="utf-8"))[::2]:
            found |= {target(page, match[1]) for match in LINK.finditer(part)}
    return {path for path in found - set(pages()) if (ROOT / path).is_file()}


def source(path: str) -> str:
    """A page that shows a source file."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    head = f"---\ntitle: {posixpath.basename(path)}\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    return f'{head}````{SHOWN[Path(path).suffix]} linenums="1"\n{text}\n````\n'


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def papers(text: str) -> str:
    """A text with its arXiv numbers as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def configs_page() -> str:
    """The table of configs, and what each says of itself."""
    docs = {
        name: ast.get_docstring(ast.parse((catalogue.CONFIGS / f"{name}.py").read_text())) for name in configs.names()
    }
    rows, parts = [], []
    for name, text in docs.items():
        run = re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?:(\S+)", text)
        rows.append([f"[{name}](#{name})", papers(text.splitlines()[0]), f"`vlm-jax train --config={run[1]}:{run[2]}`"])
        parts.append(f"## {name}\n\n{papers(text)}\n\n[configs/{name}.py](source/configs/{name}.py.md)\n")
    about = "A config is an experiment: `vlm-jax train --config=NAME:VARIANT --workdir=FOLDER` runs it.\n"
    return "\n".join(["# Configs\n", about, table(["config", "what", "run"], rows), *parts])


def test_of(one: catalogue.Declaration) -> str:
    """The test of a method: under its file's path, or under that of a folder around it; "" if there is none."""
    path = PurePosixPath(one.path.removesuffix("/__init__.py"))
    for near in (path, *path.parents[:-2]):
        test = PurePosixPath("tests", *near.parent.parts[1:], f"test_{near.stem}.py")
        if (ROOT / test).is_file():
            return str(test)
    return ""


def methods_page() -> str:
    """The table of the catalogue, with links to code, tests and studies."""
    rows = []
    for one in catalogue.read():
        study, test = one.claim.partition(":")[0], test_of(one)
        rows.append([
            f"[{one.name}](source/{one.path}.md#__codelineno-0-{one.line})", papers(one.paper), one.family, one.differs,
            f"`{one.run}`", f"[{one.claim}](experiments/{study}/index.md)" if study else "", one.verdict,
            f"[test]({place(test)})" if test else "",
        ])  # fmt: skip
    head = ["name", "paper", "family", "differs", "run", "claim", "verdict", "test"]
    return f"# Methods\n\nPublished methods, as they are declared beside their code.\n\n{table(head, rows)}"


# --- the API ----------------------------------------------------------------------------------------------------------


ABOUT = """Shapes are written in letters: B (batch), L (length), H (heads), D (width), N (patches), V (vocabulary), C
(classes). What a user can mend raises `vlm_jax.UserError`, whose one line names the thing and the fix.
"""


def api() -> Iterator[tuple[str, str]]:
    """(place, text) of a page for each package, with its modules."""
    for init in sorted((ROOT / "vlm_jax").rglob("__init__.py")):
        folder = init.parent.relative_to(ROOT)
        package = ".".join(folder.parts)
        own = [
            node.name for node in ast.parse(init.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        shown = f"{{heading_level: 1, members: {own}}}"  # what is imported there is shown with its module
        modules = [f"{package}.{path.stem}" for path in sorted(init.parent.glob("[!_]*.py"))]
        lines = [f"---\ntitle: {package}\n---\n::: {package}\n    options: {shown}\n"]
        if package == "vlm_jax":
            names = [f"- [`vlm_jax.{name}`][{module}.{name}]" for name, module in vlm_jax._PUBLIC.items()]
            lines += [ABOUT, *names, ""]
        yield place(folder.as_posix()), "\n".join([*lines, *(f"::: {module}\n" for module in modules)])


# --- MkDocs -----------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    studies = [place(page) for page in pages() if page.startswith("experiments/")]
    config.nav += [{"Studies": studies}, {"API": [{path[4:-3]: path} for path, _ in api()]}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    new = {place(page): dict(abs_src_path=str(ROOT / page)) for page in pages() if not page.startswith("docs/")}
    new |= {path: dict(content=text) for path, text in api()}
    new["configs.md"] = dict(content=configs_page())
    if not files.get_file_from_path("methods.md"):
        new["methods.md"] = dict(content=methods_page())
    sources = linked() | {f"configs/{name}.py" for name in configs.names()}
    sources |= {path for one in catalogue.read() for path in (one.path, test_of(one)) if path}
    for path in sources:
        shown = Path(path).suffix in SHOWN
        new[place(path)] = dict(content=source(path)) if shown else dict(abs_src_path=str(ROOT / path))
    for path, text in new.items():
        if not files.get_file_from_path(path):
            files.append(File.generated(config, path, **text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str | None:
    page.meta.setdefault("hide", WIDE.get(page.file.src_uri, []))
    if page.file.abs_src_path:
        return relinked(Path(page.file.abs_src_path).relative_to(ROOT).as_posix(), markdown)
    return None


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    page.present_anchor_ids |= set(re.findall(r'id="(__codelineno-\d+-\d+)"', html))  # which MkDocs overlooks


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
