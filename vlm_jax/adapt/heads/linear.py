"""Linear heads: the class names alone, and logistic regression. Common arguments: see `heads`."""

import numpy as np

from vlm_jax.adapt.heads.checks import unit
from vlm_jax.adapt.heads.search import searches
from vlm_jax.catalogue import method
from vlm_jax.pretrained.linear import Linear, logistic_regression


@method(family="heads", paper="arXiv:2103.00020", where="section 3.1.2", differs="the class names alone")
def zero_shot(text: np.ndarray, scale: float) -> Linear:
    """s f W': CLIP's classifier (arXiv:2103.00020, section 3.1.2), W being `text`."""
    text = unit(text, "text embeddings")
    return Linear(scale * text.T, np.zeros(len(text)))


@method(family="heads", paper="arXiv:2103.00020", where="appendix A.3", differs="logistic regression on pictures alone")
@searches({"l2": [0.1, 0.3, 1.0, 3.0, 10.0]})
def linear_probe(
    features: np.ndarray, labels: np.ndarray, text: np.ndarray, scale: float, *, l2: float = 1.0
) -> Linear:
    """CLIP's linear probe, `logistic_regression`; `text` gives only the number of classes, `scale` is not used."""
    return logistic_regression(features, labels, len(text), l2)
