"""Every public function and class has a docstring: the API of the site consists of them."""

import ast

import pytest

from tests.docs.sandbox import ROOT

MODULES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "vlm_jax").rglob("*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    defined = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in ast.parse((ROOT / module).read_text()).body if isinstance(node, defined)]
    lacking = [node.name for node in public if node.name[0] != "_" and not ast.get_docstring(node)]
    assert [name for name in lacking if name != "main"] == []  # a command's docstring is its module's
