"""LoRA and its like: low-rank updates of dense layers."""

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
    system="rsLoRA",
    paper="arXiv:2312.03732",
    differs="a low-rank update scaled by alpha / sqrt(rank), for which large ranks learn as fast as small ones",
    count="4 * rank * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def rslora(
    model: nn.Module, *, where: str = r".*/attn/(query|value)", rank: int = 4, alpha: float | None = None
) -> Inserted:
    """Rank-stabilised LoRA (Kalajdzievski 2023): LoRA of alpha sqrt(rank)."""
    return Inserted((LowRank(where, rank, alpha, stabilised=True),))


@method(
    family="modules",
    system="DoRA",
    paper="arXiv:2402.09353",
    where="equation 5",
    differs="a low-rank update turns the columns of a kernel, a parameter for each column says how long it is",
    count="rank * 4 * (L_t * D_t + L_v * D_v) + 2 * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def dora(
    model: nn.Module, *, where: str = r".*/attn/(query|value)", rank: int = 4, alpha: float | None = None
) -> Inserted:
    """Weight-decomposed LoRA (DoRA, Liu et al. 2024): W <- (|W| + m) (W + a b) / |W + a b|, lengths of columns.

    The paper's magnitude is |W| + m: `weight_decay` pulls m to 0, the base model's lengths.
    """
    return Inserted((LowRank(where, rank, alpha, magnitude=True),))


@method(
    family="modules",
    system="LoRA+",
    paper="arXiv:2402.12354",
    differs="the learning rate of b, which begins at 0, is `ratio` times that of a",
    count="4 * rank * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def lora_plus(
    model: nn.Module,
    *,
    where: str = r".*/attn/(query|value)",
    rank: int = 4,
    alpha: float | None = None,
    ratio: float = 16.0,
) -> Extended:
    """LoRA+ (Hayou et al. 2024): LoRA with two learning rates; ratio 1 is LoRA."""
    if ratio <= 0:
        raise UserError(f"ratio of lora_plus is {ratio}; expected above 0: the rate of b, in rates of a")
    table = ((r"(.*/)?inserted_b", dict(wd=1.0, lr=ratio)), (".*", dict(wd=1.0)))
    return Extended(lora(model, where=where, rank=rank, alpha=alpha), optimizer=dict(params=table))


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
    return Extended(Inserted((LowRank(where, rank, weights="importance"),)), optimizer=dict(params=table))
