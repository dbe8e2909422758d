"""Shards in stores: a real S3 server and a real web server that fail in every way, against the same shards on disk."""

import contextlib
import errno
import json
import logging
import os
import pickle
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from absl import flags

from tests.support.stores import KINDS, Folder, s3_server, served
from tests.support.tars import plain, write
from vlm_jax import command, index
from vlm_jax.command import commands
from vlm_jax.data import block_cache, loader, remote, storage
from vlm_jax.data.source import BadExample, select
from vlm_jax.data.sources import index_copy, open_source
from vlm_jax.errors import StoreError, UserError
from vlm_jax.run.folder import locked

SHARDS, EACH = 3, 40
MIB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of shards, some MB each, so that records lie across the borders of blocks."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        members = []
        for name, content in plain(shard * EACH, EACH):
            members.append((name, content + (rng.bytes(60_000) if name.endswith("png") else b"")))
        write(folder / f"{shard}.tar", *members)
    return folder


@pytest.fixture(scope="module")
def web(data):
    app = Folder(data)
    with served(app) as (faults, url):
        yield app, faults, url


@pytest.fixture(scope="module")
def s3(data):
    with s3_server() as (faults, _):
        for path in sorted(data.glob("*.tar")):
            remote.put_file(path, f"s3://bucket/set/{path.name}")
        yield faults


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short pauses; a home of its own for caches and indexes; no counts of other tests."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    remote.counts.take()


@pytest.fixture(params=["s3", "web"])
def store(request):
    """(faults, what stands before the shards' names)"""
    if request.param == "s3":
        faults, base = request.getfixturevalue("s3"), "s3://bucket/set"
    else:
        _, faults, base = request.getfixturevalue("web")
    faults.reset()
    yield faults, base
    faults.reset()


NAMES = f"{{0..{SHARDS - 1}}}.tar"


def opened(base, tmp_path, **options):
    options = {"cache": tmp_path / "blocks", "block_mb": 1, **options}
    return open_source(f"wds:{base}/{NAMES}?{'&'.join(f'{name}={value}' for name, value in options.items())}")


def same(ours, expected, numbers=None):
    for i in range(len(expected)) if numbers is None else numbers:
        assert ours.key(i) == expected.key(i) and ours[i] == expected[i]


def test_a_store_has_the_records_of_the_disk(data, store, tmp_path, monkeypatch):
    faults, base = store
    monkeypatch.setattr(remote, "STREAMED", MIB)
    expected = open_source(f"wds:{data}/{NAMES}")
    faults.reset(every=3, seconds=0.01)
    ours = opened(base, tmp_path)
    assert (ours.fingerprint(), ours.left_out) == (expected.fingerprint(), expected.left_out)
    same(ours, expected)
    counts = remote.counts.take()
    assert counts["repeated_requests"] >= faults.faults * 2 // len(KINDS) > 0
    faults.reset()
    same(ours, expected)
    same(pickle.loads(pickle.dumps(ours)), expected, [0, 70])
    same(opened(base, tmp_path), expected, [7])  # another process's blocks
    same(opened(base, tmp_path, block_mb=0), expected, [5, 100])


