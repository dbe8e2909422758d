"""SigLIP: two towers, the pairwise sigmoid loss (Zhai et al. 2023, arXiv:2303.15343).

    python -m vlm_jax.train --config=configs/siglip.py:tiny --workdir=runs/siglip_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/siglip.py:B/16 --workdir=runs/b16 \\
        --config.data.uri='wds:/data/laion/{00000..41455}.tar' --config.mesh.fsdp=8

B/32, B/16, L/16, L/14 and So400m/14 follow section 4 of the paper: 32k batch, Adafactor, a 1 / sqrt(step) schedule.
"""

from ml_collections import ConfigDict

from configs.embedded import two_towers
from vlm_jax.catalogue import method

VARIANTS = ("B/32", "B/16", "L/16", "L/14", "So400m/14")


@method(
    family="recipes",
    paper="arXiv:2303.15343",
    where="section 3",
    differs="two towers, every pair judged by itself",
)
def get_config(variant: str = "B/16") -> ConfigDict:
    if variant not in VARIANTS:
        return two_towers(variant, penalty="sigmoid")
    size = variant.split("/")[0]
    tower = dict(scan=True, remat="dots")
    remat = "dots" if size == "B" else "full"
    width = {"B": 768, "L": 1024, "So400m": 1152}[size]
    return ConfigDict(
        dict(
            batch_size=32_768,
            accumulate=1,
            duration="9B examples",
            tokenizer="sentencepiece:c4_en.model",
            preprocess="decode(exif=True) | resize(224, method='bilinear') | normalize",
            tokenize="lower | tokenize(64, bos=False)",
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops="decode(exif=True) | resize(224) | normalize"
                " | caption('txt') | lower | tokenize(64, bos=False) | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                image=dict(variant=variant, image_size=224, pool="map", **tower | dict(remat=remat)),
                text=dict(
                    variant=size, vocab_size=32_000, length=64, pool="last", out_dim=width, head_bias=True, **tower
                ),
                scale_init=10.0,
                bias_init=-10.0,
                dtype="bfloat16",
            ),
            objective=dict(name="contrastive", penalty="sigmoid"),
            optimizer=dict(
                name="adafactor",
                lr=1e-3,
                beta2_cap=0.95,
                weight_decay=1e-4,
                clip_norm=1.0,
                schedule=dict(name="rsqrt", warmup="20000 steps", cooldown="20000 steps"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )
