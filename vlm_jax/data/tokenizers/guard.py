"""What a tokenizer's file may ask for. The libraries that read it panic, run for hours and fill memory if asked to."""

import base64
import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError

MAX_BYTES = 256 << 20  # of a file; the largest released tokenizer.json have some 40 MB
MAX_GROWTH = 1000  # characters that normalizers or decoders may make of one; Unicode's own reach 18
MAX_REGEX = 10_000  # characters
MAX_WORD = 1000  # characters of a word that WordPiece cuts, in quadratic time; BERT has 100
MAX_SECONDS = 1.0
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns any error of a tokenizer library into a UserError; a panic of Rust is a BaseException."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {_line(error)}") from None


def guarded(encode: Callable[[str], Sequence[int]], spec: str) -> Callable[[str], tuple[int, ...]]:
    """Returns `encode`, which raises a BadExample for a text that the library cannot read."""

    def run(text):
        try:
            return tuple(encode(text))
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise BadExample(f"tokenizer `{spec}` cannot read {text!r:.40} ({_line(error)})") from None

    return run


def check_file(path: Path) -> None:
    """Raises a UserError if a tokenizer's file is no file, or larger than any."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if (size := os.stat(path).st_size) > MAX_BYTES:
        raise UserError(f"{path} has {size:,} bytes; a tokenizer has at most {MAX_BYTES:,}")


def check_json(path: Path) -> None:
    """Raises a UserError if a tokenizer.json asks for texts that grow without bounds, or regexes that backtrack."""
    try:
        file = json.loads(path.read_bytes())
        parts = [part for name in PARTS for part in _nodes(file.get(name))]
        growth = math.prod(map(_growth, parts))
        word = file["model"].get("max_input_chars_per_word") or 0
        regexes = [part["Regex"] for part in parts if isinstance(part.get("Regex"), str)]
        longest = max((len(v) for part in parts for k, v in part.items() if k == "prepend"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not a tokenizer.json: {_line(error)}") from None
    if growth > MAX_GROWTH or longest > MAX_GROWTH:
        raise UserError(f"{path} makes one character up to {max(growth, longest):,.0f}; expected <= {MAX_GROWTH}")
    if word > MAX_WORD:
        raise UserError(f"{path} has max_input_chars_per_word {word:,}; expected <= {MAX_WORD}")
    for regex in regexes:
        if len(regex) > MAX_REGEX or backtracks(regex):
            raise UserError(f"{path} has a regex that may run for hours, {regex[:60]!r}; expected no repeated repeats")


def check_speed(encode: Callable[[str], Any], path: Path) -> None:
    """Raises a UserError if short texts take long: regexes are given up late, and at each place of a text anew."""
    began = time.monotonic()
    for char in "a0 .":
        with refusing(f"{path} cannot read texts"), contextlib.suppress(Exception):  # a character without an id
            encode(f"{char * 48}!")
    if (seconds := time.monotonic() - began) > MAX_SECONDS:
        raise UserError(f"{path} takes {seconds:.0f} seconds for four short texts; expected <= {MAX_SECONDS:.0f}")


def backtracks(regex: str) -> bool:
    """Returns whether a regex repeats a group without bounds that has repeats or alternatives itself: (a+)+, (a|b)*."""
    bare = re.sub(r"\\(p\{[^}]*\}|x\{[^}]*\}|.)", "a", regex, flags=re.DOTALL)
    while (plain := re.sub(r"\[\^?\]?[^\[\]]*\]", "a", bare)) != bare:  # classes, the innermost first
        bare = plain
    depths = [False]
    for i, char in enumerate(bare):
        if char == "(":
            depths.append(False)
        elif char == ")" and len(depths) > 1:
            busy = depths.pop()
            repeats = re.match(r"[*+]|\{\d*,\d*\}|\{\d+\}", bare[i + 1 :])
            if repeats and busy:
                return True
            depths[-1] |= busy or bool(repeats)
        elif char in "*+|" or re.match(r"\{\d*,\d*\}", bare[i:]) or (char == "?" and bare[i - 1 : i] not in ("(", "")):
            depths[-1] = True
    return False


def _nodes(value: Any) -> Iterator[dict]:
    """Yields all dicts in a JSON value."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(part)


def _growth(part: dict) -> float:
    """Returns the characters that a normalizer or decoder makes of one, 1 or more."""
    if isinstance(content := part.get("content"), str) and "pattern" in part:
        literal = part["pattern"].get("String") if isinstance(part["pattern"], dict) else None
        return max(1.0, len(content) / len(literal) if literal else len(content) + 1)
    if isinstance(charsmap := part.get("precompiled_charsmap"), str):  # a trie, then texts that end with NUL
        data = base64.b64decode(charsmap)
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        return max(1.0, max(len(text.decode(errors="replace")) for text in texts))
    return 1.0


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
