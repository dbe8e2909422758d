"""Tables whose quotation marks, separators or bytes are not those of a CSV writer."""

import csv
import io
import random

import pytest

from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.data.sources.delimited import read_rows
from vlm_jax.errors import UserError


def rows_of(text, suffixes=(".jpg",)):
    header, rows, lines = read_rows("csv:x", text if isinstance(text, bytes) else text.encode(), suffixes)
    return header, rows, lines


def test_as_a_writer_wrote_it():
    rng = random.Random(0)
    for delimiter in ",\t;|":
        letters = "ab\" ,\n'é" + "\t" * (
            delimiter != "\t"
        )  # a tab in a cell of a line that breaks: two rows, see below
        cell = lambda letters=letters: "".join(rng.choice(letters) for _ in range(rng.randrange(8)))
        table = [["p", "q", "r"]] + [[cell(), f"{i}", cell()] for i in range(300)]
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
            out = io.StringIO()
            csv.writer(out, delimiter=delimiter, quoting=quoting).writerows(table)
            assert rows_of(out.getvalue())[:2] == (table[0], table[1:])


CAPTIONS = ['"hello" said the cat', '"unclosed quote', "a dog", 'the "big" house', '5" disk', "'", '"', 'a "b', 'ends"']


def test_marks_that_quote_nothing_swallow_nothing():
    text = "url\ttitle\n" + "".join(f"{i}.jpg\t{c}\n" for i, c in enumerate(CAPTIONS))
    assert rows_of(text)[1] == [[f"{i}.jpg", c] for i, c in enumerate(CAPTIONS)]
    text = "url,title\n" + "".join(f"{i}.jpg,{c}\n" for i, c in enumerate(CAPTIONS))
    assert rows_of(text)[1] == [[f"{i}.jpg", c] for i, c in enumerate(CAPTIONS)]
    # closed again further down, as if two rows were one cell
    assert len(rows_of('url\ttitle\n0.jpg\t"a\n1.jpg\tb\n2.jpg\tc"\n')[1]) == 3
    assert rows_of('url,title\n0.jpg,"a, b" he said\n')[1] == [["0.jpg", "a, b he said"]]


@pytest.mark.parametrize(
    ("head", "separator", "header"),
    [
        ("image;text", ";", ["image", "text"]),
        ("sep=;\r\nimage;text", ";", ["image", "text"]),
        ("\n\nimage|text", "|", ["image", "text"]),
        ('"image";"a, b, c"', ";", ["image", "a, b, c"]),
        ("image,a;b", ",", ["image", "a;b"]),
        ("image\ta;b;c", "\t", ["image", "a;b;c"]),
        ("text", ",", ["text"]),
    ],
)
def test_the_header_tells_the_separator(head, separator, header):
    row = ["0.jpg", "1,5; 2|\t3"][: len(header)]
    quoted = separator.join(f'"{cell}"' for cell in row)
    assert rows_of(f"{head}\n{quoted}\n")[:2] == (header, [row])


def test_rows_that_cannot_be_used_are_rows():
    _, rows, lines = rows_of(b'image,text\n\na.jpg,b,c\na.jpg,caf\xe9\na.jpg,b,,\na.jpg\n"x\ny",z\r\nw,v')
    assert rows[0] == "has 3 cells, the header has 2; are the quotation marks right?"
    assert rows[1] == "not UTF-8; save the table as UTF-8"
    assert rows[2:] == [["a.jpg", "b", "", ""], ["a.jpg"], ["x\ny", "z"], ["w", "v"]]
    assert lines == [3, 4, 5, 6, 7, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\ufeffa,b\n1,2".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        (b"a,caf\xe9\n1,2", "the header is not UTF-8"),
        (b"image,text,text\n1,2,3", "has the column `text` twice"),
    ],
)
def test_headers(text, message):
    with pytest.raises(UserError, match=message):
        rows_of(text)


def test_the_source(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfimage,text\n\na.jpg," + b"x" * 200_000 + b"\nb,c,d\n")
    source = open_source(f"csv:{path}").narrow(frozenset({"text"}))
    assert len(source[0]["text"]) == 200_000 and source.key(0) == "a.csv:3"
    with pytest.raises(BadExample, match="has 3 cells") as error:
        source[1]
    assert error.value.kind == "row" and source.key(1) == "a.csv:4"
    path.write_bytes(b"")
    assert len(open_source(f"csv:{path}")) == 0
