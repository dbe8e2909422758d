"""Few-shot classifiers on frozen, cached, unit-norm features of a two-tower model; no gradient through the towers.

A head maps features [M, D] to logits, float64 [M, C]. Common arguments of the functions that make heads:

    features  float [N, D], unit norm: image embeddings of the training pictures
    labels    int [N], in range(C)
    text      float [C, D], unit norm: an embedding of each class's name, the zero-shot weights
    scale     the model's logit scale, s = exp(logit_scale), 100 in CLIP

`choose` picks hyper-parameters on validation features.
"""

from vlm_jax.adapt.heads.cache import TipAdapter, tip_adapter, tip_adapter_f
from vlm_jax.adapt.heads.cross_modal import concept_embeddings, cross_modal_probe
from vlm_jax.adapt.heads.epinet import Epinet, epinet
from vlm_jax.adapt.heads.gda import gaussian, gda
from vlm_jax.adapt.heads.linear import Linear, linear_probe, zero_shot
from vlm_jax.adapt.heads.nmtune import Reshaped, nmtune
from vlm_jax.adapt.heads.projection import Projected, train_projection
from vlm_jax.adapt.heads.search import Choice, choose, searches
from vlm_jax.adapt.heads.tip_x import TipX, sus_x, tip_x

__all__ = [
    "Choice",
    "Epinet",
    "Linear",
    "Projected",
    "Reshaped",
    "TipAdapter",
    "TipX",
    "choose",
    "concept_embeddings",
    "cross_modal_probe",
    "epinet",
    "gaussian",
    "gda",
    "linear_probe",
    "nmtune",
    "searches",
    "sus_x",
    "tip_adapter",
    "tip_adapter_f",
    "tip_x",
    "train_projection",
    "zero_shot",
]
