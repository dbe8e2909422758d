"""New modules over adapters that earlier runs trained, which stay: attention over them, or one after them."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import new_leaves
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.insertions.compositions import Fusion
from vlm_jax.zoo.compositions import common_place, read_adapters


@method(
    family="modules",
    system="AdapterHub",
    paper="arXiv:2005.00247",
    where="authors' code",
    differs="attention over the outputs of adapters that earlier runs trained",
)
def adapter_fusion(model: nn.Module, *, files: str) -> Extended:
    """AdapterFusion (Pfeiffer et al. 2021): the adapters stay, queries, keys and values train.

    Args:
      model: the model that the files were made from.
      files: `NAME=FILE,NAME=FILE`, files of `adapt` with one `Adapter` each, at the same modules.
    """
    return _over(files, Over(files))


@method(
    family="modules",
    system="AdapterHub",
    paper="arXiv:2005.00052",
    differs="an adapter after those that earlier runs trained, such as of a style or a language",
)
def adapter_stack(model: nn.Module, *, files: str, where: str = r".*/mlp", width: int = 64) -> Extended:
    """A stack of adapters (MAD-X, Pfeiffer et al. 2020): the last one trains, those of `files` stay.

    Args:
      model: the model that the files were made from.
      files: `NAME=FILE,NAME=FILE`, files of `adapt` with one `Adapter` each.
      where, width: of the new adapter.
    """
    return _over(files, Over(files, Adapter(where, width)))


def named_files(files: str) -> dict[str, str]:
    """Returns name -> file of `NAME=FILE,NAME=FILE`."""
    pairs = [one.partition("=") for one in files.split(",")]
    if not all(name and equals and path for name, equals, path in pairs) or len({p[0] for p in pairs}) < len(pairs):
        raise UserError(f"files of adapters are {files!r}; expected NAME=FILE,NAME=FILE with different names")
    return {name: path for name, _, path in pairs}


def _over(files, recipe):
    names = "|".join(map(re.escape, named_files(files)))
    table = ((rf"(.*/)?inserted_({names})_(down|up)(_bias)?", dict(freeze=True)), (".*", dict(wd=1.0)))
    return Extended(recipe, optimizer=dict(params=table))


class Over(NamedTuple):
    """Adapters of files, and what is new over them.

    Attributes:
      files: see `named_files`.
      last: a new adapter after them; None: a `Fusion` of them.
    """

    files: str
    last: Adapter | None = None

    def insertions(self, model, at):
        adapters, _ = read_adapters(named_files(self.files))
        return (*adapters, self.last) if self.last else (Fusion(common_place(adapters), adapters),)

    def begin(self, rng, model, leaves: Mapping):
        own = new_leaves(leaves)
        base = {name: leaf for name, leaf in leaves.items() if name not in own}
        _, given = read_adapters(named_files(self.files), base)
        if any(name not in own or own[name].shape != leaf.shape for name, leaf in given.items()):
            raise UserError(f"{self.files} do not hold the parameters of their adapters in this model; adapt again")
        return own | {name: jnp.asarray(leaf) for name, leaf in given.items()}

    def combine(self, own, leaves):
        return dict(own)
