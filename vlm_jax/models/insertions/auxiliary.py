"""Dense layers that also multiply by another model's kernel (Multimodal Pathway)."""

from typing import NamedTuple

import flax.linen as nn

from vlm_jax.catalogue import method
from vlm_jax.models.insertion import dot, new_parameter


@method(family="insertions", differs="dense layers add another model's kernel of the same shape, by a learned share")
class Auxiliary(NamedTuple):
    """Cross-modal re-parameterisation: h = x (W + s V) + c, s 0 at init (M2PT, Zhang et al. 2024, arXiv:2401.14405).

    V is the kernel of the same layer in the same block of a transformer of another modality: `model_init` with the key
    "auxiliary" reads it. Without it V is drawn as a new kernel, the paper's control. `insertion.merge` makes W + s V.

    Attributes:
      where: regex of the dense layers, by their whole path.
    """

    where: str = r"image/blocks(_\d+)?/(attn|mlp)/\w+"

    def takes(self, module, method):
        return method == "__call__" and isinstance(module, nn.Dense)

    def __call__(self, call, module, x):
        h = call(x)
        v = new_parameter(module, "auxiliary", nn.initializers.lecun_normal(), (x.shape[-1], h.shape[-1]))
        scale = new_parameter(module, "scale", nn.initializers.zeros, ())
        return h + (scale * dot(x, v)).astype(h.dtype)

    def merged(self, kernel, new):
        """Returns W + s V [..., in, out]; see `insertion.merge`."""
        return kernel + new["scale"][..., None, None] * new["auxiliary"]
