"""TIP-X: a cache that compares pictures by their class distributions, too. Common arguments: see `heads`."""

from typing import NamedTuple

import numpy as np
import scipy.special

from vlm_jax.adapt.heads.cache import ALPHAS, BETAS, TipAdapter, tip_adapter
from vlm_jax.adapt.heads.checks import unit
from vlm_jax.adapt.heads.search import searches
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError


class Ranges(NamedTuple):
    """What psi of TIP-X maps: the first two numbers to the other two.

    Attributes:
      divergence: the smallest and the largest KL divergence of queries from supports.
      cosine: the smallest and the largest cosine of the same pairs.
    """

    divergence: tuple[float, float]
    cosine: tuple[float, float]


class TipX(NamedTuple):
    """Logits of `TipAdapter` + gamma psi(-M) L.

    Attributes:
      tip: `TipAdapter`.
      gamma: weight of the divergences.
      temperature: of the softmax over classes.
      ranges: what psi maps; None for the ranges over the features that are asked for.
    """

    tip: TipAdapter
    gamma: float
    temperature: float
    ranges: Ranges | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [M, D] -> logits, float64 [M, C]."""
        features = np.asarray(features, np.float64)
        text, keys, values = self.tip.text, self.tip.keys, np.eye(len(self.tip.text))[self.tip.labels]
        divergence = _divergence(features, keys, text, self.temperature)
        (low, high), (smallest, largest) = self.ranges or _ranges(divergence, features @ keys.T)
        share = (divergence - low) / max(high - low, np.finfo(np.float64).tiny)
        return self.tip(features) - self.gamma * (smallest + share * (largest - smallest)) @ values


@method(
    family="heads",
    paper="arXiv:2211.16198",
    where="section 3.2",
    differs="Tip-Adapter with divergences of class distributions",
    claim="few_shot: TIP-X above Tip-Adapter",
)
@searches({"alpha": ALPHAS, "beta": BETAS}, {"gamma": ALPHAS})
def tip_x(
    features: np.ndarray,
    labels: np.ndarray,
    text: np.ndarray,
    scale: float,
    *,
    alpha: float = 1.0,
    beta: float = 5.5,
    gamma: float = 0.0,
    temperature: float = 0.5,
    reference: np.ndarray | None = None,
) -> TipX:
    """TIP-X of SuS-X (arXiv:2211.16198, section 3.2): alpha exp(-beta (1 - f F')) L + s f W' + gamma psi(-M) L.

    M_ij = KL(s_i || S_j) of the softmax over classes of query i and of support j. What the paper leaves open is as in
    the authors' code: the softmax is of cosines over `temperature`, 0.5, without s; psi maps M linearly to the range of
    the cosines f F' and takes the negative of that, where mapping -M to the range itself would add the same to every
    class if each has as many supports.

    Args:
      reference: float [R, D], queries whose divergences and cosines give psi its ranges, those of validation say: then
        the logits of a query do not depend on the others. By default the ranges are those of the queries of a call, as
        in the authors' code: call with the whole set.
      others: see `heads`; alpha, beta and gamma as in the formula.
    """
    tip = tip_adapter(features, labels, text, scale, alpha=alpha, beta=beta)
    if not temperature > 0:
        raise UserError(f"the temperature of TIP-X is {temperature}; expected a number above 0")
    ranges = None
    if reference is not None:
        reference = unit(reference, "reference features", tip.text.shape[1])
        ranges = _ranges(_divergence(reference, tip.keys, tip.text, temperature), reference @ tip.keys.T)
    return TipX(tip, gamma, temperature, ranges)


def _divergence(features: np.ndarray, keys: np.ndarray, text: np.ndarray, temperature: float) -> np.ndarray:
    """KL(s_i || S_j), [M, N]; in float64, as softmaxes of cosines are so even that float32 leaves few digits."""
    log_query, log_support = (scipy.special.log_softmax(x @ text.T / temperature, axis=1) for x in (features, keys))
    query = np.exp(log_query)
    return np.sum(query * log_query, axis=1, keepdims=True) - query @ log_support.T


def _ranges(divergence: np.ndarray, cosine: np.ndarray) -> Ranges:
    return Ranges((divergence.min(), divergence.max()), (cosine.min(), cosine.max()))
