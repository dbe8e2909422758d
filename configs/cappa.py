"""CapPa: Cap with parallel prediction of 3 of 4 captions, from the picture alone (arXiv:2306.07915, section 3.2).

    python -m vlm_jax.train --config=configs/cappa.py:tiny --workdir=runs/cappa_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/cappa.py:B/16 --workdir=runs/cappa_b16 \\
        --config.data.uri='wds:/data/webli/{00000..41455}.tar' --config.mesh.fsdp=8
"""

from ml_collections import ConfigDict

from configs import cap
from vlm_jax.catalogue import method


@method(
    family="recipes",
    system="CapPa",
    paper="arXiv:2306.07915",
    where="section 3.2",
    differs="Cap that predicts three captions in four all at once",
    claim="captioning_vs_contrastive: towers rival CLIP's under probes, likelihoods know the order of words",
)
def get_config(variant: str = "B/16") -> ConfigDict:
    return cap.get_config(variant, corruption=dict(name="parallel", rate=0.75))
