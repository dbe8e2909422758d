"""The rooms of the package: who may import whom, how large a file may be; tests share through tests/support.

Imports are read from the source, those inside of functions and under `TYPE_CHECKING` too.
"""

import ast
import graphlib

import pytest

from tests.support.paths import ROOT

ROOMS = (  # lowest first; rooms of one line do not import each other
    ("ground",),
    ("params", "kernels"),
    ("data",),
    ("models",),
    ("objectives",),
    ("run",),
    ("pretrained",),
    ("zoo",),
    ("evaluators",),
    ("adapt",),
    ("report",),
    ("plan",),
    ("commands",),
    ("package",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
ROOM_OF = {
    **dict.fromkeys(("", "errors", "config", "catalogue", "command"), "ground"),
    **dict.fromkeys(
        ("train", "evaluate", "convert", "precompute", "compare", "methods", "index", "inspect", "score", "select"),
        "commands",
    ),
    "__main__": "package",
}


def module_name(path):
    """The dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "vlm_jax").rglob("*.py"))}
TESTS = {module_name(path) for path in (ROOT / "tests").rglob("*.py")} | {"conftest"}


def room_of(module):
    first = module.partition(".")[2].partition(".")[0]
    if module.count(".") == 2 and module.endswith(".__main__"):
        return "commands"
    return ROOM_OF.get(first, first)


def imports(path):
    """(name of a module, name imported from it or None) for each import of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def imported_modules(path, known):
    """The modules of `known` that a file imports; `from package import module` is of that module alone."""
    for module, name in imports(path):
        full = f"{module}.{name}"
        if full in known or module in known:
            yield full if full in known else module


GRAPH = {module: set(imported_modules(path, MODULES)) - {module} for module, path in MODULES.items()}


def test_no_circles():
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


def test_a_module_imports_from_its_own_room_or_lower_ones():
    assert {room_of(module) for module in MODULES} <= LEVELS.keys()
    wrong = [
        f"{module} ({mine}) imports {other} ({theirs})"
        for module, others in GRAPH.items()
        for other in sorted(others)
        if (mine := room_of(module)) != (theirs := room_of(other)) and LEVELS[mine] <= LEVELS[theirs]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_train():
    assert [module for module, others in GRAPH.items() if "vlm_jax.train" in others] == []


def test_few_modules_at_the_root():
    assert len(list((ROOT / "vlm_jax").glob("*.py"))) <= 10


def test_no_file_is_over_400_lines():
    tops = [top for top in ROOT.iterdir() if top.is_dir() and top.name[0] != "." and top.name not in ("runs", "build")]
    files = [*ROOT.glob("*.py"), *(path for top in tops for path in top.rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_tests_share_through_support():
    """No test module imports another test module or a conftest; support imports nothing of the tests but support."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        shared = set(imported_modules(path, TESTS))
        wrong = {module for module in shared if module.split(".")[-1].startswith(("test_", "conftest"))}
        if (ROOT / "tests" / "support") in path.parents:
            wrong |= {module for module in shared if not module.startswith("tests.support")}
        assert not wrong, (
            f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}; shared code is in tests/support"
        )
