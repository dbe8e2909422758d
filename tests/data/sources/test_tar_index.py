"""The index of tar shards: the records of a scan, one by one; kills, changed and broken shards, damaged indexes."""

import json
import logging
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from tests.support.records import red
from tests.support.tars import plain, write
from vlm_jax import command, index
from vlm_jax.command import commands
from vlm_jax.data import loader
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source, tar_columns, tar_headers, tar_index, tar_shards
from vlm_jax.errors import UserError


def write_all(folder):
    """Writes a shard of every kind; returns the pattern."""
    folder.mkdir(exist_ok=True)
    long = "f" * 150 + "/" + "n" * 60
    write(folder / "0.tar", *plain(0))
    write(folder / "1.tar", (f"{long}.png", red(1)), (f"{long}.txt", b"long"), *plain(10), format=tarfile.GNU_FORMAT)
    write(folder / "2.tar", (f"{long}.png", red(2)), *plain(20), format=tarfile.PAX_FORMAT, mtime=1.5)
    names = ("é" * 120 + ".txt", "ü" * 120 + ".TXT")
    write(folder / "3.tar", *((name, b"x") for name in names), format=tarfile.PAX_FORMAT, encoding="latin-1")
    write(folder / "4.tar")
    odd = (
        "./.DS_Store",
        "__meta__/info.json",
        "README",
        "Thumbs.db",
        "a/.b/0.txt",
        "__MACOSX/._0.txt",
        "..",
        "d.x/1.txt",
    )
    write(folder / "5.tar", *((name, b"x") for name in odd), ("./9.png", red(9)), ("./9.a.b.txt", b"9"))
    again = [("0.png", red(1)), ("0.txt", b"old"), *plain(50), ("0.txt", b"new"), ("1.txt", b"1"), ("1.txt", b"2")]
    write(folder / "6.tar", *again, ("0.png", red(3)), end=False)
    with tarfile.open(folder / "7.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo(f"1{kind.decode()}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    return f"wds:{folder}/{{0..7}}.tar"


def write_index(uri, **options):
    """Writes the index as the command does, and returns its report."""
    return index.write(index.place(uri), **options)


def outcome(source, i):
    try:
        return source.key(i), source[i]
    except BadExample as error:
        return source.key(i), error.args


def told(source):
    """All that a source tells."""
    records = [outcome(source, i) for i in range(len(source))]
    return records, source.fingerprint(), source.left_out


def reference(path):
    """(key, {extension: bytes}) of a shard by Python's `tarfile`; the rule of records written down once more."""
    records = []
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.removeprefix("./").split("/")
            hidden = any(
                (p[:1] == "." and p not in (".", "..")) or p[:2] == p[-2:] == "__" or p == "__MACOSX" for p in parts
            )
            if not member.isfile() or hidden or "." not in parts[-1] or parts[-1] == "Thumbs.db":
                continue
            stem, extension = parts[-1].split(".", 1)
            key, extension = "/".join([*parts[:-1], stem]), extension.lower()
            if not records or records[-1][0] != key or extension in records[-1][1]:
                records.append((key, {}))
            records[-1][1][extension] = tar.extractfile(member).read()
    return records


def contents(source, i):
    """{extension: bytes} of a record, by the columns alone."""
    shard = int(np.searchsorted(source.starts, i, "right")) - 1
    bounds, members, _ = source.first[shard]
    start, stop = source.columns.bounds[bounds + i - source.starts[shard] :][:2, 0].tolist()
    with open(source.paths[shard], "rb") as file:
        data, rows = file.read(), source.columns.members[members + start : members + stop].tolist()
    return {source.columns.extensions[e]: data[512 * block : 512 * block + size] for e, block, size in rows}


def test_an_index_has_the_records_of_a_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "HELD_READS", 3)
    uri = write_all(tmp_path / "data")
    scanned = told(open_source(uri))
    monkeypatch.setattr(tar_headers, "TOGETHER", 2)
    monkeypatch.setattr(tar_headers, "WINDOW", 1024)
    report = write_index(uri)
    source = open_source(uri)
    assert source.generation and told(source) == scanned
    assert told(pickle.loads(pickle.dumps(source))) == scanned
    assert report["records"] == len(source) and report["members"] == sum(report["extensions"].values())
    assert report["left_out"] == {"members of no record": 6, "links, devices and sparse members": 1}
    assert (report["empty"], report["repeated_keys"], report["bad_records"]) == (2, 3, 3)
    expected = [(f"{n}.tar/{key}", held) for n in range(8) for key, held in reference(tmp_path / f"data/{n}.tar")]
    assert [(source.key(i), contents(source, i)) for i in range(len(source))] == expected
    # other patterns of the same shards: a part of them, another order, from another folder
    for pattern in ("{2..5}", "{6,0,3}", "[1-5]"):
        part = f"wds:{tmp_path}/data/{pattern}.tar"
        indexed = open_source(part)
        assert indexed.generation == source.generation
        (tmp_path / "data" / tar_index.FOLDER).rename(tmp_path / "elsewhere")
        assert told(open_source(part)) == told(indexed) == told(open_source(f"{part}?index={tmp_path}/elsewhere"))
        (tmp_path / "elsewhere").rename(tmp_path / "data" / tar_index.FOLDER)


