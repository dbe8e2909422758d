"""Remakes the embedded data set from npm tarballs: the same bytes every time.

    vlm-jax data.emoji.build --tarballs=runs/tarballs --out=runs/emoji

fetches missing tarballs with `npm pack`, checks every sha256, renders with resvg_py (extra `emoji`) and writes

    *.array_record-*, dataset_info.json, features.json    what tfds.builder_from_directory reads
    concepts.json    id, hexcode, group, subgroup, held_out and names of every concept
    alpha.npz        the pictures' transparency, see alpha.py
    report.json      pictures by split and style; pictures left out, each with its reason; icons that show no concept
    SHA256SUMS       of the above
"""

from __future__ import annotations

import collections
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from vlm_jax import command
from vlm_jax.data.emoji import PREPARED, alpha, packs, splits
from vlm_jax.errors import UserError


def fetch(directory: Path, tarballs: tuple[packs.Tarball, ...]) -> None:
    """Fetches the tarballs that the directory lacks, with `npm pack`."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [f"{t.package}@{t.version}" for t in tarballs if not (directory / t.filename).is_file()]
    if not missing:
        return
    if shutil.which("npm") is None:
        raise UserError(f"{directory} lacks {', '.join(missing)} and npm is not installed; fetch them with `npm pack`")
    with command.doing(f"npm pack of {len(missing)} packages"):
        done = subprocess.run(["npm", "pack", *missing], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("npm error")][:2]
        raise UserError(f"`npm pack {' '.join(missing)}` failed: {'; '.join(reasons)}; is the registry reachable?")


def repack(path: Path) -> None:
    """Rewrites an ArrayRecord file: a fifth smaller, and with the same bytes in every run.

    TFDS leaves the order of a record's fields to protobuf's hash table, which differs from run to run.
    """
    from array_record.python import array_record_module
    from tensorflow_datasets.proto import tf_example_pb2

    reader = array_record_module.ArrayRecordReader(str(path))
    records = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,transpose:true,brotli:11")
    for record in records:
        writer.write(record.SerializeToString(deterministic=True))
    writer.close()


def write_json(path: Path, value) -> None:
    """Writes one line per element of a top-level list or dict, so that diffs show changes."""
    dump = lambda x: json.dumps(x, ensure_ascii=False, separators=(",", ":"))
    if isinstance(value, list):
        text = "[\n" + ",\n".join(map(dump, value)) + "\n]\n"
    else:
        text = "{\n" + ",\n".join(f"{dump(k)}:{dump(v)}" for k, v in value.items()) + "\n}\n"
    path.write_text(text, encoding="utf-8")


def build(tarballs: Path, out: Path, *, words=packs.WORDS, pack_tarballs=packs.PACKS) -> None:
    """Writes the prepared files into `out`, and replaces older ones."""
    import tensorflow_datasets as tfds

    from vlm_jax.data.emoji import builder as builder_lib

    tarballs, out, pack_tarballs = Path(tarballs).resolve(), Path(out), tuple(pack_tarballs)
    if out.exists() and any(out.iterdir()) and not (out / "dataset_info.json").is_file():
        raise UserError(f"{out} holds other files than a prepared data set; name an empty or a new folder")
    with command.doing("drawing the pictures"):
        collected = builder_lib.collect(tarballs, words, pack_tarballs)
    with tempfile.TemporaryDirectory() as data_dir:
        builder = builder_lib.Emoji(words=words, pack_tarballs=pack_tarballs, data_dir=data_dir)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=tarballs))
        if out.exists():
            shutil.rmtree(out)
        shutil.copytree(builder.data_dir, out)
    (out / "LICENSE").unlink()  # TFDS writes one line; the NOTICE beside the code has all licences
    with command.doing("packing"):
        for path in sorted(out.glob("*.array_record-*")):
            repack(path)
    write_json(
        out / "concepts.json",
        [
            {
                "id": c.id,
                "hexcode": c.hexcode,
                "group": c.group,
                "subgroup": c.subgroup,
                "held_out": c.hexcode in collected.held_out,
                "names": c.names,
            }
            for c in collected.concepts
        ],
    )
    held_out = lambda picture: picture.concept.hexcode in collected.held_out
    alpha.write(out / alpha.FILE, ((p.style, p.concept.id, held_out(p), p.alpha) for p in collected.pictures))
    write_json(out / "report.json", report(collected))
    files = sorted(path for path in out.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (out / "SHA256SUMS").write_text(sums)


def report(collected) -> dict:
    """Returns counts and every picture left out, for the NOTICE and the tests."""
    pictures = collections.defaultdict(collections.Counter)
    for picture in collected.pictures:
        split = splits.split_of(picture.style, picture.concept.hexcode in collected.held_out)
        pictures[split][picture.style] += 1
    left_out = collections.defaultdict(list)
    for picture, reason in collected.left_out:
        left_out[reason].append([picture.style, picture.concept.id, picture.icon])
    return {
        "pictures": {split: dict(sorted(pictures[split].items())) for split in splits.SPLITS},
        "unmatched_icons": collected.unmatched,
        "left_out": dict(sorted(left_out.items())),
    }


def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer:
    tarballs, out = Path(values.tarballs), Path(values.out or PREPARED)
    fetch(tarballs, (packs.WORDS, *packs.PACKS))
    build(tarballs, out)
    found = json.loads((out / "report.json").read_text())
    rows = [[split, f"{sum(by_style.values()):,}"] for split, by_style in found["pictures"].items()]
    return command.Answer({"out": str(out), **found}, f"{command.table(rows)}\nwritten to {out}")


if __name__ == "__main__":
    command.run("data.emoji.build", main)
