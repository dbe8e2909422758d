"""Writes the index of tar shards, by which runs on millions of pictures start in seconds.

    vlm-jax index 'wds:data/laion/{00000..41455}.tar'
    vlm-jax index 'wds:data/laion/{00000..41455}.tar' --out=indexes/laion --workers=16
    vlm-jax index 'wds:data/laion/{00000..41455}.tar' --to=arrayrecord --out=data/records

Runs find the index beside the shards; for another folder, the URI ends with `?index=FOLDER`. After an interruption the
same command continues; later it reads new and changed shards alone. It tells which shards are broken (exit status 2),
which keys come again, and how many members each extension has. With --to=arrayrecord the command copies the shards
instead, one file each, for `arrayrecord:data/records/*.array_record`.
"""

import os
from collections.abc import Sequence
from functools import partial

from absl import flags

from vlm_jax import command, index
from vlm_jax.data import storage
from vlm_jax.errors import UserError
from vlm_jax.run import folder


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    if len(argv) != 2:
        raise UserError("index needs the data set, 'wds:/path/{00000..00009}.tar'; vlm-jax index --help has an example")
    if values.to not in (None, "arrayrecord"):
        raise UserError(f"--to={values.to}: expected arrayrecord, or nothing for an index")
    if values.to and not values.out:
        raise UserError("--to=arrayrecord needs --out, the folder of the copies")
    if values.to and storage.is_remote(values.out):
        raise UserError(f"--out={values.out}: ArrayRecord files are written to disk; name a folder there, then copy it")
    of, workers = index.place(argv[1], values.out), values.workers or os.cpu_count() or 1
    with (
        folder.locked(of.folder, together=False),
        command.doing("copying" if values.to else "reading headers"),
        command.bar(total=len(of.names), desc=values.to or "index", unit="shard") as bar,
    ):
        write = partial(index.copy, of, of.folder) if values.to else partial(index.write, of)
        found = write(workers, bar.update)
    where = f"arrayrecord:{found['out']}/*.array_record" if values.to else f"index: {found['out']}"
    return command.Answer(found, f"{index.text(found)}\n{where}", status=2 if found["broken"] else 0)


if __name__ == "__main__":
    command.run("index", main)
