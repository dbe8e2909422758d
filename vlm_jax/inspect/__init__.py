"""What a data set holds: its fields, the sizes of its pictures, what would be bad, and some examples."""

import base64
import collections
import html
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax import command
from vlm_jax.data import ops
from vlm_jax.data.examples import Examples
from vlm_jax.data.files import replacing
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

SAMPLE = 1000  # records that are looked at
SHOWN = 10
LONGEST = 200  # characters of a value
NAMES = 32  # fields of one dict
HEAD = ("field", "records", "kind", "such as")
SIDE = 160  # pixels of a picture on the page


def inspect(
    uri: str, split: str | None = None, sample: int = SAMPLE, progress: Callable[[int], Any] = lambda count: None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns what a data set holds, JSON-able, and some of its examples with decoded pictures.

    Args:
      uri, split: the data set, as for `sources.open_source`.
      sample: number of records that are looked at, evenly spaced over the set.
      progress: is called with the number of records that were read since the last call.

    Raises:
      UserError: the data set cannot be opened, or is empty.
    """
    source = open_source(uri, split)
    if not len(source):
        raise UserError(f"data set `{uri}` has no records")
    numbers = np.unique(np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int))
    pictures, plain = (Examples(source, ops.parse(string), None, 0) for string in ("decode", ""))
    fields, bad, sizes, shown = collections.defaultdict(dict), {}, [], []
    for i in numbers.tolist():
        progress(1)
        try:
            example = plain.read(i, 0)
            if "image" in example:
                example = pictures.read(i, 0)
                sizes.append(example["image"].shape[1::-1])
        except BadExample as error:
            record = plain.bad_record(i, error)
            bad.setdefault(record.reason, []).append(record.key)
            continue
        for path, value in leaves(example):
            fields[path][i] = value
        if len(shown) < SHOWN:
            shown.append({"key": source.key(i), **example})
    return {
        "records": len(source),
        "read": len(numbers),
        "left_out": dict(source.left_out),
        "bad": {reason: {"records": len(keys), "first": keys[0]} for reason, keys in bad.items()},
        "pictures": _sizes(sizes),
        "fields": {path: _about(list(of.values())) for path, of in sorted(_joined(fields).items())},
    }, shown


def leaves(example: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of a nested example, paths joined by `/` as ops name them."""
    for name, value in example.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _joined(fields: Mapping[str, dict[int, Any]]) -> Mapping[str, dict[int, Any]]:
    """Fields whose names are data themselves, `counts/fox`, `counts/owl`, ..., as one, `counts/*`."""
    within = collections.Counter(path.rpartition("/")[0] for path in fields)
    joined = collections.defaultdict(dict)
    for path, values in fields.items():
        parent = path.rpartition("/")[0]
        joined[f"{parent}/*" if parent and within[parent] > NAMES else path] |= values
    return joined


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, list[int]] | None:
    """Smallest, median and largest width and height, in pixels."""
    if not sizes:
        return None
    quantiles = np.percentile(sizes, (0, 50, 100), axis=0, method="nearest").astype(int)
    return dict(zip(("width", "height"), quantiles.T.tolist(), strict=True))


def _about(values: list[Any]) -> dict[str, Any]:
    full = [value for value in values if not isinstance(value, list | tuple) or len(value)] or values
    kinds = dict.fromkeys(map(kind, full))
    return {"records": len(values), "kind": " or ".join(kinds), "example": text_of(full[0])}


def kind(value: Any) -> str:
    """Returns what a field's value is, in words: "text", "3 texts", "uint8 [4, 4, 3]"."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        inner = next((one for one in value if not isinstance(one, list | tuple) or len(one)), None)
        return "list" if inner is None else f"list of {kind(inner)}"
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{value.dtype} [{', '.join('*' * value.ndim)}]"
    return {bool: "truth value", int: "whole number", float: "number", bytes: "bytes"}.get(
        type(value), type(value).__name__
    )


def text_of(value: Any) -> str:
    """Returns a value as one short line."""
    if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.size > 16):
        return f"{getattr(value, 'nbytes', None) or len(value):,} bytes"
    line = " ".join(str(value.tolist() if isinstance(value, np.ndarray) else value).split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def text(found: Mapping[str, Any]) -> str:
    """Returns the first result of `inspect` as text."""
    return f"{_facts(found)}\n\n{command.table([HEAD, *_fields(found)], left=4)}"


def _facts(found: Mapping[str, Any]) -> str:
    facts = [("records", f"{found['records']:,}"), ("looked at", f"{found['read']:,}")]
    spread = lambda low, middle, high: f"{low} to {high} px, median {middle}"
    facts += [(f"{side} of pictures", spread(*sizes)) for side, sizes in (found["pictures"] or {}).items()]
    facts += [(f"left out: {what}", f"{count:,}") for what, count in found["left_out"].items()]
    facts += [(f"bad: {why}", f"{one['records']:,}, such as {one['first']}") for why, one in found["bad"].items()]
    return command.table(facts, left=2)


def _fields(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(path, f"{one['records']:,}", one["kind"], one["example"]) for path, one in found["fields"].items()]


def page(uri: str, found: Mapping[str, Any], shown: list[dict[str, Any]], out: str | pathlib.Path) -> pathlib.Path:
    """Writes what `inspect` found as one HTML file, with pictures, and returns its path."""
    from vlm_jax.report.document import document, table

    safe = lambda cells: [html.escape(cell) for cell in cells]
    examples = []
    for example in shown:
        picture = _picture(example["image"]) if "image" in example else ""
        lines = ((path, text_of(value)) for path, value in leaves(example) if path not in ("key", "image"))
        facts = "<br>".join(f"<b>{html.escape(path)}</b> {html.escape(line)}" for path, line in lines)
        examples.append([picture, f"<small>{html.escape(example['key'])}</small>{facts}"])
    out = pathlib.Path(out).expanduser().absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = [
        f"<pre>{html.escape(_facts(found))}</pre>",
        f"<h2>Examples</h2>\n{table([], examples, text=[1])}",
        f"<h2>Fields</h2>\n{table(HEAD, map(safe, _fields(found)), text=[2, 3])}",
    ]
    with replacing(out) as file:
        file.write(document(uri, sections).encode())
    return out


def _picture(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    image.save(written, "png")
    return f'<img src="data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}" alt="">'
