"""One run a folder: the lock, and what a folder's settings stand for."""

import json
import os
import socket
import threading
import time

import pytest

from vlm_jax.errors import UserError
from vlm_jax.run import folder
from vlm_jax.run.folder import PROGRESS, claim, locked, released_on_failure

HOLDER = {"host": socket.gethostname(), "pid": 1, "since": "2026-01-01 00:00:00"}


def test_a_folder_has_one_run(tmp_path):
    with locked(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / "lock").read_text())
        assert holder["host"] == socket.gethostname() and holder["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"run is in use by process {os.getpid()} on .* \(since \d{{4}}"):
            locked(tmp_path / "run").__enter__()
    assert not (tmp_path / "run" / "lock").exists()
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    with locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("text", [json.dumps(HOLDER), "", '{"ho', "[]", "\0\0"])
def test_the_lock_of_a_killed_run_is_taken_over_at_once(text, tmp_path, capsys):
    (tmp_path / "lock").write_text(text)
    began = time.monotonic()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 1
    said = f"{tmp_path}: taking over from process 1 on {HOLDER['host']} (since 2026-01-01 00:00:00), which has ended"
    assert (said in capsys.readouterr().out) == (text == json.dumps(HOLDER))


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_elsewhere_lives_while_it_touches_the_lock(lives, tmp_path, monkeypatch, capsys):
    """Locks of the operating system may not reach other hosts."""
    monkeypatch.setattr(folder, "PULSE_SECONDS", 0.05)
    (tmp_path / "lock").write_text(json.dumps(HOLDER | {"host": "elsewhere"}))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.02):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=beat)
    if lives:
        thread.start()
        with pytest.raises(UserError, match="in use by process 1 on elsewhere"):
            locked(tmp_path).__enter__()
        ended.set()
        thread.join()
    else:
        with locked(tmp_path):
            assert "taking over from process 1 on elsewhere" in capsys.readouterr().out


def test_settings_stand_as_long_as_there_is_something_to_lose(tmp_path):
    one, other = ({"evaluator": {"ks": ks}, "model": "m"} for ks in (1, 5))
    assert claim(tmp_path, one, "evaluator") is None
    assert claim(tmp_path, other, "evaluator") is None  # nothing was computed yet
    (tmp_path / "progress").mkdir()
    (tmp_path / PROGRESS).write_text("{}")
    assert claim(tmp_path, other, "evaluator") is None
    assert "an evaluation with evaluator.ks = 5, not 1; choose" in claim(tmp_path, one, "evaluator")
    assert "something else than an adaptation" in claim(tmp_path, {"adapter": {}}, "adapter")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), released_on_failure(tmp_path):
            raise error
        assert (tmp_path / PROGRESS).exists()
    with pytest.raises(UserError), released_on_failure(tmp_path):
        raise UserError("ks is too large")
    assert claim(tmp_path, one, "evaluator") is None and not (tmp_path / "progress").exists()


def test_what_fails_at_once_leaves_no_empty_folder(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    with locked(tmp_path / "kept"):
        (tmp_path / "kept" / "results.json").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "mine"]


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_a_place_that_cannot_be_a_folder_is_named(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"/{name} cannot be written \(.+\); give another folder"):
        locked(tmp_path / name).__enter__()
