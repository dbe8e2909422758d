"""What `make site` adds to docs/: README, studies, tables of configs and methods, the API, source files.

A page of the repository keeps its links: a page leads to its page, a source file to a page that shows it.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import vlm_jax

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
SHOWN = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "bash", ".json": "json"}  # source files, as pages
WIDE = {  # pages that leave out what stands beside a page
    "index.md": ["navigation"],
    "configs.md": ["navigation"],
    "methods.md": ["navigation", "toc"],
    "experiments/index.md": ["toc"],
}
LOADS = re.compile(r'<(?:script|img|iframe)\b[^>]*\bsrc="(?:https?:)?//[^>]*>|<link\b[^>]*\bhref="(?:https?:)?//[^>]*>')
ABOUT = """Shapes are written in letters: B (batch), L (length), H (heads), D (width), N (patches), V (vocabulary), C
(classes). What a user can mend raises `vlm_jax.UserError`, whose one line names the thing and the fix.
"""


# --- pages of the repository ------------------------------------------------------------------------------------------


def texts() -> dict[str, str]:
    """Path in the repository -> Markdown: the pages that are there, and the tables, which are made now."""
    made = {"docs/configs.md": tables.configs_page(), "docs/methods.md": tables.methods_page()}
    paths = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/README.md")])
    return made | {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


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
    """A page's text with links between places of the site; of a fence's words only the language stays."""

    def link(match: re.Match) -> str:
        path, anchor = target(page, match[1]), match[2] or ""
        if Path(path).suffix in SHOWN:
            anchor = re.sub(r"#L(\d+)", r"#__codelineno-0-\1", anchor)
        return f"]({posixpath.relpath(place(path), posixpath.dirname(place(page)) or '.')}{anchor})"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(link, part) for part in parts[::2]]
    parts[1::2] = [re.sub(r"\A```(\w+) .*", r"```\1", part) for part in parts[1::2]]
    return "".join(parts)


def linked(pages: dict[str, str]) -> set[str]:
    """Files of the repository to which pages link and which are no pages."""
    found = set()
    for page, text in pages.items():
        for part in FENCED.split(text)[::2]:
            found |= {target(page, match[1]) for match in LINK.finditer(part)}
    return {path for path in found - pages.keys() if (ROOT / path).is_file()}


def source(path: str) -> str:
    """A page that shows a source file."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    head = f"---\ntitle: {posixpath.basename(path)}\nsearch: {{exclude: true}}\n---\n# {path}\n\n"
    return f'{head}````{SHOWN[Path(path).suffix]} linenums="1"\n{text}\n````\n'


# --- the API ----------------------------------------------------------------------------------------------------------


def api() -> Iterator[tuple[str, str]]:
    """(place, text) of a page for each package, with its modules."""
    for init in sorted((ROOT / "vlm_jax").rglob("__init__.py")):
        folder = init.parent.relative_to(ROOT)
        package = ".".join(folder.parts)
        own = [
            node.name for node in ast.parse(init.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        shown = f"{{heading_level: 1, members: {own}}}"  # what is imported there is shown with its module
        lines = [f"---\ntitle: {package}\n---\n::: {package}\n    options: {shown}\n"]
        if package == "vlm_jax":
            names = [f"- [`vlm_jax.{name}`][{module}.{name}]" for name, module in vlm_jax._PUBLIC.items()]
            lines += [ABOUT, *names, ""]
        lines += [f"::: {package}.{path.stem}\n" for path in sorted(init.parent.glob("[!_]*.py"))]
        yield place(folder.as_posix()), "\n".join(lines)


# --- MkDocs -----------------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> None:
    studies = [place(path) for path in texts() if path.startswith("experiments/")]
    config.nav += [{"Studies": studies}, {"API": [{path[4:-3]: path} for path, _ in api()]}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    pages = texts()
    new = {place(path): dict(content=relinked(path, text)) for path, text in pages.items()}
    new |= {path: dict(content=text) for path, text in api()}
    for path in linked(pages):
        shown = Path(path).suffix in SHOWN
        new[place(path)] = dict(content=source(path)) if shown else dict(abs_src_path=str(ROOT / path))
    for path, text in new.items():
        if not files.get_file_from_path(path):
            files.append(File.generated(config, path, **text))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str | None:
    page.meta.setdefault("hide", WIDE.get(page.file.src_uri, []))
    return relinked(f"docs/{page.file.src_uri}", markdown) if page.file.src_dir else None  # what is not made here


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    page.present_anchor_ids |= set(re.findall(r'id="(__codelineno-\d+-\d+)"', html))  # which MkDocs overlooks


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    if found := LOADS.search(output):
        raise PluginError(f"{page.file.src_uri} loads from elsewhere: {found[0]}")
