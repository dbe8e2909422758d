"""AIMv2: a decoder predicts the picture, patch by patch, and then its text (Fini et al. 2024, arXiv:2411.14402).

    python -m vlm_jax.train --config=configs/aimv2.py:tiny --workdir=runs/aimv2_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/aimv2.py:L/14 --workdir=runs/aimv2_l14 \\
        --config.data.uri='wds:/data/pairs/{00000..99999}.tar' --config.mesh.fsdp=8

L/14, H/14, 1B/14 and 3B/14 follow tables 1 and A1 of the paper: 1.5M steps of batch 8,192, one decoder for all sizes.
"""

from ml_collections import ConfigDict

from configs import cap
from vlm_jax.catalogue import method

ALPHA = 0.4  # table 9c
SIZES = {  # width (table 1), heads and mlp_dim of the released towers, learning rate (table A1)
    "L/14": (1024, 8, 2816, 1e-3),
    "H/14": (1536, 12, 4096, 8e-4),
    "1B/14": (2048, 16, 5632, 8e-4),
    "3B/14": (3072, 24, 8192, 4e-4),
}
OBJECTIVE = dict(terms=dict(captioning=dict(), next_patch=dict(weight=ALPHA)))
SWIGLU = dict(norm="rmsnorm", norm_eps=1e-5, gated=True, activation="silu", attn_bias=False, mlp_bias=False)
TEXT = "lower | tokenize(77, bos=False)"


@method(
    family="recipes",
    system="AIMv2",
    paper="arXiv:2411.14402",
    where="section 2.1",
    differs="next patches, then next tokens, behind prefix attention",
)
def get_config(variant: str = "L/14") -> ConfigDict:
    if variant not in SIZES:
        return with_patches(cap.get_config(variant))
    width, heads, mlp_dim, lr = SIZES[variant]
    blocks = dict(SWIGLU, scan=True, remat="full")
    return ConfigDict(
        dict(
            batch_size=8192,
            duration="1500000 steps",
            tokenizer="sentencepiece:c4_en.model",
            preprocess="decode(exif=True) | resize_shortest(224) | central_crop(224) | normalize('clip')",
            tokenize=TEXT,
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops="decode(exif=True) | random_resized_crop(224, (0.4, 1.0)) | flip | normalize('clip')"
                f" | caption('txt') | {TEXT} | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                name="next_patch_captioner",
                image=dict(patch=14, image_size=224, width=width, depth=24, heads=heads, mlp_dim=mlp_dim, **blocks),
                decoder=dict(
                    vocab_size=32_000, length=77, width=1024, depth=12, heads=8, mlp_dim=2816, embed_std=0.02, **blocks
                ),
                dtype="bfloat16",
            ),
            objective=OBJECTIVE,
            optimizer=dict(
                name="adamw",
                lr=lr,
                b1=0.9,
                b2=0.95,
                weight_decay=1e-4,
                decay="schedule",
                clip_norm=1.0,
                schedule=dict(name="cosine", warmup="12500 steps", end=1e-5 / lr),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def with_patches(config: ConfigDict) -> ConfigDict:
    """A captioner's config whose decoder reads the picture as a prefix and predicts it, too."""
    config.model.name = "next_patch_captioner"
    config.model.decoder.mask_token = False
    config.objective = OBJECTIVE
    return config
