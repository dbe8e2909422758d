"""Several adapters' files of one model, composed by name: one after another, by tokens, by towers.

    both = stacked(clip, {"style": "runs/style/adapter_0.safetensors", "names": "runs/names/adapter_0.safetensors"})

`save_adapter` keeps the result in one file. Attention over adapters trains: method `adapter_fusion`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flax.traverse_util import unflatten_dict

from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.insertions.compositions import Split
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.adapters import load_adapter, read_insertions

Files = Mapping[str, str | os.PathLike]


def stacked(base: Pretrained, files: Files) -> Pretrained:
    """Returns the model with several adapters, each after those before it (MAD-X, arXiv:2005.00052).

    Adapters of different places meet no other one there. Classes and prompts are those of the last file.

    Args:
      base: the model that all were made from.
      files: name -> a file with one `Adapter`, in order.

    Raises:
      UserError: as `load_adapter`; a file has other insertions, or a name cannot stand in a parameter's name.
    """
    adapters, params = read_adapters(files, named_leaves(base.params))
    return _with(base, files, adapters, params)


def split(base: Pretrained, files: Files, ends: Sequence[int]) -> Pretrained:
    """Returns the model with an adapter for each part of the tokens: the first `ends[0]` tokens, and so on.

    Args:
      base, files: as for `stacked`; the adapters have one `where` and one form.
      ends: the first token after those of each adapter but the last, which has the rest.
    """
    adapters, params = read_adapters(files, named_leaves(base.params))
    return _with(base, files, (Split(common_place(adapters), adapters, tuple(ends)),), params)


def by_tower(base: Pretrained, files: Files) -> Pretrained:
    """Returns the model whose towers have adapters of different files; `files` are {"image": file, "text": file}."""
    adapters, params = read_adapters(files, named_leaves(base.params))
    adapters = tuple(one._replace(where=rf"(?={one.name}/)(?:{one.where})") for one in adapters)
    params = {name: leaf for name, leaf in params.items() if f"/inserted_{name.split('/')[0]}_" in name}
    if any(not any(name.startswith(f"{tower}/") for name in params) for tower in files):
        raise UserError(
            f"by_tower takes adapters by tower, such as image and text; {', '.join(files)} have no parameters"
        )
    return _with(base, files, adapters, params)


def read_adapters(files: Files, base: Mapping[str, Any] | None = None) -> tuple[tuple[Adapter, ...], dict[str, Any]]:
    """Returns (the adapters under their new names, their parameters by name).

    Args:
      files: name -> a file with one `Adapter`.
      base: as for `read_insertions`.
    """
    if not files:
        raise UserError("there are no adapters to compose; give the file of one or more")
    adapters, params = [], {}
    for name, path in files.items():
        if not re.fullmatch(r"[a-z][a-z0-9]*", name) or name in ("fusion", "up", "down"):
            raise UserError(f"an adapter cannot be named {name!r}; expected letters and digits, such as `style`")
        insertions, own = read_insertions(path, base)
        if len(insertions) != 1 or not isinstance(insertions[0], Adapter) or insertions[0].name:
            raise UserError(f"{os.fspath(path)} holds {insertions}; expected one Adapter without a name to compose")
        adapters.append(insertions[0]._replace(name=name))
        params |= {key.replace("inserted_", f"inserted_{name}_", 1): leaf for key, leaf in own.items()}
    return tuple(adapters), params


def common_place(adapters: Sequence[Adapter]) -> str:
    """Returns the `where` of all adapters; raises a UserError if they differ."""
    places = {one.where for one in adapters}
    if len(places) != 1:
        raise UserError(f"the adapters stand at different modules, {', '.join(sorted(places))}; stack them instead")
    return places.pop()


def _with(base: Pretrained, files: Files, insertions: tuple, params: Mapping[str, Any]) -> Pretrained:
    last = load_adapter(list(files.values())[-1], base)
    model = insertion.inserted(base.model, *insertions)
    params = unflatten_dict(named_leaves(base.params) | dict(params), sep="/")
    return replace(base, model=model, params=params, classes=last.classes, templates=last.templates)
