"""The registry of ops: a function under `@op` is an op of that name."""

import inspect
from collections.abc import Callable
from typing import Annotated

# Arguments with a range: an op string from a file may ask for no more memory than this.
Side = Annotated[int, range(1, 4097)]  # of a picture, in pixels
Length = Annotated[int, range(1, 2**20 + 1)]  # tokens, patches
Number = Annotated[int, range(1, 1025)]  # views, texts

OPS: dict[str, Callable] = {}
SUBJECTS = ("image", "text", "example")
INJECTED = (*SUBJECTS, "rng", "tokenizer")  # parameters of an op that no op string sets


def op(function: Callable) -> Callable:
    """Registers `function` as an op under its name. The parameters say what the op works on:

    * the first is `image` or `text`: the op's result replaces that field of the example;
      or `example`: the op takes and returns the whole dict;
    * the second may be `rng`: the op is random and receives the example's own `np.random.Generator`;
    * `tokenizer` (keyword) is the tokenizer passed to `parse`, or that of the spec which the op string names;
    * all others are the arguments of the op string, checked against their annotations when the string is parsed;
      an argument annotated as `Pipeline` is ops, called as `ops(example, rng)`.

    An op may read `image`, `text` and the fields whose paths are among its string arguments; other fields of the record
    may not have been decoded. Between ops an image is a `PIL.Image` or a uint8 array [H, W, C], never changed in place.
    """
    names = list(inspect.signature(function).parameters)
    if names[0] not in SUBJECTS or "rng" in names[2:]:
        raise TypeError(f"op `{function.__name__}({', '.join(names)})`: expected (image|text|example[, rng], ...)")
    OPS[function.__name__] = function
    return function
