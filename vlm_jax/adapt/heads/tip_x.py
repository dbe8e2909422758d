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
    """The ranges of psi of TIP-X, which maps divergences linearly to cosines.

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
      ranges: the ranges of psi; None for the ranges over the features of a call.
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

    M_ij = KL(s_i || S_j) of the softmaxes over classes of query i and support j. Details that the paper leaves open are
    as in the authors' code: the softmax is over cosines / `temperature` (0.5), without s; psi maps M linearly to the
    range of the cosines f F' and negates the result. (Mapping -M to that range instead would differ by the same number
    for every class, if classes have equally many supports.)

    Args:
      reference: float [R, D], queries whose divergences and cosines give the ranges of psi, for instance the validation
        features; the logits of a query then do not depend on other queries. Defaults to the queries of each call, as in
        the authors' code: call the head with the whole set.
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


@method(
    family="heads",
    system="SuS-X",
    paper="arXiv:2211.16198",
    differs="TIP-X on pictures without labels that the class names find: no label, no training",
)
@searches({"alpha": ALPHAS, "beta": BETAS}, {"gamma": ALPHAS})
def sus_x(
    text: np.ndarray,
    scale: float,
    pool: np.ndarray,
    *,
    supports: int = 16,
    alpha: float = 1.0,
    beta: float = 5.5,
    gamma: float = 0.0,
    temperature: float = 0.5,
    reference: np.ndarray | None = None,
) -> TipX:
    """SuS-X (Udandarao et al. 2023) with a retrieved support set, SuS-LC: `tip_x` on what the class names find.

    The supports of a class are the pictures of the pool that are nearest to the class name's embedding, as a search by
    text would find them; a picture may support several classes. The paper searches LAION-5B.

    Args:
      pool: float [N, D], unit norm: embeddings of pictures without labels.
      supports: pictures of each class; all of a smaller pool.
      others: see `tip_x`.
    """
    text = unit(text, "text embeddings")
    pool = unit(pool, "features of the pool", text.shape[1])
    if supports < 1:
        raise UserError(f"supports of sus_x is {supports}; expected 1 or more pictures of each class")
    rows = np.argsort(-text @ pool.T, axis=1, kind="stable")[:, :supports]
    labels = np.repeat(np.arange(len(text)), rows.shape[1])
    settings = dict(alpha=alpha, beta=beta, gamma=gamma, temperature=temperature, reference=reference)
    return tip_x(pool[rows.ravel()], labels, text, scale, **settings)


def _divergence(features: np.ndarray, keys: np.ndarray, text: np.ndarray, temperature: float) -> np.ndarray:
    """KL(s_i || S_j), [M, N]; in float64, because softmaxes of cosines are so even that float32 leaves few digits."""
    log_query, log_support = (scipy.special.log_softmax(x @ text.T / temperature, axis=1) for x in (features, keys))
    query = np.exp(log_query)
    return np.sum(query * log_query, axis=1, keepdims=True) - query @ log_support.T


def _ranges(divergence: np.ndarray, cosine: np.ndarray) -> Ranges:
    return Ranges((divergence.min(), divergence.max()), (cosine.min(), cosine.max()))
