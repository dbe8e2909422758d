"""Several adapters at one module: each for its own tokens, or weighted by attention; see `zoo.compositions`."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertion import dot, new_parameter
from vlm_jax.models.insertions.adapter import Adapter


@method(family="insertions", differs="several adapters at one module, each for its own tokens")
class Split(NamedTuple):
    """h_i <- h_i + s dh_i, with the adapter of token i (AdapterHub, Pfeiffer et al. 2020, arXiv:2007.07779).

    Attributes:
      where: regex of the modules, by their whole path.
      adapters: of one form, with different names; their own `where` is not read.
      ends: the first token after those of each adapter but the last, which has the rest.
    """

    where: str
    adapters: tuple[Adapter, ...]
    ends: tuple[int, ...]

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        if len(self.ends) != len(self.adapters) - 1 or list(self.ends) != sorted(set(self.ends)):
            raise UserError(f"a split of {len(self.adapters)} adapters has one rising end fewer; got {self.ends}")
        result = call(x, *args, **kwargs)
        h, *others = result if isinstance(result, tuple) else (result,)
        parts = jnp.split(_source(self.adapters, x, h), self.ends, axis=1)
        changes = [one.change(module, part, h.shape[-1]) for one, part in zip(self.adapters, parts, strict=True)]
        h = h + jnp.concatenate(changes, axis=1).astype(h.dtype)
        return (h, *others) if others else h


@method(
    family="insertions",
    paper="arXiv:2005.00247",
    where="authors' code",
    differs="attention weights the outputs of several adapters, token by token",
)
class Fusion(NamedTuple):
    """h <- h + sum_n softmax_n(q(x) . k(dh_n)) v(dh_n) (AdapterFusion, Pfeiffer et al. 2021).

    x is what the adapters read, q and k are dense layers with biases, v is a matrix, the identity at init: 3 D^2 + 2 D
    parameters at each place, besides the adapters'. With one adapter, or several equal ones, h is that adapter's.

    Attributes:
      where: regex of the modules, by their whole path.
      adapters: of one form, with different names; their own `where` is not read.
    """

    where: str
    adapters: tuple[Adapter, ...]

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x, *args, **kwargs):
        result = call(x, *args, **kwargs)
        h, *others = result if isinstance(result, tuple) else (result,)
        source, width = _source(self.adapters, x, h), h.shape[-1]
        changes = jnp.stack([one.change(module, source, width) for one in self.adapters], axis=-2)  # [B, L, N, D]
        new = lambda name, init, *shape: new_parameter(module, f"fusion_{name}", init, shape)

        def dense(name, x):
            kernel = new(name, nn.initializers.normal(0.02), x.shape[-1], width)
            return dot(x, kernel) + new(f"{name}_bias", nn.initializers.zeros, width)

        logits = jnp.sum(dense("query", source)[..., None, :] * dense("key", changes), axis=-1)
        weights = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        values = dot(changes, new("value", lambda rng, shape: jnp.eye(*shape), width, width))
        h = h + jnp.sum(weights[..., None] * values, axis=-2).astype(h.dtype)
        return (h, *others) if others else h


def _source(adapters, x, h):
    """Returns what the adapters read: the module's input or its output."""
    forms, names = {one.form for one in adapters}, [one.name for one in adapters]
    if len(forms) != 1 or len(set(names)) < len(names):
        raise UserError(f"adapters of one module need one form and different names; got {sorted(forms)} and {names}")
    return h if forms == {"serial"} else x
