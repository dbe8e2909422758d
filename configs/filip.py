"""FILIP: CLIP that compares patches with words (Yao et al. 2022, arXiv:2111.07783).

    python -m vlm_jax.train --config=configs/filip.py:tiny --workdir=runs/filip_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/filip.py:B/32 --workdir=runs/filip_b32 \\
        --config.data.uri='wds:/data/laion/{00000..41455}.tar' --config.mesh.fsdp=8

Only the similarity differs from CLIP: tokens are compared in 256 dimensions (section 3.1).
"""

from ml_collections import ConfigDict

from configs import clip
from vlm_jax.catalogue import method


@method(
    family="recipes",
    paper="arXiv:2111.07783",
    where="section 3.1",
    differs="CLIP whose patches and words are compared",
)
def get_config(variant: str = "B/32") -> ConfigDict:
    config = clip.get_config(variant)
    for tower in (config.model.image, config.model.text):
        tower.pool = "all"
    if variant in clip.TOWERS:
        config.model.image.out_dim = config.model.text.out_dim = 256
        config.model.text.pool_exclude = (0,)  # the id of padding and of "!"
    config.objective.similarity = "token_wise"
    return config
