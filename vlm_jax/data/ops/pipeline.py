"""Parses op strings into pipelines."""

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data import tokenizers
from vlm_jax.data.ops.image import array
from vlm_jax.data.ops.registry import INJECTED, OPS, SUBJECTS
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError, near

LONGEST = 2**16  # characters of an op string
MOST = 500  # ops in an op string
SHOWN = 500  # characters of an op string in a message


@dataclasses.dataclass(frozen=True)
class Step:
    """One op with its arguments: `step(example, rng)` changes the dict `example` and returns it."""

    name: str
    function: Callable
    subject: str
    random: bool
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, example: dict, rng: np.random.Generator | None) -> dict:
        args = (rng, *self.args) if self.random else self.args
        if self.subject == "example":
            return self.function(example, *args, **self.kwargs)
        if self.subject not in example:
            raise BadExample(f"has no field `{self.subject}`, which `{self.name}` needs")
        example[self.subject] = self.function(example[self.subject], *args, **self.kwargs)
        return example


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """`pipeline(record, rng) -> example`: the ops of `string`, one after the other.

    Attributes:
      string: the op string.
      before: the steps before `cache`; empty without one.
      after: the steps after `cache`, or all of them.
      cached: whether the string has `cache`.
    """

    string: str
    before: tuple[Step, ...]
    after: tuple[Step, ...]
    cached: bool

    @property
    def keeps(self) -> bool:
        """Whether `keep` chooses the fields of the example; else a batch has all numbers and arrays."""
        return any(step.name == "keep" for step in (*self.before, *self.after))

    @property
    def paths(self) -> frozenset[str] | None:
        """Record paths that the ops may read: all strings in their arguments; without `keep` None, any path."""
        return frozenset(self._strings() | set(SUBJECTS)) if self.keeps else None

    def _strings(self) -> set[str]:
        values = [v for s in (*self.before, *self.after) for v in (*s.args, *s.kwargs.values())]
        inner = [v._strings() for v in values if isinstance(v, Pipeline)]
        return {v for v in values if isinstance(v, str)}.union(*inner)

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return self.finish(self.prepare(record), rng)

    def prepare(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Runs the ops before `cache`; the result may be remembered for the record."""
        example = dict(record)
        for step in self.before:
            example = step(example, None)
        return _images_as_arrays(example) if self.cached else example

    def finish(self, prepared: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Runs the ops after `cache` on (a shallow copy of) what `prepare` returned."""
        example = dict(prepared)
        for step in self.after:
            example = step(example, rng)
        return _images_as_arrays(example)


def _images_as_arrays(example: dict) -> dict:
    for key, value in example.items():
        if isinstance(value, Image.Image):
            example[key] = array(value)
    return example


class Given(NamedTuple):
    """What ops get from outside of their string, see `parse`."""

    tokenizer: Any = None
    max_patches: int | None = None


def parse(string: str, tokenizer: Any = None, max_patches: int | None = None) -> Pipeline:
    """Parses an op string without evaluating it.

    An argument annotated as `Pipeline` is ops itself: `views("local", 6, random_resized_crop(96) | normalize)`.

    Args:
      string: ops joined by `|`, e.g. `"decode | resize(32) | normalize"`. An empty one returns the record.
      tokenizer: `tokenizer(texts, length, bos, eos) -> int32 [B, length]`, for ops that need one (`tokenize`) and
        do not name another: `tokenize(77, to="teacher_ids", tokenizer="clip")`.
      max_patches: of ops that have this argument, where the string does not give it.

    Raises:
      UserError: an op is unknown or its arguments are wrong; the message names the op and its usage.
    """
    # `a | b(1)` is a Python expression. Its tree gives the ops with literal arguments; nothing is executed.
    if not isinstance(string, str):
        raise UserError(f"an op string is {string!r:.80}; expected a text such as 'decode | resize(32)'")
    shown = " ".join(string[:SHOWN].split()) + " ..." * (len(string) > SHOWN)
    if len(string) > LONGEST:
        raise UserError(f"op string `{shown}` has {len(string):,} characters; expected at most {LONGEST:,}")
    try:
        tree = ast.parse(string.strip(), mode="eval").body if string.strip() else None
        return _pipeline(tree, string, Given(tokenizer, max_patches))
    except SyntaxError as error:
        raise UserError(f"op string `{shown}` is not ops joined by `|`: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"op string `{shown}` is nested too deep, or has too many ops") from None
    except ValueError as error:  # NUL, half a surrogate pair
        raise error if isinstance(error, UserError) else UserError(f"op string {shown!r}: {error}") from None


def _pipeline(tree: ast.expr | None, string: str, given: Given) -> Pipeline:
    calls = []
    while tree is not None:
        is_or = isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr)
        calls.append(_call(tree.right if is_or else tree, string))
        tree = tree.left if is_or else None
        if len(calls) > MOST:
            raise UserError(f"op string `{string[:SHOWN]} ...` has more than {MOST:,} ops")
    calls.reverse()

    names = [name for name, _, _ in calls]
    if names.count("cache") > 1:
        raise UserError(f"op string `{string}` has `cache` {names.count('cache')} times; expected once")
    split = names.index("cache") if "cache" in names else -1
    steps = [None if name == "cache" else _step(name, args, kwargs, given) for name, args, kwargs in calls]
    for step in steps[: max(split, 0)]:
        if step.random:
            raise UserError(f"op `{step.name}` is random and stands before `cache`; put it after, or it is drawn once")
    return Pipeline(string, tuple(steps[: max(split, 0)]), tuple(steps[split + 1 :]), cached=split >= 0)


def _call(node: ast.expr, string: str) -> tuple[str, list, dict]:
    """Reads `name` or `name(literal, key=literal)`; an argument that is not a literal stays a node."""
    function, arguments, keywords = node, [], []
    if isinstance(node, ast.Call):
        function, arguments, keywords = node.func, node.args, node.keywords
    if not isinstance(function, ast.Name):
        raise UserError(
            f"op string `{string}` holds `{ast.unparse(node)}`; expected an op such as `flip` or `resize(32)`"
        )
    return function.id, [*map(_literal, arguments)], {k.arg: _literal(k.value) for k in keywords}


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return node


def _step(name: str, args: list, kwargs: dict, given: Given) -> Step:
    if name not in OPS:
        known = sorted([*OPS, "cache"])
        hint = near(name, known, f"known: {', '.join(known)}")
        raise UserError(f"there is no op `{name}`; {hint}")
    function = OPS[name]
    signature = inspect.signature(function)
    takes = "tokenizer" in signature.parameters
    named = kwargs.pop("tokenizer", None) if takes else None
    subject = next(iter(signature.parameters))
    own = [p for p in signature.parameters.values() if p.name not in INJECTED]
    usage = f"{name}({', '.join(map(str, own))})".replace(f"{__name__}.", "")
    usage = re.sub(r"(?:typing\.)?Annotated\[(\w+), range\([\d, ]+\)\]", r"\1", usage)
    usage = re.sub(r"(?:typing\.)?Literal\[([^]]+)\]", lambda found: found[1].replace(", ", " | "), usage)
    try:
        bound = inspect.Signature(own).bind_partial(*args, **kwargs)
        if "max_patches" in signature.parameters and given.max_patches is not None:
            bound.arguments.setdefault("max_patches", given.max_patches)
        bound = inspect.Signature(own).bind(*bound.args, **bound.kwargs)
    except TypeError as error:
        raise UserError(f"op `{name}`: {error}; usage: {usage}") from None
    hints = typing.get_type_hints(function, include_extras=True)
    several = next((p.name for p in own if p.kind is p.VAR_POSITIONAL), None)
    for key, value in bound.arguments.items():
        values = tuple(_inner(name, v, hints[key], given) for v in (value if key == several else (value,)))
        if not all(_fits(v, hints[key]) for v in values):
            span, choices = _range(value, hints[key]), _choices(value, hints[key])
            expected = f"expected {span[0]} to {span[-1]}" if span else f"usage: {usage}"
            expected = f"expected {choices}" if choices else expected
            raise UserError(f"op `{name}` was given {key}={value!r}; {expected}")
        values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        bound.arguments[key] = values if key == several else values[0]
    # What stands before `*paths` goes by position, all else by name: `tokenizer` may stand between.
    args, kwargs = (bound.args, bound.kwargs) if several else ((), dict(bound.arguments))
    if takes:
        kwargs["tokenizer"] = given.tokenizer if named is None else _tokenizer(name, named)
        if kwargs["tokenizer"] is None:
            raise UserError(f"op `{name}` needs a tokenizer, and none was given")
    return Step(name, function, subject, "rng" in signature.parameters, args, kwargs)


def _tokenizer(name: str, spec: Any) -> Any:
    """The tokenizer that an op names in the place of the run's."""
    if not isinstance(spec, str):
        raise UserError(f"op `{name}` was given tokenizer={spec!r:.80}; expected a spec, such as tokenizer='clip'")
    return tokenizers.build(spec)


def _inner(name: str, value: Any, hint: Any, given: Given) -> Any:
    """An argument of op `name`: the literal, or the pipeline if the argument is ops and the op takes them."""
    if not isinstance(value, ast.expr):
        return value
    string = ast.unparse(value)
    if Pipeline not in (hint, *typing.get_args(hint)):
        raise UserError(f"op `{name}` was given `{string}`, which is not a literal (number, string, tuple)")
    pipeline = _pipeline(value, string, given)
    if pipeline.cached:
        raise UserError(f"op `{name}` was given `{string}`; `cache` stands outside of other ops")
    return pipeline


def _range(value: Any, hint: Any) -> range | None:
    """The range that an integer is outside of."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return parts[1] if _fits(value, parts[0]) else None
    return next(filter(None, (_range(value, part) for part in parts)), None)


def _choices(value: Any, hint: Any) -> str | None:
    """The texts that a text, or one of a tuple, should be one of."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and parts[-1] is Ellipsis and isinstance(value, tuple | list):
        found = next(filter(None, (_choices(v, parts[0]) for v in value)), None)
        return found and f"some of: {found}"
    if origin is typing.Literal and isinstance(value, str) and value not in parts:
        return ", ".join(map(str, parts))
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal is of an annotated type: classes, unions, `Literal[...]`, `tuple[...]`; an int is a float."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Annotated:
        return _fits(value, parts[0]) and value in parts[1]
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(v, parts[0]) for v in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
