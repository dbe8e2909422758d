"""docs/api.md is what the docstrings say, and every public name has one."""

import importlib.util

from tests.docs.sandbox import ROOT

spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)


def test_every_public_name_has_a_docstring():
    assert make_api.lacking() == []


def test_the_page_is_up_to_date():
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run python docs/make_api.py"
