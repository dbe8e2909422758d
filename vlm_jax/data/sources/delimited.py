"""Rows of text separated by commas, tabs, semicolons or bars, with any quotation marks.

A cell that begins with a quotation mark ends at the next one, as in RFC 4180, if a separator or a line's end follows.
Else the mark is part of the cell, and the row ends with its line: an apostrophe or an inch mark swallows no rows.
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from vlm_jax.errors import UserError

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
SEPARATORS = ",;|"  # ";" is Excel's where numbers have a decimal comma


def read_rows(uri: str, data: bytes, suffixes: tuple[str, ...]) -> tuple[list[str], list[list[str] | str], list[int]]:
    """Returns the header, each row's cells (or why it cannot be used), and each row's line number.

    Args:
      uri: the source, for messages.
      data: the file's content, UTF-8.
      suffixes: endings of pictures' names.

    Raises:
      UserError: the header cannot be read, or names a column twice.
    """
    if data[:2] in UTF_16:
        raise UserError(f"data source `{uri}` is UTF-16; save it as UTF-8")
    csv.field_size_limit(max(csv.field_size_limit(), len(data)))
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "surrogateescape", newline="").readlines()
    if lines and re.fullmatch("sep=.\r?\n", lines[0]):  # of Excel, above the header
        lines[0] = "\n"
    delimiter = _separator(next((line.rstrip("\r\n") for line in lines if line.strip()), ""))
    every = _records(lines, delimiter, suffixes)
    _, header = next(every, (0, []))
    named = [name for name in header if name]
    if not all(map(_is_text, named)):
        raise UserError(f"data source `{uri}`: the header is not UTF-8; save the table as UTF-8")
    if twice := [name for name in named if named.count(name) > 1]:
        raise UserError(f"data source `{uri}` has the column `{twice[0]}` twice; rename one")
    rows, numbers = [], []
    for number, cells in every:
        if len(cells) > len(header) and any(cells[len(header) :]):
            cells = f"has {len(cells)} cells, the header has {len(header)}; are the quotation marks right?"
        elif not all(map(_is_text, cells)):
            cells = "not UTF-8; save the table as UTF-8"
        rows.append(cells)
        numbers.append(number)
    return header, rows, numbers


def _separator(header: str) -> str:
    """Returns what separates a table's cells: a tab if the header has one, else the most frequent of `SEPARATORS`."""
    bare = "".join(header.split('"')[::2])  # outside of quotation marks
    return "\t" if "\t" in header else max(SEPARATORS, key=bare.count)


def _is_text(cell: str) -> bool:
    try:
        return cell.isascii() or bool(cell.encode())
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False


def _records(lines: Sequence[str], delimiter: str, suffixes: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, cells) of each row; the first is the header."""
    at, width = 0, 0
    while at < len(lines):
        line = lines[at].rstrip("\r\n")
        taken, cells = 1, line.split(delimiter)
        if '"' in line:
            taken, cells = _quoted(lines, at, delimiter, width, suffixes)
        if line:
            yield at + 1, cells
            width = width or len(cells)
        at += taken


def _quoted(
    lines: Sequence[str], at: int, delimiter: str, width: int, suffixes: tuple[str, ...]
) -> tuple[int, list[str]]:
    """Returns (number of lines, cells) of the row that begins with line `at`, which has a quotation mark."""
    reader = csv.reader((lines[i] for i in range(at, len(lines))), delimiter=delimiter, strict=True)
    try:
        cells, taken = next(reader), reader.line_num
        if taken == 1 or not all(_is_row(line, delimiter, width, suffixes) for line in lines[at : at + taken]):
            return taken, cells
    except csv.Error:
        pass
    line = lines[at].rstrip("\r\n")
    cells = line.split(delimiter)
    if width and len(cells) > width:  # a separator inside of quotation marks that text follows
        lenient = next(csv.reader([line], delimiter=delimiter))
        cells = lenient if len(lenient) <= width else cells
    return 1, cells


def _is_row(line: str, delimiter: str, width: int, suffixes: tuple[str, ...]) -> bool:
    """Whether a line of a quoted cell looks like a row of its own: by its columns and, under commas, by a picture."""
    cells = line.rstrip("\r\n").split(delimiter)
    named = any(cell.lower().endswith(suffixes) for cell in cells)
    return len(cells) == width > 1 and (delimiter == "\t" or named)
