"""The index of a `wds:` data set, written in parallel and continued after a kill; its report; copies of the shards."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data import storage
from vlm_jax.data.sources import array_records, index_copy, tar_columns, tar_index, tar_shards
from vlm_jax.errors import UserError


class Place(NamedTuple):
    """Shards and where their index goes: names in the index, what stands before them in paths, the folder.

    Attributes:
      published: the folder in a store that the index is copied to from `folder`, None if it is none.
    """

    uri: str
    names: list[str]
    base: str
    folder: str
    published: str | None = None


def place(uri: str, out: str | None = None) -> Place:
    """Returns the shards that a URI names and the folder of their index: `out`, its `?index=`, or beside the shards.

    Raises:
      UserError: the URI is not of `wds:`, or a shard is missing.
    """
    scheme, _, pattern = uri.partition(":")
    if scheme != "wds" or not pattern:
        raise UserError(f"`{uri}` has no index; expected tar shards, 'wds:/path/{{00000..00009}}.tar'")
    paths, base, folder, _ = tar_shards.located(os.path.expanduser(pattern))
    folder = out or folder
    tar_shards.check_there(uri, paths)
    names = [path[len(base) :] for path in paths]
    if not storage.is_remote(folder):
        return Place(uri, names, base, folder)
    return Place(uri, names, base, str(index_copy.place(folder)), folder)


def write(to: Place, workers: int = 1, progress: Callable[[int], Any] = lambda count: None) -> dict[str, Any]:
    """Writes what the index lacks and returns what it says of the shards, JSON-able; see `tar_index.build`."""
    if to.published:
        index_copy.check_writable(to.published)
        index_copy.fetched(to.published)
    index = tar_index.build(to.base, to.names, to.folder, workers, progress)
    if to.published:
        index_copy.publish(to.published)
    return {"out": to.published or to.folder, **report(index, to.names)}


def copy(of: Place, out: str, workers: int = 1, progress: Callable[[int], Any] = lambda count: None) -> dict[str, Any]:
    """Writes an ArrayRecord file for each shard into a folder; returns counts and broken shards, JSON-able.

    A copy that is as old as its shard is not written again.
    """
    copies = {name: os.path.join(out, os.path.splitext(name)[0] + array_records.SUFFIX) for name in of.names}
    for folder in {os.path.dirname(path) for path in copies.values()}:
        os.makedirs(folder, exist_ok=True)
    todo = [name for name, path in copies.items() if not array_records.copied(of.base + name, path)]
    progress(len(of.names) - len(todo))
    broken = {}
    with tar_index.processes(min(workers, len(todo))) as each:
        mistakes = each(array_records.copy, [of.base + name for name in todo], [copies[name] for name in todo])
        for name, mistake in zip(todo, mistakes, strict=True):
            progress(1)
            if mistake:
                broken[name] = mistake
    return {"out": out, "shards": len(copies) - len(broken), "broken": broken}


def report(index: tar_index.Index, names: list[str]) -> dict[str, Any]:
    """Returns counts over shards by name: records, members by extension, repeated keys, what is left out or broken."""
    rows = [index.numbers[name] for name in dict.fromkeys(names) if name in index.numbers]
    shards, first = index.columns.shards[rows], tar_columns.starts(index.columns.shards)
    members = np.zeros(len(index.columns.extensions), np.int64)
    for row in rows:
        used = tar_columns.shard(index.columns, row, first).members[:, 0]
        members += np.bincount(used, minlength=len(members))
    total = {name: int(shards[name].sum()) for name in ("records", "no_record", "others", "again", "differing")}
    extensions = dict(zip(index.columns.extensions, members.tolist(), strict=True))
    return {
        "shards": len(rows),
        "records": total["records"],
        "members": int(members.sum()),
        "extensions": {name: count for name, count in sorted(extensions.items(), key=lambda one: -one[1]) if count},
        "empty": int((shards["records"] == 0).sum()),
        "left_out": {tar_columns.NO_RECORD: total["no_record"], tar_columns.OTHERS: total["others"]},
        "repeated_keys": total["again"],
        "bad_records": total["differing"],
        "broken": {name: index.broken[name] for name in names if name in index.broken},
    }


MOST = 20  # extensions, and broken shards, that the text shows


def text(found: Mapping[str, Any]) -> str:
    """Returns a report, or what `copy` returned, as lines."""
    extensions = [f"{count:,} .{name}" for name, count in found.get("extensions", {}).items()]
    left_out = [f"{count:,} {what}" for what, count in found.get("left_out", {}).items() if count]
    facts = {
        "shards": f"{found['shards']:,}" + (f", {found['empty']:,} of them empty" if found.get("empty") else ""),
        "records": f"{found['records']:,}" if "records" in found else "",
        "members": f"{found['members']:,} ({', '.join(_cut(extensions, 'extensions'))})" if "members" in found else "",
        "left out": ", ".join(left_out),
        "keys that come again in their shard": f"{found['repeated_keys']:,}" if found.get("repeated_keys") else "",
        "bad records, since other members have their key": f"{found['bad_records']:,}"
        if found.get("bad_records")
        else "",
        "broken shards, left out": f"{len(found['broken']):,}" if found["broken"] else "",
    }
    lines = [f"{name}: {fact}" for name, fact in facts.items() if fact]
    return "\n".join([*lines, *(f"  {why}" for why in _cut([*found["broken"].values()], "broken shards"))])


def _cut(lines: list[str], of: str) -> list[str]:
    return [*lines[:MOST], *([f"{len(lines) - MOST:,} more {of}"] if len(lines) > MOST else [])]
