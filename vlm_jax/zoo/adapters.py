"""Small files of adapted models: the difference from the base model, as safetensors.

Tensors: inserted parameters, changed parameters (of a stack, the changed layers), or a head; where few scalars changed,
their places and values, see `diffs.packed`. `__metadata__`, as JSON: the insertions, the classes and their prompts.
"""

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from vlm_jax import catalogue
from vlm_jax.config import checked
from vlm_jax.data import ops
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.params import diffs
from vlm_jax.params.diffs import check_entries
from vlm_jax.params.table import check_alike, named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.pretrained.embedding import prompts_of
from vlm_jax.run.checkpoint import params_sha256
from vlm_jax.zoo import peft
from vlm_jax.zoo.readers.safetensors_files import write_safetensors
from vlm_jax.zoo.readers.tensors import open_tensors
from vlm_jax.zoo.shapes import check_sizes, inputs_of, shapes_of

KEY = "vlm_jax.adapter"
FILE = "adapter.safetensors"  # in the folder of a model that was saved adapted


def of_folder(path: Path) -> Path | None:
    """Returns the adapter's file in the folder of a saved model, or None."""
    return path / FILE if (path / FILE).is_file() else None


def without(adapted: Pretrained) -> Pretrained:
    """Returns the model without insertions, classes and head; parameters that training changed stay changed."""
    leaves, new = named_leaves(adapted.params), insertion.new_leaves(adapted.params)
    own = unflatten_dict({name: leaf for name, leaf in leaves.items() if name not in new}, sep="/")
    plain = dict(model=insertion.removed(adapted.model), tokenize=adapted.config.get("tokenize", adapted.tokenize))
    return replace(adapted, params=own, classes=(), templates=("{}",), head=None, **plain)


def merged(adapted: Pretrained) -> Pretrained:
    """Returns the model with its insertions folded into the kernels, see `insertion.merge`; classes and head stay."""
    params = insertion.merge(adapted.params, getattr(adapted.model, "insertions", ()))
    return replace(adapted, model=insertion.removed(adapted.model), params=params)


def save_adapter(path: str | os.PathLike, base: Pretrained, adapted: Pretrained) -> None:
    """Writes the difference of `adapted` from `base`; `load_adapter(path, base)` returns `adapted`, bit for bit."""
    new = insertion.new_leaves(adapted.params)
    changed = diffs.diff(base.params, without(adapted).params)
    before = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in new.items()}
    packed = diffs.packed(new | changed, before | diffs.entries_of(base.params, changed))
    tensors = {f"params/{name}": leaf for name, leaf in packed.items()}
    head = None if adapted.head is None else _pack(adapted.head, "head", tensors)
    about = dict(
        base=params_sha256(base.params),
        insertions=insertion.sections_of(getattr(adapted.model, "insertions", ())),
        tokenize=adapted.tokenize,
        classes=adapted.classes,
        templates=adapted.templates,
        head=head,
        sparse={name: list(leaf.shape) for name, leaf in new.items() if name not in packed},
    )
    write_safetensors(path, {name: np.asarray(leaf) for name, leaf in tensors.items()}, {KEY: json.dumps(about)})


@checked
def load_adapter(path: str | os.PathLike | Sequence[str | os.PathLike], base: Pretrained) -> Pretrained:
    """Returns the adapted model that `save_adapter` wrote, or with the low-rank updates of a folder of PEFT.

    Args:
      path: a file of `save_adapter`, or a folder with PEFT's `adapter_config.json`, see `zoo.peft`; of several files,
        see `composed`.
      base: the model that it was made from.

    Raises:
      UserError: the file is damaged, is no adapter, or belongs to another model.
    """
    if not isinstance(base, Pretrained):
        raise UserError(f"load_adapter takes (file, model); got ({type(path).__name__}, {type(base).__name__})")
    if isinstance(path, list | tuple):
        return composed(base, path)
    if peft.is_folder(path):
        return peft.read(path, base)
    file, where = open_tensors(path), os.fspath(path)
    if KEY not in file.metadata:
        raise UserError(f"{where} is no adapter: its metadata has no `{KEY}`; expected a file of adapt")
    try:
        about = _About(**json.loads(file.metadata[KEY]))
        if about.base != params_sha256(base.params):
            raise UserError(f"{where} is of another model: load the one that it was made from")
        arrays = {name: tensor.read() for name, tensor in file.tensors.items()}
        adapted = _adapted(base, about, arrays)
        _check(adapted)
        return adapted
    except UserError:
        raise
    except Exception as error:  # what a file can hold raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{where} is no adapter of this model, or damaged ({reason}); adapt again") from error


