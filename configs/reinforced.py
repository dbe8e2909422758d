"""Reinforced training: a small CLIP follows teachers, asked once (MobileCLIP, Vasu et al. 2024, arXiv:2311.17049).

    python -m vlm_jax.precompute --config=configs/reinforced.py:tiny --views=8 --out=runs/reinforced
    python -m vlm_jax.train --config=configs/reinforced.py:tiny --workdir=runs/reinforced_tiny \\
        --config.data.reinforced=runs/reinforced --config.objective.teachers.tiny.stored=True

Without the last two flags, the teachers run in every step, on new views each time. `tiny` is the demo with towers of
half the width, taught by the demo's model; B/16 is the published run on 12 million pairs: two teachers, 30 views of a
picture (`jitter` in the place of RandAugment), captions and synthetic captions, and no other loss than the teachers'.
"""

from ml_collections import ConfigDict

from configs import clip
from configs.embedded import EMBEDDED
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError


@method(
    family="recipes",
    system="MobileCLIP",
    paper="arXiv:2311.17049",
    differs="a small CLIP follows the affinities of teachers, stored for some views of each example",
)
def get_config(variant: str = "tiny") -> ConfigDict:
    if variant not in (*EMBEDDED, "B/16"):
        raise UserError(f"there is no variant `{variant}` of this config; expected {', '.join(EMBEDDED)} or B/16")
    config = clip.get_config(variant)
    if variant == "B/16":
        teachers = dict(
            openai="hf:openai/clip-vit-large-patch14", datacomp="hf:laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K"
        )
        config.update(dict(batch_size=8192, duration="30000 steps"))
        config.optimizer.update(dict(lr=1e-3, b2=0.95, clip_norm=1.0))
        config.optimizer.schedule.warmup = "1000 steps"
        config.data.ops = (
            "decode(exif=True) | random_resized_crop(224) | jitter(0.4, 0.4, 0.4) | normalize('clip')"
            " | random_caption('txt', 'synthetic') | tokenize(77) | keep('image', 'token_ids')"
        )
    else:
        teachers = {"tiny": "pkg:vlm_jax/zoo/clip_tiny"}
        for tower in (config.model.image, config.model.text):
            tower.update(dict(width=64, heads=2, mlp_dim=256) if variant != "smoke" else {})
    config.objective = dict(
        name="contrastive",
        targets=dict(name="affinities", teachers=tuple(teachers)),
        teachers={name: dict(spec=spec, stored=False) for name, spec in teachers.items()},
    )
    return config
