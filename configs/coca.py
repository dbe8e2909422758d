"""CoCa: contrastive and captioning on one image tower (Yu et al. 2022, arXiv:2205.01917).

    python -m vlm_jax.train --config=configs/coca.py:tiny --workdir=runs/coca_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/coca.py:L/14 --workdir=runs/coca_l14 \\
        --config.data.uri='wds:/data/laion/{00000..41455}.tar' --config.mesh.fsdp=8

B/32 and L/14 have the sizes of open_clip's released models; the losses' weights are 1 and 2, as in section 4.1.
"""

from ml_collections import ConfigDict

from configs.embedded import coca
from vlm_jax.catalogue import method

SIZES = {"B/32": (512, 12, 8), "L/14": (768, 12, 12)}  # width, depth and heads of text tower and decoder


@method(
    family="recipes",
    paper="arXiv:2205.01917",
    where="section 3.2",
    differs="contrastive and captioning on one image tower",
)
def get_config(variant: str = "L/14") -> ConfigDict:
    if variant not in SIZES:
        return coca(variant)
    width, depth, heads = SIZES[variant]
    common = dict(activation="gelu", norm_eps=1e-5, scan=True, remat="dots")
    words = dict(width=width, depth=depth, heads=heads, vocab_size=49_408, length=76, start_id=49_406, **common)
    ops = "tokenize(76)"
    image = dict(cls=True, cls_position=True, patch_bias=False, pre_norm=True, **common)
    return ConfigDict(
        dict(
            batch_size=32_768,
            duration="13B examples",
            tokenizer="clip",
            preprocess="decode(exif=True) | resize_shortest(224) | central_crop(224) | normalize('clip')",
            tokenize=ops,
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops="decode(exif=True) | random_resized_crop(224, scale=(0.9, 1.0)) | normalize('clip')"
                f" | caption('txt') | {ops} | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                name="coca",
                image=dict(variant=variant, image_size=224, **image),
                pool=dict(width=width, queries=256, heads=8),
                text=words,
                decoder=dict(words, logits_bias=False),
                out_dim=width,
                dtype="bfloat16",
            ),
            objective=dict(
                terms=dict(
                    contrastive=dict(penalty="softmax", max_scale=100.0), captioning=dict(mean="token", weight=2.0)
                )
            ),
            optimizer=dict(
                name="adamw",
                lr=1e-3,
                b1=0.9,
                b2=0.98,
                eps=1e-6,
                weight_decay=0.1,
                schedule=dict(name="cosine", warmup="10000 steps"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )
