"""The layers of the one transformer: norm, attention, MLP.

Parameters are fp32; matmuls run in `dtype`; norm and softmax statistics are at least fp32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.kernels import attention
from vlm_jax.models.rotary import rotate

ACTIVATIONS: dict[str, Callable] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's CLIP
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def dot_general(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """`lax.dot_general` of tokens [B, L, K] and a kernel [K, N].

    On a CPU the token axes are merged: there XLA computes the gradients of [B, L, K] at a third of the speed of
    [B * L, K]. Accelerators use the plain form, because merging the axes can cost a copy.
    """
    dot = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=preferred_element_type)

    def rows(x, kernel):
        y = dot(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
        return y.reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=rows, default=lambda x, kernel: dot(x, kernel, dimension_numbers))


Dense = functools.partial(nn.Dense, dot_general=dot_general)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016), or RMSNorm (Zhang and Sennrich 2019) for `kind="rmsnorm"`.

    Attributes:
      kind: "layernorm" or "rmsnorm" (no mean, no bias).
      eps: added to the variance.
      bias: whether a LayerNorm has a bias.
      dtype: output dtype; statistics are at least fp32.
    """

    kind: str = "layernorm"
    eps: float = 1e-6
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        """Normalises the last axis: [..., D] -> [..., D]."""
        if self.kind not in ("layernorm", "rmsnorm"):
            raise UserError(f"norm is `{self.kind}`; expected one of: layernorm, rmsnorm")
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps) * scale
        if self.kind == "layernorm" and self.bias:
            x = x + self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x.astype(self.dtype)


class KeyValues(NamedTuple):
    """Projected keys and values [B, L, H, head_dim], kept while decoding."""

    key: jax.Array
    value: jax.Array


class Attention(nn.Module):
    """Multi-head attention with its projections: parameters query, key, value, out, each a 2-D kernel.

    Attributes:
      heads: number of heads.
      head_dim: width of a head; defaults to input width / heads.
      bias: whether the four projections have biases; or the names of those that do.
      causal: whether position i sees positions 0..i only.
      implementation: see `kernels.attention`.
      dtype: dtype of the matmuls.
      scale: factor on q k^T (T5: 1.0); defaults to head_dim ** -0.5. Query kernels start scaled by
        `head_dim**-0.5 / scale`.
      qk_norm: a `Norm` but for its name, of each head of queries and keys; or None.
      out_norm: a `Norm` but for its name, of all heads together before the last projection; or None.
    """

    heads: int
    head_dim: int | None = None
    bias: bool | tuple[str, ...] = True
    causal: bool = False
    implementation: str | None = None
    dtype: str = "float32"
    scale: float | None = None
    qk_norm: Callable | None = None
    out_norm: Callable | None = None

    @nn.compact
    def __call__(
        self, x, kv=None, mask=None, *, logits_bias=None, cache=None, position=None, prefix=None, rotation=None
    ):
        """Attends from x to kv (x itself when None).

        Args:
          x: [B, Lq, D].
          kv: [B, Lk, Dk] or None.
          mask: bool, True = visible, broadcasts to [B, heads, Lq, Lk]; or None.
          logits_bias: added to the scaled logits, broadcasts to the same shape; or None.
          cache: `KeyValues` to attend to instead of kv, or None. With a position, the keys and values of x are first
            written into the cache.
          position: integer scalar, the place of x in the cache.
          prefix: `KeyValues` [P, H, head_dim] that every token sees before the others, or None.
          rotation: `rotary.Rotation` of the last tokens of x and kv, or None.

        Returns:
          [B, Lq, D], and the attended `KeyValues`.
        """
        width = x.shape[-1]
        if self.head_dim is None and width % self.heads:
            raise UserError(f"width {width} does not divide into {self.heads} heads; set head_dim or change heads")
        head_dim = self.head_dim or width // self.heads
        init = nn.initializers.xavier_uniform()
        kv = x if kv is None else kv

        def dense(width, name, init=init):
            bias = self.bias if isinstance(self.bias, bool) else name in self.bias
            return Dense(width, use_bias=bias, dtype=self.dtype, kernel_init=init, name=name)

        def project(name, t, init=init):
            heads = dense(self.heads * head_dim, name, init)(t)
            return heads.reshape(*t.shape[:2], self.heads, head_dim)

        smaller = 1.0 if self.scale is None else head_dim**-0.5 / self.scale
        q = self.turned("query", project("query", x, init if smaller == 1 else lambda *a: smaller * init(*a)), rotation)
        if cache is None or position is not None:
            new = KeyValues(self.turned("key", project("key", kv), rotation), project("value", kv))
            write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=1)
            cache = new if cache is None else KeyValues(*map(write, cache, new))
        seen, causal = cache, self.causal
        if prefix is not None:
            if causal:
                earlier = jnp.tril(jnp.ones((q.shape[1], cache.key.shape[1]), bool))
                mask, causal = earlier[None, None] if mask is None else mask & earlier, False
            seen, mask, logits_bias = _after_prefix(prefix, cache, mask, logits_bias)
        options = dict(mask=mask, bias=logits_bias, causal=causal, scale=self.scale)
        out = attention(q, *seen, implementation=self.implementation, **options).reshape(*x.shape[:2], -1)
        if self.out_norm is not None:
            out = self.out_norm(name="norm")(out)
        return dense(width, "out")(out), cache

    def turned(self, name, heads, rotation):
        """Returns queries or keys [B, L, H, head_dim] as the logits have them: normalised, then rotated."""
        if self.qk_norm is not None:
            heads = self.qk_norm(name=f"{name}_norm")(heads)
        return heads if rotation is None else rotate(heads, rotation)


def _after_prefix(prefix, rest, mask, bias):
    """Returns keys and values, mask and bias for attention to a prefix [P, H, head_dim] and then the rest."""
    whole = lambda own, rest: jnp.concatenate(
        [jnp.broadcast_to(own.astype(rest.dtype), (len(rest), *own.shape)), rest], axis=1
    )
    ahead = lambda array, value: (
        None if array is None else jnp.pad(array, ((0, 0),) * 3 + ((len(prefix.key), 0),), constant_values=value)
    )
    return KeyValues(*map(whole, prefix, rest)), ahead(mask, True), ahead(bias, 0)


class Mlp(nn.Module):
    """fc2(act(fc1(x))), or fc2(act(gate(x)) * fc1(x)) when gated (Shazeer 2020, "GLU Variants").

    Attributes:
      width: width of the hidden layer.
      activation: a key of `ACTIVATIONS`.
      gated: whether the MLP has a third matrix, `gate`.
      bias: whether the matrices have biases.
      norm: a `Norm` but for its name, before `fc2`; or None.
      dropout: rate after the activation.
      train: whether dropout is active (needs the rng `dropout`).
      dtype: dtype of the matmuls.
    """

    width: int
    activation: str = "gelu_tanh"
    gated: bool = False
    bias: bool = True
    dropout: float = 0.0
    train: bool = False
    dtype: str = "float32"
    norm: Callable | None = None

    @nn.compact
    def __call__(self, x):
        """[B, L, D] -> [B, L, D]."""
        act = choose(ACTIVATIONS, self.activation, "activation")
        dense = functools.partial(
            Dense, use_bias=self.bias, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform()
        )
        hidden = dense(self.width, name="fc1")(x)
        hidden = act(dense(self.width, name="gate")(x)) * hidden if self.gated else act(hidden)
        hidden = nn.Dropout(self.dropout)(hidden, deterministic=not self.train)
        if self.norm is not None:
            hidden = self.norm(name="norm")(hidden)
        return dense(x.shape[-1], name="fc2")(hidden)
