"""Curves that are drawn while a run writes its metrics."""

import json
import sys
import time

import pytest

from vlm_jax.errors import UserError
from vlm_jax.report import figures, live


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: ("new" or "again", the picture)."""
    seen = []

    class DisplayHandle:
        def display(self, picture):
            seen.append(("new", picture))

        def update(self, picture):
            seen.append(("again", picture))

    module = type(sys)("IPython.display")
    module.DisplayHandle = DisplayHandle
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return seen


def test_is_drawn_again_where_there_is_more(tmp_path, shown):
    with (tmp_path / "metrics.jsonl").open("w") as file, live.curves(tmp_path, seconds=0.01):
        for step in (1, 2):
            drawn = len(shown)
            print(json.dumps({"step": step, "loss": 1 / step, "lr": 0.1}), file=file, flush=True)
            for _ in range(6000):  # until the thread has looked
                if len(shown) > drawn:
                    break
                time.sleep(0.01)
    assert [kind for kind, _ in shown] == ["new", "again"]  # and not once more, since nothing has come
    last = shown[-1][1]
    assert isinstance(last, figures.Picture)
    assert [axes.get_title(loc="left") for axes in last.axes] == ["loss"]
    assert last.axes[0].lines[0].get_ydata().tolist() == [1.0, 0.5]


def test_what_came_last_is_drawn_when_the_body_fails(tmp_path, shown):
    with pytest.raises(KeyboardInterrupt), live.curves(tmp_path, seconds=1000):
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
        raise KeyboardInterrupt
    assert [kind for kind, _ in shown] == ["new"]


def test_is_for_notebooks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(UserError, match="for notebooks"), live.curves(tmp_path):
        pass