def test_blocks_are_read_once_and_before_they_are_needed(data, s3, tmp_path):
    s3.reset()
    source = opened("s3://bucket/set", tmp_path)
    blocks = sum(-(-os.path.getsize(path) // MIB) for path in data.glob("*.tar"))
    s3.reset()
    source.soon(range(len(source)))
    deadline = time.monotonic() + 10
    while s3.ranges < blocks and time.monotonic() < deadline:
        time.sleep(0.01)
    same(source, open_source(f"wds:{data}/{NAMES}"))
    assert s3.ranges == blocks
    s3.reset()
    chosen = select(source, {"txt": ["3", "77"]})
    assert (chosen.tolist(), s3.ranges) == ([3, 77], 0)


OPS = "keep('txt')"
PASS = dict(ops=OPS, batch_size=8, seed=5, max_bad_fraction=0.0)


def taken(batches, count):
    return [next(batches)["txt"].tolist() for _ in range(count)]


def flat(batches):
    return sorted(text for batch in batches for text in batch)


@pytest.mark.parametrize("options", [dict(threads=3), pytest.param(dict(workers=1), marks=pytest.mark.subprocess)])
def test_every_example_comes_once_an_epoch_though_requests_fail(s3, tmp_path, monkeypatch, options):
    uri = f"wds:s3://bucket/set/{NAMES}?block_mb=1"
    count = SHARDS * EACH
    s3.reset(every=20, seconds=0.01)
    with contextlib.closing(loader.train_loader(uri=uri, **PASS, **options)) as batches:
        first = taken(batches, count // 8)
        assert flat(first) == sorted(map(str, range(count)))
        state = json.loads(json.dumps(batches.get_state()))
        more = taken(batches, count // 8)
        assert {*map(tuple, more)} != {*map(tuple, first)} and flat(more) == flat(first) and batches.bad == 0
    s3.reset(every=7, seconds=0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another host"))
    with contextlib.closing(loader.train_loader(uri=uri, **PASS)) as again:
        again.set_state(state)
        assert taken(again, count // 8) == more
        assert again.requests["repeated_requests"] > 0
    evaluated = loader.eval_batches(uri=uri, ops=OPS, batch_size=16)
    assert [text for batch in evaluated for text in batch["txt"][batch["mask"]]] == list(map(str, range(count)))


def test_a_lost_connection_is_waited_for_and_told(data, s3, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "SAID", 0.1)
    source = opened("s3://bucket/set", tmp_path)
    s3.reset(down=True)
    threading.Timer(0.6, s3.reset).start()
    with caplog.at_level(logging.WARNING, remote.log.name):
        same(source, open_source(f"wds:{data}/{NAMES}"), [9])
    said = [record.getMessage() for record in caplog.records if record.name == remote.log.name]
    assert any("no answer for" in line and "waiting" in line for line in said)
    assert any("answers again, after" in line for line in said)
    assert remote.counts.take()["waited_seconds"] > 0.3
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    s3.reset(down=True)
    with pytest.raises(StoreError, match=r"`s3://bucket/set/2.tar` has given no usable answer .* check the network"):
        source[2 * EACH + 39]
    with pytest.raises(StoreError):
        select(source, {"txt": ["3"]})
    s3.reset()


def test_a_slow_answer_is_asked_for_again(data, s3, tmp_path, monkeypatch):
    source = opened("s3://bucket/set", tmp_path)
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    monkeypatch.setattr(remote, "SLOWEST", 2**27)
    s3.reset(every=2, kinds=["slow"], seconds=1.0)
    same(source, open_source(f"wds:{data}/{NAMES}"), [0, 39])
    assert s3.faults and remote.counts.take()["repeated_requests"]
    s3.reset()


def test_the_cache_stays_in_its_bounds_and_mends_damage(data, s3, tmp_path, caplog):
    s3.reset()
    source, expected = opened("s3://bucket/set", tmp_path, cache_gb=0.0045), open_source(f"wds:{data}/{NAMES}")
    held = lambda: {path: path.stat().st_size for path in (tmp_path / "blocks").rglob("*") if "lock" not in path.name}
    for i in range(0, len(expected), 4):
        same(source, expected, [i])
        assert sum(size for path, size in held().items() if path.is_file()) <= 0.0045e9
    with caplog.at_level(logging.WARNING):
        source.warn_of_window(1000)
    assert "two windows of the order have" in caplog.text and "?cache_gb=1," in caplog.text
    for damage in (lambda b: b[:100], lambda b: b"\0" * len(b), lambda b: b + b"x", lambda b: b""):
        for path in held():
            if path.is_file():
                path.write_bytes(damage(path.read_bytes()))
        same(opened("s3://bucket/set", tmp_path, cache_gb=0.0045), expected, [119])
    shutil.rmtree(tmp_path / "blocks")
    same(source, expected, [1])


def test_a_full_disk_is_one_line_and_no_bad_example(s3, tmp_path, monkeypatch):
    s3.reset()
    uri = f"wds:s3://bucket/set/{NAMES}?cache={tmp_path}/blocks&block_mb=1"
    batches = loader.train_loader(uri=uri, **PASS | dict(max_bad_fraction=1.0))

    def full(self, name, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(block_cache.Cache, "_write", full)
    shutil.rmtree(tmp_path / "blocks")
    with pytest.raises(
        StoreError, match=r"the cache of blocks, `.*/blocks`, cannot be written \(No space left .*cache="
    ):
        next(batches)
    batches.close()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be written"):
        opened("s3://bucket/set", tmp_path, cache=tmp_path / "file")


def test_an_index_in_a_store(data, s3, tmp_path, monkeypatch, caplog):
    s3.reset(every=5, seconds=0.01)
    base = "s3://bucket/indexed"
    for path in sorted(data.glob("*.tar")):
        remote.put_file(path, f"{base}/{path.name}")
    uri = f"wds:{base}/{NAMES}?cache={tmp_path}/blocks&block_mb=1"
    report = index.write(index.place(uri))
    assert (report["out"], report["records"], report["broken"]) == (f"{base}/.wds_index", SHARDS * EACH, {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another host"))
    source, expected = open_source(uri), open_source(f"wds:{data}/{NAMES}")
    assert source.generation and source.fingerprint() == expected.fingerprint()
    same(pickle.loads(pickle.dumps(source)), expected, [0, 50])
    read = []
    monkeypatch.setattr(index_copy, "_copy", lambda *arguments: read.append(arguments))
    assert len(open_source(f"wds:{base}/{{1..2}}.tar?cache={tmp_path}/blocks")) == 2 * EACH and not read
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another host"))

    write(tmp_path / "new.tar", *plain(200, 5))
    remote.put_file(tmp_path / "new.tar", f"{base}/1.tar")
    source = open_source(uri)
    with caplog.at_level(logging.WARNING), pytest.raises(BadExample, match="has changed since its index was written"):
        source[EACH]
    same(source, expected, [EACH - 1, 2 * EACH])
    assert sum("vlm-jax index" in record.getMessage() for record in caplog.records) == 1
    report = index.write(index.place(uri))
    assert report["records"] == 2 * EACH + 5 and len(open_source(uri)) == 2 * EACH + 5
    names = {path.rpartition("/")[2] for path in storage.glob(f"{base}/.wds_index/*")}
    assert len(names) == 5  # of one generation
    s3.reset()


def test_an_index_elsewhere(data, web, tmp_path):
    _, faults, base = web
    faults.reset()
    with pytest.raises(UserError, match=r"is on a web server.*--out=DIR"):
        index.write(index.place(f"wds:{base}/{NAMES}"))
    index.write(index.place(f"wds:{base}/{NAMES}", str(tmp_path / "index")))
    source = open_source(f"wds:{base}/{NAMES}?index={tmp_path}/index&cache={tmp_path}/blocks")
    assert source.generation
    same(source, open_source(f"wds:{data}/{NAMES}"), [3])


def test_memory_and_file(data, tmp_path):
    for path in data.glob("*.tar"):
        remote.put_file(path, f"memory://set/{path.name}")
    expected = open_source(f"wds:{data}/{NAMES}")
    same(opened("memory://set", tmp_path), expected, [0, 119])
    same(open_source(f"wds:memory://set/*.tar?cache={tmp_path}/blocks"), expected, [119])
    plain_files = open_source(f"wds:file://{data}/{NAMES}")
    assert not plain_files.remote and plain_files.paths == expected.paths


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("wds:s3://bucket/set/{2..3}.tar", r"shard `s3://bucket/set/3.tar` is missing \(1 of 2 are\)"),
        ("wds:s3://bucket/none/*.tar", "shard none matches"),
        ("wds:s3://BAD bucket/0.tar", r"is refused: check the URL"),
        ("wds:s4://bucket/0.tar", r"`s4://` is in no known store; expected one of s3://"),
        ("wds:s3://bucket/set/0.tar?cache_gb=many", "cache_gb='many'; expected a number"),
        ("wds:s3://bucket/set/0.tar?cache_gb=0.001", "holds no four blocks"),
        ("wds:s3://bucket/set/0.tar?block_mb=99", "block_mb=99; expected 1 to 16"),
        ("wds:s3://bucket/set/0.tar?index=s3://bucket/none", "there is no index `s3://bucket/none`"),
        ("wds:/shards/0.tar?cache=/tmp", "`cache` is an option of shards in a store"),
        ("arrayrecord:s3://bucket/0.array_record", "are read from disk alone; copy them"),
        ("jsonl:s3://bucket/0.jsonl", "`jsonl:` reads files on disk; copy them"),
        ("s3://bucket/set/0.tar", "did you mean `wds:s3://bucket/set/0.tar`"),
    ],
)
def test_what_is_wrong_with_a_url_is_one_line(s3, uri, message):
    s3.reset()
    with pytest.raises(UserError, match=message) as caught:
        open_source(uri)
    assert "\n" not in str(caught.value)


def test_what_a_server_cannot_do_is_one_line(web, tmp_path, monkeypatch):
    app, faults, base = web
    faults.reset()
    app.whole = True
    with pytest.raises(StoreError, match="the server gives only whole files"):
        opened(base, tmp_path)
    app.whole, app.denied = False, True
    with pytest.raises(StoreError, match=r"/0.tar` gives no access, or is not there: set the credentials"):
        opened(base, tmp_path)
    app.denied = False
    monkeypatch.setattr(remote, "OPENING", 0.2)
    with pytest.raises(UserError, match=r"`http://127.0.0.1:1/.* has given no usable answer"):
        open_source("wds:http://127.0.0.1:1/0.tar")


def test_without_the_extra_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    remote.filesystem.cache_clear()
    with pytest.raises(UserError, match=r"needs the package s3fs; install it by: pip install 'vlm_jax\[remote\]'"):
        open_source("wds:s3://bucket/set/0.tar")
    monkeypatch.undo()
    remote.filesystem.cache_clear()


@pytest.mark.parametrize("folder", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_a_run_on_a_store_is_refused_before_it_starts(folder):
    with pytest.raises(UserError, match=r"runs write to disk, .* give a folder that all hosts see"), locked(folder):
        pass
    with pytest.raises(UserError, match=r"--workdir `.*runs write to disk"):
        values = flags.FlagValues()
        commands.define("train", values)
        command.parse("train", ["train", "--config=clip:smoke", f"--workdir={folder}"], values)
