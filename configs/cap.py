"""Cap: a picture's caption, token by token (Tschannen et al. 2023, arXiv:2306.07915).

    python -m vlm_jax.train --config=configs/cap.py:tiny --workdir=runs/cap_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/cap.py:B/16 --workdir=runs/cap_b16 \\
        --config.data.uri='wds:/data/webli/{00000..41455}.tar' --config.mesh.fsdp=8

B/16 and L/14 follow section 4.1 of the paper: batch 8,192, 3B examples, Adafactor.
"""

from ml_collections import ConfigDict

from configs import base
from configs.embedded import captioner
from vlm_jax.catalogue import method


@method(
    family="recipes",
    paper="arXiv:2306.07915",
    where="section 3.1",
    differs="an image tower learns by captioning, token by token",
)
def get_config(variant: str = "B/16", corruption: str = "causal") -> ConfigDict:
    if variant in base.VARIANTS:
        return base.captioner(variant, corruption)
    if variant not in ("B/16", "L/14"):
        config = captioner(variant, corruption)
        if variant != "smoke":
            config.batch_size, config.optimizer.lr = 64, 6e-3
            config.duration = "165k examples"  # as many FLOPs as CLIP's 295k examples: 17.3 T
        return config
    size = variant.split("/")[0]
    depth = {"B": 6, "L": 12}[size]
    return ConfigDict(
        dict(
            batch_size=8192,
            duration="366500 steps",
            tokenizer="sentencepiece:c4_en.model",
            preprocess="decode(exif=True) | resize(224, method='bilinear') | normalize",
            tokenize="lower | tokenize(64, bos=False)",
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops="decode(exif=True) | resize(224, method='bilinear') | normalize"
                " | caption('txt') | lower | tokenize(64, bos=False) | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                name="captioner",
                image=dict(variant=variant, image_size=224, scan=True, remat="dots"),
                decoder=dict(
                    variant=size,
                    depth=depth,
                    vocab_size=32_000,
                    length=64,
                    mask_token=True,
                    attn_bias=False,
                    mlp_bias=False,
                    norm_bias=False,
                    scan=True,
                    remat="dots",
                ),
                dtype="bfloat16",
            ),
            objective=dict(name="captioning", corruption=corruption),
            optimizer=dict(
                name="adafactor",
                lr=1e-3,
                weight_decay=1e-4,
                clip_norm=1.0,
                schedule=dict(name="cosine", warmup="10000 steps"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )
