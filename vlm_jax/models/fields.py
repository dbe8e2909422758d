"""The fields of a block, which stacks of blocks and attention pooling have, too; and parts that are values."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn


class Part(functools.partial):
    """A `functools.partial` that is a value: equal calls are equal, and hash alike."""

    def __eq__(self, other):
        return type(other) is Part and self._call() == other._call()

    def __hash__(self):
        return hash(self._call())

    def _call(self):
        return self.func, self.args, tuple(sorted(self.keywords.items()))


class Fields(nn.Module, kw_only=True):
    """The base of `Block`, `Encoder` and `MapPool`; `shared` passes the values on.

    Attributes:
      heads: attention heads.
      mlp_dim: hidden width of the MLP; defaults to 4 * width.
      mlp: a part of the family "mlps" in the place of the MLP of each block, such as `moe.moe(experts=8)`; None: `Mlp`.
        In configs: its name, or dict(name=..., ...).
      head_dim: width of an attention head; defaults to width / heads.
      activation: a key of `ACTIVATIONS`.
      gated: gated MLP.
      norm: "layernorm" or "rmsnorm".
      norm_eps: epsilon of the norms.
      norm_bias: whether the norms inside blocks have a bias (the final norm always has).
      post_norm: whether norms follow the sums (BERT); the stack then has no final norm. "branch": norms follow the
        branches, before the sums (Liu et al. 2021, arXiv:2111.09883, section 3.2), and the stack has its final norm.
      attn_bias: whether attention projections have biases; or the names of those that do, of query, key, value, out.
      qk_norm: whether norms follow the heads of queries and keys (Dehghani et al. 2023, arXiv:2302.05442, section 2).
      attn_norm: whether a norm stands before attention's last matrix, on all heads together (Wang et al. 2022,
        arXiv:2210.06423, section 3, "Sub-LN").
      mlp_norm: whether a norm stands before the MLP's last matrix, likewise.
      attn_scale: factor on attention's q k^T (T5: 1.0); defaults to head_dim ** -0.5.
      mlp_bias: whether MLP matrices have biases.
      cross: place of cross-attention to a context: "inside", "after" (see `Block`) or None.
      layer_scale: initial value of a learned scale on each branch; None for no scale.
      dropout: rate after the positions, the MLP activation and each branch.
      drop_path: rate of the last block; rates grow linearly from 0 at the first block.
      implementation: see `kernels.attention`.
      dtype: compute dtype.
    """

    heads: int
    mlp_dim: int | None = None
    mlp: Part | None = None
    head_dim: int | None = None
    activation: str = "gelu_tanh"
    gated: bool = False
    norm: str = "layernorm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    post_norm: bool | str = False
    attn_bias: bool | tuple[str, ...] = True
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    attn_scale: float | None = None
    mlp_bias: bool = True
    cross: str | None = None
    layer_scale: float | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    implementation: str | None = None
    dtype: str = "float32"


_NAMES = tuple(field.name for field in dataclasses.fields(Fields) if field.name not in ("parent", "name"))


def shared(module: Fields) -> dict[str, Any]:
    """Returns the values of a module's `Fields`: keyword arguments of another."""
    return {name: getattr(module, name) for name in _NAMES}
