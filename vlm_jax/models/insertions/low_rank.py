"""Low-rank updates of dense layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.models.insertion import by_place, dot, new_parameter

# U(-1 / sqrt(in), 1 / sqrt(in)), as in the authors' code
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
ZEROS, SMALL = nn.initializers.zeros, nn.initializers.normal(0.02)
# of a, of b, of the weights; what (x a)_i is multiplied by
WEIGHTS = {
    None: (UNIFORM, ZEROS, None, None),
    "importance": (UNIFORM, ZEROS, nn.initializers.normal(1.0), lambda w: w),
    "selection": (UNIFORM, ZEROS, ZEROS, jax.nn.softmax),
    "singular": (SMALL, SMALL, ZEROS, lambda w: w),
}


@method(family="insertions", differs="a low-rank update of a dense layer")
class LowRank(NamedTuple):
    """LoRA (Hu et al. 2021, arXiv:2106.09685, equation 3): h = x W + (alpha / r) x a b, with b 0 at init.

    r (in + out) parameters at each place; `insertion.merge` folds them into plain kernels.

    Attributes:
      where: regex of the dense layers, by their whole path.
      rank: r.
      alpha: None means r.
      weights: of the r terms a_i b_i, a parameter w [r] that multiplies (x a)_i, or None. "importance": w, N(0, 1) at
        init (CoDyRA, arXiv:2412.01004). "selection": softmax(w), w 0 at init (AutoLoRA, arXiv:2403.09113). "singular":
        w, 0 at init, a and b N(0, 0.02^2) (the SVD form P diag(w) Q of AdaLoRA, arXiv:2303.10512).
      stabilised: alpha / sqrt(r) instead of alpha / r (rsLoRA, arXiv:2312.03732).
      magnitude: the columns of W + (alpha / r) a b are scaled to the lengths |W| + m, with a parameter m [out], 0 at
        init (DoRA, arXiv:2402.09353). The lengths of the update are constants to the gradient, as in the paper.
    """

    where: str = r".*/attn/(query|value)"
    rank: int = 4
    alpha: float | None = None
    weights: str | None = None
    stabilised: bool = False
    magnitude: bool = False

    @property
    def factor(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.stabilised else self.rank)

    def takes(self, module, method):
        return method == "__call__"

    def __call__(self, call, module, x):
        config.check_least(1, "LowRank", rank=self.rank)
        h = call(x)
        of_a, of_b, of_weights, _ = config.choose(WEIGHTS, self.weights, "the weights of a low-rank update")
        new = {"a": new_parameter(module, "a", of_a, (x.shape[-1], self.rank))}
        new["b"] = new_parameter(module, "b", of_b, (self.rank, h.shape[-1]))
        if self.weights:
            new[self.weights] = new_parameter(module, self.weights, of_weights, (self.rank,))
        a, b = self.terms(new)
        update = self.factor * dot(dot(x, a), b)
        if not self.magnitude:
            return h + update.astype(h.dtype)
        new["magnitude"] = new_parameter(module, "magnitude", ZEROS, (h.shape[-1],))
        kernel, bias = module.get_variable("params", "kernel"), module.get_variable("params", "bias", jnp.zeros(()))
        scale = self._scale(kernel, self.factor * _matmul(a, b), new["magnitude"])
        return h + ((scale - 1) * (h - bias) + scale * update).astype(h.dtype)

    def terms(self, new: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns (a [..., in, r], with the weights of the terms, b [..., r, out]) of a place's parameters."""
        if not self.weights:
            return new["a"], new["b"]
        return new["a"] * WEIGHTS[self.weights][-1](new[self.weights])[..., None, :], new["b"]

    def merged(self, kernel: jax.Array, new: Mapping[str, jax.Array]) -> jax.Array:
        """Returns the kernel [..., in, out] of a plain layer that computes the same; see `insertion.merge`."""
        update = self.factor * _matmul(*self.terms(new))
        if not self.magnitude:
            return kernel + update
        return self._scale(kernel, update, new["magnitude"])[..., None, :] * (kernel + update)

    def _scale(self, kernel, update, magnitude):
        length, changed = (jnp.linalg.norm(jax.lax.stop_gradient(x), axis=-2) for x in (kernel, kernel + update))
        return (length + magnitude) / jnp.where(changed == 0, 1, changed)


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")


def ranks(params: Any) -> dict[str, np.ndarray]:
    """Returns the module's path -> the number of terms of its `LowRank` that are not 0, int [] or [blocks]."""
    found = {}
    for place, new in by_place(params).items():
        if "b" in new:
            live = np.any(np.asarray(new["a"]), axis=-2) & np.any(np.asarray(new["b"]), axis=-1)
            for name in new.keys() & {"importance", "singular"}:
                live &= np.asarray(new[name]) != 0
            found[place] = live.sum(axis=-1)
    return found