def test_a_run_continues_with_an_index_what_it_began_without(tmp_path):
    uri = write_all(tmp_path)
    options = dict(uri=uri, ops="decode | resize(4) | keep('image')", batch_size=4, seed=3, max_bad_fraction=1.0)
    batches = loader.train_loader(**options)
    whole = [next(batches)["image"] for _ in range(7)]
    batches.set_state(batches.get_state() | {"batch": 3})
    state = json.loads(json.dumps(batches.get_state()))
    write_index(uri)
    batches = loader.train_loader(**options)
    batches.set_state(state)
    np.testing.assert_array_equal([next(batches)["image"] for _ in range(4)], whole[3:])


def counting(monkeypatch):
    """The shards that are read from now on."""
    read, real = [], tar_columns.read_shard
    monkeypatch.setattr(tar_columns, "read_shard", lambda path: (read.append(os.path.basename(path)), real(path))[1])
    return read


def test_a_killed_index_continues_where_it_was(tmp_path, monkeypatch):
    uri = write_all(tmp_path)
    expected, read, done = told(open_source(uri)), counting(monkeypatch), []

    def killed(count):
        done.append(count)
        if sum(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_index(uri, progress=killed)
    folder = tmp_path / tar_index.FOLDER
    parts = sorted((folder / tar_index.PARTS).iterdir())
    assert len(parts) == len(read) == 3 and not open_source(uri).generation
    parts[0].write_bytes(parts[0].read_bytes()[:-30])  # a power cut
    read.clear()
    write_index(uri, progress=done.append)
    assert len(read) == 6 and sum(done) == 3 + 8 and told(open_source(uri)) == expected
    assert {path.suffix[1:] for path in folder.iterdir()} == {*tar_index.DTYPES, "json"} and len(
        list(folder.iterdir())
    ) == 5
    read.clear()
    generation = open_source(uri).generation
    write_index(uri)
    assert read == [] and open_source(uri).generation == generation


def test_a_changed_shard_is_told_once_and_read_anew(tmp_path, monkeypatch, caplog):
    uri = write_all(tmp_path)
    write_index(uri)
    source = open_source(uri)
    write(tmp_path / "0.tar", *plain(60))
    (tmp_path / "2.tar").unlink()
    with caplog.at_level(logging.WARNING):
        for i in range(2):
            with pytest.raises(BadExample, match="the shard has changed since its index was written"):
                source[i]
    (line,) = [record.getMessage() for record in caplog.records if "end mark" not in record.getMessage()]
    assert f"0.tar has changed since its index was written; write it by: vlm-jax index '{uri}'" in line
    with pytest.raises(BadExample, match=r"2\.tar: No such file"):
        source[next(i for i in range(len(source)) if source.key(i).startswith("2.tar"))]
    with pytest.raises(UserError, match=r"shard `.*2\.tar` is missing"):
        write_index(uri)
    write(tmp_path / "2.tar", *plain(70))
    read = counting(monkeypatch)
    write_index(uri)
    again = open_source(uri)
    assert read == ["0.tar", "2.tar"] and again[0]["txt"] == "60"
    with pytest.raises(UserError, match="has been written anew since it was opened"):  # by a worker that starts late
        pickle.loads(pickle.dumps(source))
    (tmp_path / tar_index.FOLDER).rename(tmp_path / "away")
    assert told(open_source(uri)) == told(again)


def test_a_broken_shard_is_reported_and_refused(tmp_path, monkeypatch):
    uri = write_all(tmp_path)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:-12000])
    with pytest.raises(UserError) as scanned:
        open_source(uri)
    report = write_index(uri)
    assert report["shards"] == 7 and report["broken"] == {"1.tar": str(scanned.value)}
    assert f"  {scanned.value}" in index.text(report)
    with pytest.raises(UserError, match=r"1\.tar` is cut short.*; write it by: vlm-jax index"):
        open_source(uri)
    assert len(open_source(f"wds:{tmp_path}/{{0,2}}.tar")) == 7
    (tmp_path / "1.tar").write_bytes(whole)
    read = counting(monkeypatch)
    assert write_index(uri)["broken"] == {} and read == ["1.tar"]
    assert open_source(uri).generation


