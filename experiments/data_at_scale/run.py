"""Times the index of tar shards: writing, opening up to 400 million entries, training from it. See README.md here."""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments import study

RATE, OPEN_SECONDS, OPEN_MB, START_SECONDS = 200_000, 5, 300, 20  # wanted
RECORDS = 3_216  # of a shard, of three members each: 41,456 shards have 400 million entries
SHARDS = (1, 10, 104, 1_037, 10_364, 41_456)
READS, REPEATS = 10_000, 5
KINDS = {  # members of a shard, as written by: format, modification time, bytes of the picture
    "small pictures": (tarfile.USTAR_FORMAT, 1, 1_000),
    "pictures of 25 kB": (tarfile.USTAR_FORMAT, 1, 25_000),
    "pictures of 25 kB, a pax header each": (tarfile.PAX_FORMAT, 1.5, 25_000),
}


def write_shard(path, format=tarfile.USTAR_FORMAT, mtime=1, picture=None, records=RECORDS):
    """Writes img2dataset's layout: jpg, txt and json of each record; `picture` is that of all."""
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(records):
            caption = f"picture {i} of a thing on a table"
            texts = (("txt", caption.encode()), ("json", json.dumps(dict(caption=caption, width=i)).encode()))
            for extension, data in (("jpg", picture), *texts):
                entry = tarfile.TarInfo(f"{i:09d}.{extension}")
                entry.size, entry.mtime = len(data), mtime
                tar.addfile(entry, io.BytesIO(data))


def indexing(format, mtime, size, repeats=REPEATS):
    """Returns members a second of CPU time, by one process: reading headers, writing and merging; the median."""
    from vlm_jax import index

    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            write_shard(f"{folder}/{shard}.tar", format, mtime, np.random.default_rng(0).bytes(size))
        for repeat in range(repeats):
            place = index.place(f"wds:{folder}/{{0..3}}.tar", f"{folder}/index{repeat}")
            start = time.process_time()
            found = index.write(place)
            rates.append(found["members"] / (time.process_time() - start))
    return float(np.median(rates))


def write_set(folder, shards):
    """Writes a data set of `shards` names of one file, and its index, which repeats the columns of that file."""
    from PIL import Image

    from vlm_jax.data.sources import tar_index

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
    write_shard(folder / "shard.tar", picture=buffer.getvalue())
    names = [f"{shard:05d}.tar" for shard in range(shards)]
    for name in names:
        os.link(folder / "shard.tar", folder / name)
    index, part = folder / tar_index.FOLDER, folder / "part.npz"
    index.mkdir()
    assert tar_index.write_part(str(folder / "shard.tar"), part) is None
    tar_index.merge(index, None, [], dict.fromkeys(names, part), {})
    size = sum(path.stat().st_size for path in index.iterdir())
    return f"wds:{folder}/{{00000..{shards - 1:05d}}}.tar", size


def memory(of):
    """Returns a MB count of this process: "VmRSS" is resident, "VmHWM" its peak, "RssAnon" what no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[of].split()[0]) / 1024


def opening(uri):
    """Opens a set and reads records at random; in a process of its own."""
    from vlm_jax.data.sources import open_source

    before = memory("VmRSS")
    start = time.perf_counter()
    source = open_source(uri)
    seconds, opened = time.perf_counter() - start, memory("VmRSS")
    start = time.perf_counter()
    for i in np.random.default_rng(0).integers(0, len(source), READS).tolist():
        assert source[i]["txt"] == f"picture {i % RECORDS} of a thing on a table"
    found = dict(seconds=seconds, read_us=1e6 * (time.perf_counter() - start) / READS, records=len(source))
    return found | dict(before=before, opened=opened, peak=memory("VmHWM"), own=memory("RssAnon"))


def training(uri, began):
    """Returns the seconds from the start of this process to the first batch, and to the end of the first step."""
    from configs import clip
    from vlm_jax import config
    from vlm_jax.data import loader
    from vlm_jax.train import train

    settings, came = config.plain(clip.get_config("smoke")), []
    ops = f"{settings['preprocess']} | caption('txt') | {settings['tokenize']} | keep('image', 'token_ids')"
    settings |= dict(data=dict(uri=uri, ops=ops, workers=2), evals={}, duration="1 steps")
    settings["objective"]["targets"] = "identity"
    settings["optimizer"]["schedule"]["warmup"] = "0 steps"
    following = loader.Loader.__next__

    def timed(batches):
        batch = following(batches)
        came.append(time.time() - began)
        return batch

    loader.Loader.__next__ = timed
    with tempfile.TemporaryDirectory() as workdir:
        train(settings, Path(workdir, "run"))
    return dict(first_batch=came[0], end=time.time() - began)


def child(*arguments):
    """Returns what a function of this module gives in a new process."""
    command = [sys.executable, "-m", "experiments.data_at_scale.run", "--child", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(results):
    rates = [[name, f"{rate:,.0f}", f"{rate / RATE:.2f}"] for name, rate in results["indexing"].items()]
    rows = []
    for one in results["opening"]:
        size = f"{one['shards']:,}", f"{3 * one['records']:,}", f"{one['index_bytes'] / 1e6:,.1f}"
        whole = (f"{one[key]:.0f}" for key in ("before", "opened", "peak", "own", "read_us"))
        rows.append([*size, f"{one['seconds']:.2f}", *whole])
    head = "shards", "entries", "index, MB", "opens in, s", "MB before", "MB open", "MB at most in 10,000 reads"
    steps = [[name, f"{one['first_batch']:.1f}", f"{one['end']:.1f}"] for name, one in results["training"].items()]
    return "\n\n".join(
        [
            study.markdown(["shards of", "members a second of one core", f"of {RATE:,}"], rates),
            study.markdown([*head, "MB that no file backs", "a read, µs"], rows),
            study.markdown(["shards", "first batch after, s", "end of a run of one step after, s"], steps),
        ]
    )


def plot(results):
    figure, axes = study.subplots(1, 2, size=(8, 3))
    entries = [3 * one["records"] for one in results["opening"]]
    for ax, values, bar, label in (
        (axes[0], [one["seconds"] for one in results["opening"]], OPEN_SECONDS, "seconds until the index is open"),
        (axes[1], [one["opened"] for one in results["opening"]], OPEN_MB, "resident MB"),
    ):
        ax.plot(entries, values, **study.DOT | dict(linestyle="-"))
        ax.axhline(bar, color=study.INK, linestyle="--", linewidth=1)
        ax.set_xscale("log")
        ax.set_ylim(0, 1.1 * bar)
        ax.set_xlabel("entries")
        ax.set_ylabel(label)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="of the synthetic sets, 8 GB at a time (a temporary one)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, uri, *began = options.child
        found = opening(uri) if what == "opening" else training(uri, float(*began))
        return print(f"\n{json.dumps(found)}")
    results = study.read("data_at_scale", {}) | {"machine": study.machine("numpy")}
    results["indexing"] = {name: indexing(*kind) for name, kind in KINDS.items()}
    results |= {"opening": [], "training": {}}
    for shards in SHARDS:
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            uri, size = write_set(folder, shards)
            results["opening"].append(dict(shards=shards, index_bytes=size, **child("opening", uri)))
            if shards in (SHARDS[0], SHARDS[-1]):
                results["training"][f"{shards:,}"] = child("training", uri, time.time())
        finally:
            shutil.rmtree(folder)
    study.save("data_at_scale", results)
    study.publish("data_at_scale", table, plot)


if __name__ == "__main__":
    main()