def composed(
    base: Pretrained, adapters: Sequence[str | os.PathLike], weights: Sequence[float] | None = None
) -> Pretrained:
    """Returns base + sum_i w_i (adapted_i - base), such as of a task and of a language (LT-SFT, arXiv:2110.07560).

    The classes and prompts are those of the last adapter. `base` with one adapter and weight 1 is that one, but for
    rounding.

    Args:
      base: the model that all were made from.
      adapters: files of `save_adapter`, without insertions and heads.
      weights: w_i; defaults to 1 each, -1 subtracts.

    Raises:
      UserError: as `load_adapter`; an adapter has insertions or a head, or there are no adapters.
    """
    if not adapters:
        raise UserError("there are no adapters to add; give the file of one or more")
    found = [load_adapter(path, base) for path in adapters]
    for path, one in zip(adapters, found, strict=True):
        if one.head is not None or getattr(one.model, "insertions", ()):
            raise UserError(f"{os.fspath(path)} has inserted modules or a head, which do not add up; merge them first")
    moves = [diffs.deltas(base.params, one.params) for one in found]
    return replace(found[-1], params=diffs.plus(base.params, *moves, weights=weights))


def read_insertions(path: str | os.PathLike, base: Mapping[str, Any] | None = None) -> tuple[tuple, dict[str, Any]]:
    """Returns (the insertions of an adapter's file, their parameters by name), to go on training them.

    Args:
      path: the file.
      base: the model's parameters by name, without insertions, to compare with those that the file was made from.

    Raises:
      UserError: the file is no adapter, belongs to another model, or changes more than insertions.
    """
    file, where = open_tensors(path), os.fspath(path)
    if KEY not in file.metadata:
        raise UserError(f"{where} is no adapter: its metadata has no `{KEY}`; expected a file of adapt")
    about = _About(**json.loads(file.metadata[KEY]))
    if base is not None and about.base != params_sha256(unflatten_dict(dict(base), sep="/")):
        raise UserError(f"{where} is of another model: load the one that it was made from")
    params = {name.removeprefix("params/"): tensor.read() for name, tensor in file.tensors.items()}
    params = params if base is None else _unpacked(params, about, base)
    if not about.insertions or params.keys() != insertion.new_leaves(unflatten_dict(params, sep="/")).keys():
        raise UserError(f"{where} changes more than inserted modules, or has none; expected one of modules or prompts")
    return insertion.of_sections(about.insertions, f"an insertion of {where}"), params


class _About(NamedTuple):
    """The metadata of an adapter's file, see `save_adapter`."""

    base: str
    insertions: list[dict[str, Any]]
    tokenize: str | None
    classes: list[str]
    templates: list[str]
    head: Any
    sparse: Mapping[str, Sequence[int]] = {}