def test_shards_of_an_index_that_are_added(tmp_path, caplog):
    uri = write_all(tmp_path)
    write_index(f"wds:{tmp_path}/{{0..2}}.tar")
    with caplog.at_level(logging.WARNING):
        scanned = open_source(uri)
    assert not scanned.generation and "lacks shard" in caplog.text
    write_index(f"wds:{tmp_path}/{{3..7}}.tar")
    assert open_source(uri).generation  # unchanged shards of the index have stayed
    with pytest.raises(UserError, match=r"lacks shard `.*8\.tar`"):
        write(tmp_path / "8.tar", *plain(80))
        open_source(f"wds:{tmp_path}/*.tar?index={tmp_path / tar_index.FOLDER}")


def test_a_large_set_needs_an_index(tmp_path, monkeypatch):
    uri = write_all(tmp_path)
    for name, value in (("SCANNED_SHARDS", 7), ("SCANNED_BYTES", 10**5)):
        with monkeypatch.context() as limits:
            limits.setattr(tar_shards, name, value)
            with pytest.raises(UserError, match=r"has 8 shards of 0 GB and no index.*write it by: vlm-jax index 'wds:"):
                open_source(uri)
            write_index(uri)
            assert open_source(uri).generation
            shutil.rmtree(tmp_path / tar_index.FOLDER)
    with pytest.raises(UserError, match="there is no index `/nowhere`; write it by: vlm-jax index"):
        open_source(f"{uri}?index=/nowhere")


@pytest.mark.parametrize("damage", ["{", "[]", '{"version": 2}', '{"version": 1}', "generation", "shards", "members"])
def test_a_damaged_index_is_refused_and_written_anew(tmp_path, damage):
    uri = write_all(tmp_path)
    write_index(uri)
    folder = tmp_path / tar_index.FOLDER
    if damage == "generation":
        (folder / "index.json").write_text(
            (folder / "index.json").read_text().replace('"generation": "', '"generation": "x')
        )
    elif damage in tar_index.DTYPES:
        (path,) = folder.glob(f"*.{damage}")
        path.write_bytes(path.read_bytes()[:-12])
    else:
        (folder / "index.json").write_text(damage)
    with pytest.raises(UserError, match=r"index"):
        open_source(uri)
    write_index(uri)
    assert open_source(uri).generation


@pytest.mark.parametrize("uri", [f"wds:/{'n' * 300}.tar", f"wds:/nowhere.tar?index={'n' * 300}"])
def test_names_that_no_disk_takes_are_refused(uri):
    with pytest.raises(UserError) as error:
        open_source(uri)
    assert "nnn" in str(error.value) or "nowhere" in str(error.value)


def test_the_command_writes_in_parallel(tmp_path):
    uri, out = write_all(tmp_path / "data"), tmp_path / "index"
    values = commands.flags.FlagValues()
    commands.define("index", values)
    from vlm_jax.index.__main__ import main

    argv = command.parse("index", ["index", uri, f"--out={out}", "--workers=2"], values)
    answer = main(argv, values)
    assert answer.status == 0 and answer.results == write_index(uri) | {"out": str(out)}
    assert "shards: 8, 2 of them empty" in answer.text
    assert told(open_source(f"{uri}?index={out}")) == told(open_source(uri))
    with pytest.raises(UserError, match="`csv:a` has no index"):
        index.place("csv:a")
    values.out, values.to = None, "arrayrecord"
    with pytest.raises(UserError, match="--to=arrayrecord needs --out"):
        main(argv, values)


def test_copies_in_array_records_are_the_same_examples(tmp_path, monkeypatch):
    uri, out = write_all(tmp_path / "data"), tmp_path / "copies"
    source, place = open_source(uri), index.place(uri)
    assert index.copy(place, str(out)) == {"out": str(out), "shards": 8, "broken": {}}
    copies = open_source(f"arrayrecord:{out}/{{0..7}}.array_record")
    assert told(copies)[0] == told(source)[0] == told(pickle.loads(pickle.dumps(copies)))[0]
    before = {path: path.stat().st_ino for path in out.iterdir()}
    whole = (tmp_path / "data" / "1.tar").read_bytes()
    (tmp_path / "data" / "1.tar").write_bytes(whole[:-12000])
    write(tmp_path / "data" / "0.tar", *plain(90))
    found = index.copy(place, str(out))
    assert list(found["broken"]) == ["1.tar"] and "broken shards, left out: 1" in index.text(found)
    assert [path.name for path in sorted(out.iterdir()) if path.stat().st_ino != before[path]] == ["0.array_record"]
    assert open_source(f"arrayrecord:{out}/0.array_record")[0]["txt"] == "90"
    (out / "2.array_record").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match=r"arrayrecord:.* cannot be read"):
        open_source(f"arrayrecord:{out}/2.array_record")
