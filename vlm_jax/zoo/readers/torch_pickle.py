"""Reads torch pickles without executing anything.

Python's unpickler calls the functions that a file names. This unpickler interprets the instructions that torch
writes, on plain values: a name from the file becomes a `Global` or is refused, and a "call" is one of the few cases of
`_call`. Nothing from the file is ever imported, called, hashed (except strings and small integers) or compared.
"""

import dataclasses
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.zoo.readers.stored import error_text

MAX_BYTES = 64 << 20  # of one pickle: a checkpoint of 100,000 tensors has 20 MB
_MAX_INSTRUCTIONS = 8_000_000

DTYPES = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        **{name: name for name in ("float64", "float32", "float16", "complex64", "complex128", "bool")},
        **{name: name for name in ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")},
        **{
            name: getattr(ml_dtypes, name)
            for name in (
                "bfloat16",
                "float8_e4m3fn",
                "float8_e5m2",
                "float8_e4m3fnuz",
                "float8_e5m2fnuz",
                "float8_e8m0fnu",
            )
        },
    }.items()
}
STORAGES = {
    f"{module}.{name}Storage": DTYPES.get(f"torch.{dtype}")
    for module in ("torch", "torch.cuda", "torch.storage")
    for name, dtype in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "ComplexDouble": "complex128",
        "ComplexFloat": "complex64",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
        "Untyped": None,
    }.items()
}
_SAME = {  # calls that give back their first argument
    "torch._utils._rebuild_parameter",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.restore_type_tag",
}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_CALLS = _SAME | _TENSORS | {"collections.OrderedDict", "torch.Size", "torch.device", "argparse.Namespace"}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the pickle asks for."""

    name: str


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """The state of an object of an unknown class."""

    state: Any = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A run of `size` elements (bytes, where dtype is None) that lies elsewhere in the file under `key`."""

    key: str
    dtype: np.dtype | None
    size: int

    @property
    def nbytes(self) -> int:
        return self.size * (self.dtype.itemsize if self.dtype else 1)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StridedTensor:
    """A tensor's place in a storage; offset and strides in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchPickle:
    """Reads pickles one after another.

    Args:
      path: for errors.
      stream: a buffered binary file.
      size: bytes that it holds.
      script: whether names under `__torch__` (classes of TorchScript) become records.

    Attributes:
      storages: every storage that the pickles named, by key.
      consumed: how many bytes of the stream were read.
    """

    def __init__(self, path: Any, stream: BinaryIO, size: int, script: bool = False):
        self._path, self._stream, self._script = path, stream, script
        self._left = min(size, MAX_BYTES)
        self._instructions = _MAX_INSTRUCTIONS
        self.storages: dict[str, Storage] = {}
        self.consumed = 0

    def load(self) -> Any:
        """Returns the next pickle's value: None, bool, int, float, str, bytes, list, tuple, dict or a class above.

        Raises:
          UserError: the pickle asks for a forbidden name, is damaged or too large, or is not torch's.
        """
        try:
            return self._run()
        except UserError:
            raise
        except (ValueError, TypeError, LookupError, struct.error) as error:
            raise UserError(
                f"{self._path} holds a damaged pickle, or one that torch did not write "
                f"({error_text(error)}); download it again"
            ) from error

    def _run(self) -> Any:
        stack: list[Any] = []
        marks: list[list[Any]] = []  # the stacks under each mark
        memo: dict[int, Any] = {}
        while True:
            self._instructions -= 1
            if self._instructions < 0:
                raise UserError(
                    f"{self._path} holds a pickle of over {_MAX_INSTRUCTIONS:,} instructions; no checkpoint needs them"
                )
            match self._take(1):
                case b"q":  # BINPUT
                    memo[self._take(1)[0]] = stack[-1]
                case b"r":  # LONG_BINPUT
                    memo[self._int(4)] = stack[-1]
                case b"\x94":  # MEMOIZE
                    memo[len(memo)] = stack[-1]
                case b"h":  # BINGET
                    stack.append(memo[self._take(1)[0]])
                case b"j":  # LONG_BINGET
                    stack.append(memo[self._int(4)])
                case b"X":  # BINUNICODE
                    stack.append(self._take(self._int(4)).decode())
                case b"\x8c":  # SHORT_BINUNICODE
                    stack.append(self._take(self._int(1)).decode())
                case b"\x8d":  # BINUNICODE8
                    stack.append(self._take(self._int(8)).decode())
                case b"T":  # BINSTRING, of Python 2
                    stack.append(self._take(self._int(4)).decode("latin1"))
                case b"U":  # SHORT_BINSTRING
                    stack.append(self._take(self._int(1)).decode("latin1"))
                case b"B":  # BINBYTES
                    stack.append(self._take(self._int(4)))
                case b"C":  # SHORT_BINBYTES
                    stack.append(self._take(self._int(1)))
                case b"\x8e":  # BINBYTES8
                    stack.append(self._take(self._int(8)))
                case b"K":  # BININT1
                    stack.append(self._int(1))
                case b"M":  # BININT2
                    stack.append(self._int(2))
                case b"J":  # BININT
                    stack.append(self._int(4, signed=True))
                case b"\x8a":  # LONG1
                    stack.append(self._int(self._int(1), signed=True))
                case b"G":  # BINFLOAT
                    stack.append(struct.unpack(">d", self._take(8))[0])
                case b"N":
                    stack.append(None)
                case b"\x88":
                    stack.append(True)
                case b"\x89":
                    stack.append(False)
                case b"(":  # MARK
                    marks.append(stack)
                    stack = []
                case b")":
                    stack.append(())
                case b"t":  # TUPLE
                    stack, items = marks.pop(), stack
                    stack.append(tuple(items))
                case b"\x85" | b"\x86" | b"\x87" as code:  # TUPLE1, TUPLE2, TUPLE3
                    count = code[0] - 0x84
                    stack[-count:] = [tuple(_last(stack, count))]
                case b"]":
                    stack.append([])
                case b"a":  # APPEND
                    item = stack.pop()
                    _of(stack[-1], list).append(item)
                case b"e":  # APPENDS
                    stack, items = marks.pop(), stack
                    _of(stack[-1], list).extend(items)
                case b"}":
                    stack.append({})
                case b"s":  # SETITEM
                    items = _last(stack, 2)
                    del stack[-2:]
                    _set(stack[-1], items)
                case b"u":  # SETITEMS
                    stack, items = marks.pop(), stack
                    _set(stack[-1], items)
                case b"0":  # POP
                    stack.pop()
                case b"c" | b"i":  # GLOBAL; INST, which torch never writes, gets its name into the error
                    stack.append(self._global(self._line(), self._line()))
                case b"\x93":  # STACK_GLOBAL
                    module, name = _last(stack, 2)
                    stack[-2:] = [self._global(_of(module, str), _of(name, str))]
                case b"Q":  # BINPERSID
                    stack[-1] = self._storage(stack[-1])
                case b"R":  # REDUCE
                    stack[-2:] = [_call(*_last(stack, 2))]
                case b"\x81":  # NEWOBJ
                    kind, _ = _last(stack, 2)
                    if not (_of(kind, Global).name == "argparse.Namespace" or kind.name.startswith("__torch__.")):
                        raise ValueError(f"makes an object of `{kind.name}`")
                    stack[-2:] = [Record()]
                case b"b":  # BUILD; for an OrderedDict BUILD sets attributes, which no tensor needs
                    state = stack.pop()
                    if type(stack[-1]) is not dict:
                        _of(stack[-1], Record).state = state
                case b"\x80":  # PROTO
                    self._take(1)
                case b"\x95":  # FRAME
                    self._take(8)
                case b".":  # STOP
                    return stack.pop()
                case code:
                    raise ValueError(f"instruction {code!r}")

    def _take(self, size: int) -> bytes:
        if size > self._left:
            raise ValueError(f"it wants {size:,} bytes, {self._left:,} are left")
        data = self._stream.read(size)
        if len(data) < size:
            raise ValueError("it ends early")
        self._left -= size
        self.consumed += size
        return data

    def _int(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        line = bytearray()
        while (character := self._take(1)) != b"\n":
            line += character
            if len(line) > 500:
                raise ValueError("a name of over 500 characters")
        return line.decode()

    def _global(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full in _CALLS or full in STORAGES or full in DTYPES or (self._script and full.startswith("__torch__.")):
            return Global(full)
        raise UserError(
            f"{self._path} asks for `{full[:200]}`; only tensors and plain values are read from a torch file, and no "
            "code is run; if you trust it, save its state_dict() as safetensors with torch"
        )

    def _storage(self, persistent_id: Any) -> Storage:
        """("storage", type, key, device, size), and in the legacy format None or a view."""
        if type(persistent_id) is not tuple or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
            raise ValueError("a persistent id that is no storage")
        _, kind, key, _, size, *view = persistent_id
        if any(part is not None for part in view):
            raise ValueError("a storage that is a view of another")
        dtype = STORAGES[_of(kind, Global).name]
        storage = Storage(_of(key, str), dtype, _of(size, int))
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.size) != (dtype, size) or not 0 <= size < 1 << 48 or len(key) > 100:
            raise ValueError(f"storage `{key[:100]}` has two types or an impossible size")
        return known


def _call(function: Any, arguments: Any) -> Any:
    name = _of(function, Global).name
    if name in _TENSORS:
        return _tensor(*_of(arguments, tuple), v3=name.endswith("_v3"))
    if name in _SAME:
        return _of(arguments, tuple)[0]
    match name, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "collections.OrderedDict", (list(pairs),):
            result: dict[Any, Any] = {}
            for pair in pairs:
                _set(result, pair)
            return result
        case "torch.Size", (list(sizes) | tuple(sizes),):
            return tuple(sizes)
        case "torch.device", (str(kind), *index) if all(type(part) is int for part in index):
            return ":".join(map(str, (kind, *index)))
        case "argparse.Namespace", ():
            return Record()
    raise ValueError(f"calls `{name}` in an unknown way")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, v3: bool) -> StridedTensor:
    """A tensor that lies inside its storage (torch/_utils.py); v3 states the dtype, its storage is untyped bytes."""
    dtype = DTYPES[_of(rest[2], Global).name] if v3 else _of(storage, Storage).dtype
    if dtype is None:
        raise ValueError("a tensor without dtype")
    shape, strides = _of(shape, tuple), _of(strides, tuple)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with impossible shape, strides or offset")
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if 0 not in shape else 0
    if (offset + span) * dtype.itemsize > _of(storage, Storage).nbytes:
        raise ValueError(f"a tensor that lies outside its storage `{storage.key}` of {storage.size:,} elements")
    return StridedTensor(storage, dtype, offset, shape, strides)


def _set(target: Any, items: Any) -> None:
    if type(items) not in (list, tuple) or len(items) % 2:
        raise ValueError("keys without values")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str and not (type(key) is int and abs(key) < 1 << 63):
            raise ValueError(f"a key that is {type(key).__name__}; expected a string or an integer")
        _of(target, dict)[key] = value


def _of(value: Any, kind: type) -> Any:
    """Returns the value; raises ValueError unless its type is exactly `kind`."""
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} where {kind.__name__} belongs")
    return value


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("an empty stack")
    return stack[-count:]
