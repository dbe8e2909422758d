"""The kinds of data for `fuzz_kinds`: what sources read."""

import functools
import io
import json
import shutil
import tarfile

import numpy as np

from tests.support.pictures import write_pictures
from tests.support.records import encode, picture
from vlm_jax import index
from vlm_jax.data import emoji, loader
from vlm_jax.data import index as index_files
from vlm_jax.data.files import write_json
from vlm_jax.data.sources import tar_index
from vlm_jax.data.sources.precomputed import shard_names, write_shard


def read_source(uri: str, split: str | None = None, prepared: str = "decode | resize(8) | normalize") -> None:
    """Reads the first batches of a data set by the loader, which counts what is bad."""
    batches = loader.eval_batches(uri=uri, split=split, ops=f"{prepared} | keep('image')", batch_size=4)
    for number in range(min(len(batches), 2)):
        batches[number]


def pictures(folder):
    write_pictures(folder, 3)
    return "data.jsonl"


def of_csv(folder):
    write_pictures(folder, 3)
    (folder / "data.csv").write_text('image,text,label\n0.jpg,"a, b",1\n1.jpg,c,2\n2.jpg,"d\ne",3\n')
    return "data.csv"


def of_folder(folder, format="PNG"):
    (folder / "train" / "cat").mkdir(parents=True)
    name = f"train/cat/a.{format.lower()}"
    (folder / name).write_bytes(encode(picture(12, 16), format))
    return name


def of_tar(folder):
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("x/1.png", encode(picture(6, 6))), ("x/1.txt", b"one"), ("2.png", encode(picture(6, 6)))):
            info = tarfile.TarInfo(name if name != "2.png" else f"{'é' * 60}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return "a.tar"


def of_shards(folder, damage="index.json"):
    of_tar(folder)
    index.write(index.place(f"wds:{folder}/a.tar"))
    return str(next((folder / tar_index.FOLDER).glob(f"*{damage}")).relative_to(folder))


def read_shards(folder):
    """Reads by an index, and writes what it lacks."""
    uri = f"wds:{folder}/a.tar"
    try:
        read_source(uri)
    finally:
        shutil.copy(folder / "a.tar", folder / "b.tar")
        index.write(index.place(f"wds:{folder}/{{a,b}}.tar"))


def of_array_record(folder):
    of_tar(folder)
    index.copy(index.place(f"wds:{folder}/a.tar"), str(folder))
    return "a.array_record"


def of_precomputed(folder, damage="index.json"):
    write_pictures(folder, 3)
    index = dict(uri=f"jsonl:{folder.parent}/damaged/data.jsonl", split=None, records=3, shard_size=4, model={})
    write_json(folder / "index.json", index)
    (name,) = shard_names(3, 4)
    write_shard(folder / name, [np.ones(5), None, np.ones(5)])
    return name if damage == "shard" else damage


def of_tfds(folder, damage="dataset_info.json"):
    shutil.copytree(emoji.PREPARED, folder, dirs_exist_ok=True)
    for path in folder.glob("*.array_record*"):
        if "near_style" not in path.name:
            path.unlink()
    for name in ("SHA256SUMS", "concepts.json", "report.json"):
        (folder / name).unlink(missing_ok=True)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "near_style"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return next(path.name for path in folder.glob("*.array_record*")) if damage == "shard" else damage


def of_index(folder):
    np.savez(folder / "index.npz", index=np.arange(5), weight=np.ones(5))
    return "index.npz"


def index_of(folder):
    index_files.read(str(folder / "index.npz"), 5, "jsonl:x")


KINDS = {
    "jsonl": (pictures, lambda folder: read_source(f"jsonl:{folder}/data.jsonl")),
    "csv": (of_csv, lambda folder: read_source(f"csv:{folder}/data.csv")),
    "png": (of_folder, lambda folder: read_source(f"folder:{folder}", "train")),
    "jpeg": (lambda folder: of_folder(folder, "JPEG"), lambda folder: read_source(f"folder:{folder}", "train")),
    "tar": (of_tar, lambda folder: read_source(f"wds:{folder}/a.tar")),
    **{
        f"shards_{damage}": (functools.partial(of_shards, damage=damage), read_shards)
        for damage in ("index.json", "shards", "bounds", "members")
    },
    "array_record": (of_array_record, lambda folder: read_source(f"arrayrecord:{folder}/a.array_record")),
    "precomputed_index": (of_precomputed, lambda folder: read_source(f"precomputed:{folder}", prepared="flip(0.0)")),
    "precomputed_shard": (
        lambda folder: of_precomputed(folder, "shard"),
        lambda folder: read_source(f"precomputed:{folder}", prepared="flip(0.0)"),
    ),
    "tfds_info": (of_tfds, lambda folder: read_source(f"tfds:{folder}", "near_style")),
    "tfds_features": (
        lambda folder: of_tfds(folder, "features.json"),
        lambda folder: read_source(f"tfds:{folder}", "near_style"),
    ),
    "tfds_shard": (
        lambda folder: of_tfds(folder, "shard"),
        lambda folder: read_source(f"tfds:{folder}", "near_style"),
    ),
    "index": (of_index, index_of),
}
