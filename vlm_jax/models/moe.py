"""Mixtures of experts: each token gets a weighted sum of several MLPs (Shazeer et al. 2017, arXiv:1701.06538)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.fields import Part
from vlm_jax.models.layers import Mlp


@method(
    family="mlps",
    paper="arXiv:1701.06538",
    where="equations 1, 3 and 5",
    differs="several MLPs, of which each token chooses some",
)
def moe(*, experts: int = 8, top_k: int = 2, renormalise: bool = True) -> Part:
    """Returns a `Moe` in the place of a block's MLP; the fields are described there."""
    if not 1 <= top_k <= experts:
        raise UserError(f"moe has {experts} experts, of which a token cannot choose {top_k}; expected 1 to {experts}")
    return Part(Moe, experts=experts, top_k=top_k, renormalise=renormalise)


class Moe(Mlp, kw_only=True):
    """y = sum_e g_e(x) mlp_e(x), with p = softmax(x W_router) and g = p for the top_k largest p_e, else 0.

    With top_k = experts the mixture is soft. All experts compute all tokens: none has a limit of tokens, so that no row
    depends on another. Equal experts are one MLP exactly if g is renormalised.

    Attributes:
      experts: E, number of MLPs.
      top_k: number of experts that a token chooses.
      renormalise: whether the chosen g_e are divided by their sum (Shazeer: the softmax of the chosen logits); with
        top_k 1 the router then has no gradient from y. False: LIMoE (arXiv:2206.02770), V-MoE.
      Others: of each expert, see `Mlp`.
    """

    experts: int
    top_k: int
    renormalise: bool

    @nn.compact
    def __call__(self, x, real=None):
        """Mixes experts.

        Args:
          x: [B, L, D].
          real: bool [B, L], False for tokens that statistics leave out, or None.

        Returns:
          [B, L, D], and statistics, at least fp32 [B, E], the means over the row's tokens of p ("router_probability")
          and of one-hot choices, divided by top_k ("router_share"). E sum_e mean(share_e) mean(probability_e) is the
          balance loss of Switch (arXiv:2101.03961, equation 4), the means over the batch.
        """
        exact = jnp.promote_types(x.dtype, jnp.float32)
        router = nn.Dense(self.experts, use_bias=False, dtype=exact, precision="highest", name="router")
        p = jax.nn.softmax(router(x), axis=-1)
        chosen = jax.nn.one_hot(jax.lax.top_k(p, self.top_k)[1], self.experts, dtype=exact).sum(axis=-2)
        g = p * chosen
        if self.renormalise:
            g = g / jnp.sum(g, axis=-1, keepdims=True)
        expert = nn.vmap(
            Mlp,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,
            out_axes=-1,
            axis_size=self.experts,
        )
        fields = dict(width=self.width, activation=self.activation, gated=self.gated, bias=self.bias, norm=self.norm)
        outputs = expert(**fields, dropout=self.dropout, train=self.train, dtype=self.dtype, name="experts")(x)
        y = jnp.einsum("blde,ble->bld", outputs, g.astype(outputs.dtype))
        weights = jnp.ones(x.shape[:2], exact) if real is None else real.astype(exact)
        mean = lambda rows: jnp.einsum("ble,bl->be", rows, weights) / jnp.maximum(weights.sum(axis=1), 1)[:, None]
        return y, {"router_probability": mean(p), "router_share": mean(chosen) / self.top_k}
