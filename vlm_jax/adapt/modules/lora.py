"""LoRA: low-rank updates of dense layers."""

import re

import flax.linen as nn

from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.low_rank import LowRank


@method(
    family="modules",
    paper="arXiv:2106.09685",
    where="eq. 3",
    differs="a low-rank update beside dense layers, which merges into them",
    claim="few_shot: LoRA above zero-shot",
    count="4 * rank * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def lora(
    model: nn.Module, *, where: str = r".*/attn/(query|value)", rank: int = 4, alpha: float | None = None
) -> Inserted:
    """LoRA."""
    return Inserted((LowRank(where, rank, alpha),))


@method(
    family="modules",
    system="CoDyRA",
    paper="arXiv:2412.01004",
    differs="each rank of a low-rank update has an importance, which goes to 0 where the data do not need the rank",
    count="rank * (8 * (L_t * D_t + L_v * D_v) + 4 * (L_t + L_v))",
    identity=True,
)
def codyra(
    model: nn.Module,
    *,
    where: str = r".*/attn/(query|key|value|out)",
    rank: int = 16,
    threshold: float = 7e-4,
    begin: str = "50%",
) -> Extended:
    """CoDyRA (Lu et al. 2024): W + sum_i w_i a_i b_i, with a soft threshold on w after each step.

    From `begin` on, the threshold rises from 0 to `threshold`, as in the authors' code; before, ranks are dense. Ranks
    with w = 0 are gone. `merge` folds the rest into the kernels, and the next task begins with new ranks.
    """
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", begin)
    if not share or float(share[1]) >= 100:
        raise UserError(f"begin of codyra is {begin!r}; expected a share of the steps below 100%, such as '50%'")
    rise = dict(name="constant", value=threshold, begin=begin, warmup=f"{0.98 * (100 - float(share[1])):g}%")
    table = ((r"(.*/)?inserted_importance", dict(wd=0.0, shrink=rise)), (".*", dict(wd=1.0)))
    return Extended(Inserted((LowRank(where, rank, importance=True),)), optimizer=dict(params=table))