def _unpacked(params: Mapping[str, np.ndarray], about: _About, base: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of a file by entry; `base` are the model's, by name."""
    before = diffs.entries_of(base, {name.rpartition("@")[0] or name for name in params})
    limit = sum(leaf.size for leaf in base.values())
    for name, shape in about.sparse.items():
        if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > limit:
            raise UserError(f"the file has `{name}` of shape {shape}, more than the whole model")
        before[name] = np.zeros(shape, params[name + diffs.VALUE].dtype)
    return diffs.unpacked(params, before)


def _adapted(base: Pretrained, about: _About, arrays: Mapping[str, np.ndarray]) -> Pretrained:
    params = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    params = _unpacked(params, about, named_leaves(base.params))
    new = insertion.new_leaves(unflatten_dict(params, sep="/"))
    leaves = named_leaves(diffs.patch(base.params, {name: params[name] for name in params.keys() - new.keys()}))
    model = base.model
    if about.insertions:
        check_sizes(about.insertions, "an insertion of an adapter's file")
        model = insertion.inserted(model, *insertion.of_sections(about.insertions, "an insertion of an adapter's file"))
    return replace(
        base,
        model=model,
        params=unflatten_dict(leaves | new, sep="/"),
        tokenize=about.tokenize,
        classes=tuple(about.classes),
        templates=tuple(about.templates),
        head=about.head and _unpack(about.head, "head", arrays),
    )


def _check(adapted: Pretrained) -> None:
    """Raises if parameters, prompts or head do not fit the model; runs the head alone."""
    for texts in (adapted.classes, adapted.templates):
        if not all(isinstance(text, str) for text in texts):
            raise UserError("an adapter's classes and templates are not all texts")
    prompts_of(adapted.classes, adapted.templates)
    if adapted.tokenize is not None:
        ops.parse(adapted.tokenize, adapted.tokenizer)
    table = named_leaves(adapted.params).get("image/pos_embed")
    positions = None if table is None else math.prod(table.shape[:-1])
    if getattr(adapted.model, "insertions", ()):
        check_alike(insertion.new_leaves(shapes_of(adapted.model, positions)), insertion.new_leaves(adapted.params))
    if adapted.head is not None:
        logits = np.asarray(adapted.head(np.zeros(_embedding(adapted.model, positions), np.float32)))
        if logits.shape != (1, len(adapted.classes)):
            raise UserError(f"an adapter's head gives logits {list(logits.shape)} for {len(adapted.classes)} classes")


@functools.lru_cache(maxsize=8)  # tracing takes a while
def _embedding(model: nn.Module, positions: int | None) -> tuple[int, ...]:
    """Returns the shape of one picture's embedding, (1, D)."""
    picture = inputs_of(model, positions)[0]
    embed = lambda rng, picture: model.init_with_output(rng, picture, None)[0].image
    return jax.eval_shape(embed, jax.random.key(0), picture).shape


def _head_type(name: str) -> type:
    """The named tuple of that name in the modules of the family `heads`."""
    for module in dict.fromkeys(declaration.module for declaration in catalogue.of("heads").values()):
        found = getattr(import_module(module), name, None)
        if isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields"):
            return found
    raise UserError(f"the adapter's file has a head of type `{name}`, which no module of heads has")


def _pack(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """JSON of a tree of named tuples; the tree's arrays go to `tensors`."""
    if isinstance(value, np.ndarray):
        tensors[name] = value
        return {"type": "array"}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fields = {field: _pack(part, f"{name}/{field}", tensors) for field, part in value._asdict().items()}
        return {"type": type(value).__name__, **fields}
    return [float(number) for number in value] if isinstance(value, tuple) else value if value is None else float(value)


def _unpack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value["type"] == "array":
            return arrays[name]
        fields = {field: _unpack(part, f"{name}/{field}", arrays) for field, part in value.items() if field != "type"}
        return _head_type(value["type"])(**fields)
    return tuple(value) if isinstance(value, list) else value


def save_diff(path: str | os.PathLike, diff: Mapping[str, Any]) -> None:
    """Writes a diff as one safetensors file."""
    write_safetensors(path, {name: np.asarray(value) for name, value in diff.items()})


def load_diff(path: str | os.PathLike, base: Any) -> dict[str, np.ndarray]:
    """Reads a file of `save_diff`; `base` is the parameter tree that the diff belongs to, arrays or shapes.

    Raises:
      UserError: the file is damaged, or an entry is not in `base`, or has another shape or dtype there.
    """
    tensors = open_tensors(path).tensors
    check_entries(base, tensors, os.fspath(path))
    return {name: tensor.read() for name, tensor in tensors.items()}
