"""Full tuning near the base model's parameters: L2-SP, Mixout, SPIDER, WiSE-FT."""

import dataclasses

import flax.linen as nn

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives import Term, of_model
from vlm_jax.params import averages, regularizers


@method(
    family="parameters",
    system="L2-SP",
    paper="arXiv:1802.01483",
    where="section 3",
    differs="all parameters train, pulled towards the base model's",
    identity=True,
)
def l2_sp(model: nn.Module, *, weight: float = 0.01) -> Extended:
    """L2-SP (Li et al. 2018): adds weight / 2 * |w - w_base|^2 over all parameters.

    Class names are compared by embeddings that the base model has, too: there is no new head, which the paper decays
    towards 0.
    """

    def distance(outputs, features, rows, ctx):
        start = outputs.model.recipe.start(outputs.model.leaves)
        return regularizers.l2_sp(of_model(outputs.params), start, 1.0), {}

    prior = Term("prior", lambda outputs, ctx: outputs["label"], distance, weight=weight)
    return Extended(full(model), (prior,) if weight else ())


@method(
    family="parameters",
    paper="arXiv:1909.11299",
    where="section 4",
    differs="all parameters train; at each step some are the base model's, at random",
    identity=True,
)
def mixout(model: nn.Module, *, p: float = 0.5) -> Extended:
    """Mixout (Lee et al. 2020): each training pass sees `regularizers.mixout` of trained and base model."""
    if not 0 <= p < 1:
        raise UserError(f"p of mixout is {p}; expected at least 0 and less than 1")
    noise = lambda rng, own, start: regularizers.mixout(rng, own, start, p)
    return Extended(full(model), noise=noise if p else None)


@method(
    family="parameters",
    paper="arXiv:2411.10928",
    differs="scalars train as far as their gradients outrank the sizes that pretraining gave them",
    identity=True,
)
def spider(model: nn.Module) -> Extended:
    """SPIDER (Huang et al. 2025): full tuning by the optimizer `spider`, see `params.importance.spider_importance`."""
    return Extended(full(model), optimizer={"name": "spider"})


@method(
    family="parameters",
    paper="arXiv:2109.01903",
    where="section 3",
    differs="all parameters train; the result lies between the base model and the tuned one",
    identity=True,
)
def wise_ft(model: nn.Module, *, alpha: float = 0.5) -> Extended:
    """WiSE-FT (Wortsman et al. 2022): (1 - alpha) base + alpha tuned, `averages.wise_ft`, after full tuning."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha of wise_ft is {alpha}; expected 0 (the base model) to 1 (the tuned one)")
    between = lambda base, tuned: dataclasses.replace(tuned, params=averages.wise_ft(base.params, tuned.params, alpha))
    return Extended(full(model), finish=between)
