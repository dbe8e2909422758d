"""Small files of adapted models: what differs from the model that was adapted, as safetensors.

Parameters that were inserted, parameters that changed (of a stack, the layers that did), or a head; and in
`__metadata__`, as JSON, the insertions, the classes and how their names are put into prompts.
"""

import hashlib
import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from vlm_jax.adapt import insert, masks
from vlm_jax.adapt.heads_cache import Ranges, TipAdapter, TipX
from vlm_jax.adapt.linear import Linear
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.parameter_table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.safetensors_files import write_safetensors
from vlm_jax.zoo.tensors import open_tensors

INSERTIONS = {c.__name__: c for c in (insert.Adapter, insert.LowRank, insert.Prefix, insert.Prompt, insert.Context)}
HEADS = {c.__name__: c for c in (Linear, TipAdapter, TipX, Ranges)}
KEY = "vlm_jax.adapter"


def save_adapter(path: str | os.PathLike, base: Pretrained, adapted: Pretrained) -> None:
    """Writes what makes `adapted` of `base`; `load(base).with_adapter(path)` is it again, bit for bit."""
    leaves = named_leaves(adapted.params)
    new = insert.new_leaves(adapted.params)
    own = unflatten_dict({name: leaf for name, leaf in leaves.items() if name not in new}, sep="/")
    tensors = {f"params/{name}": leaf for name, leaf in (new | masks.diff(base.params, own)).items()}
    head = None if adapted.head is None else _pack(adapted.head, "head", tensors)
    about = dict(
        base=fingerprint(base.params),
        insertions=[{"type": type(m).__name__, **m._asdict()} for m in getattr(adapted.model, "insertions", ())],
        tokenize=adapted.tokenize,
        classes=adapted.classes,
        templates=adapted.templates,
        head=head,
    )
    write_safetensors(path, {name: np.asarray(leaf) for name, leaf in tensors.items()}, {KEY: json.dumps(about)})


def load_adapter(path: str | os.PathLike, base: Pretrained) -> Pretrained:
    """Returns `base` as it was when `save_adapter` wrote the file.

    Raises:
      UserError: the file is damaged, is no adapter, or is one of another model.
    """
    file = open_tensors(path)
    if KEY not in file.metadata:
        raise UserError(f"{os.fspath(path)} is no adapter: it does not say how it is applied; expected a file of adapt")
    about = json.loads(file.metadata[KEY])
    if about["base"] != fingerprint(base.params):
        raise UserError(f"{os.fspath(path)} is an adapter of another model: its parameters are not this one's")
    arrays = {name: tensor.read() for name, tensor in file.tensors.items()}
    params = {name.removeprefix("params/"): array for name, array in arrays.items() if name.startswith("params/")}
    new = insert.new_leaves(unflatten_dict(params, sep="/"))
    leaves = named_leaves(masks.patch(base.params, {name: params[name] for name in params.keys() - new.keys()}))
    model = base.model
    if about["insertions"]:
        model = insert.inserted(model, *(_of_type(INSERTIONS, fields) for fields in about["insertions"]))
    return replace(
        base,
        model=model,
        params=unflatten_dict(leaves | new, sep="/"),
        tokenize=about["tokenize"],
        classes=tuple(about["classes"]),
        templates=tuple(about["templates"]),
        head=about["head"] and _unpack(about["head"], "head", arrays),
    )


def fingerprint(params: Any) -> str:
    """A hash of names, shapes and the first numbers of each parameter: tells models apart without reading them all."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf[(0,) * max(leaf.ndim - 1, 0)]).tobytes())
    return digest.hexdigest()


def _pack(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    """JSON of a tree of named tuples; its arrays go to `tensors`."""
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
        return _of_type(HEADS, {k: v if k == "type" else _unpack(v, f"{name}/{k}", arrays) for k, v in value.items()})
    return tuple(value) if isinstance(value, list) else value


def _of_type(types: dict[str, type], fields: dict[str, Any]) -> Any:
    fields = dict(fields)
    return choose(types, fields.pop("type"), "the type in an adapter's file")(**fields)
