"""UL2-Cap: UL2's denoisers with a picture as prefix; one captioner continues, fills in and predicts in parallel.

    python -m vlm_jax.train --config=configs/ul2_cap.py:tiny --workdir=runs/ul2_cap_tiny   # embedded data, 2 CPU cores

S-denoising (arXiv:2205.05131, section 3.1) of a caption is Cap. Extreme denoising is CapPa's parallel prediction
(arXiv:2306.07915, section 3.2). R-denoising is masked captioning. The mixture of the three is this project's.
"""

from ml_collections import ConfigDict

from configs import cap
from vlm_jax.catalogue import method

DENOISERS = dict(
    S=("causal", 1),
    X=(dict(name="parallel", rate=1.0), 2),
    R=(dict(name="masked_spans", rate=0.5, mean_span=3.0), 1),
)


@method(
    family="recipes",
    paper="arXiv:2205.05131",
    where="section 3.1",
    differs="UL2's denoisers with a picture for a prefix; this project's",
)
def get_config(variant: str = "B/16") -> ConfigDict:
    return cap.get_config(variant, corruption=dict(name="mixture", of=DENOISERS))
