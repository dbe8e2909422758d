"""docs/code.md shows the code as it is: every folder and root module is in the tree, every path of the tree exists."""

import re

from tests.docs.sandbox import ROOT

PAGE = ROOT / "docs" / "code.md"


def tree():
    """Paths of the tree, from names indented below their folders."""
    found, folders = [], []
    for line in re.search(r"\n\n((?: {4}.*\n)+)\n", PAGE.read_text())[1].splitlines():
        indent, name = re.match(r" {4}((?:  )*)(\S+)", line).groups()
        folders[len(indent) // 2 :] = [name]
        found.append("".join(folders))
    return found


def test_every_path_of_the_tree_exists():
    assert [path for path in tree() if not (ROOT / path).exists()] == []
    assert [path for path in tree() if (ROOT / path).is_dir() != path.endswith("/")] == []


def test_every_room_and_root_module_is_in_the_tree():
    package = ROOT / "vlm_jax"
    rooms = {f"{init.parent.relative_to(ROOT)}/" for init in package.rglob("__init__.py")}
    modules = {str(path.relative_to(ROOT)) for path in package.glob("*.py")}
    assert (rooms | modules) - set(tree()) == set()


def test_eight_files_to_read():
    listed = re.findall(r"^\d\. \[.*?\]\(\.\./(\S+)\)", PAGE.read_text(), re.M)
    assert len(listed) == 8 and all((ROOT / path).is_file() for path in listed)
