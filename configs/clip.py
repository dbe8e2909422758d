"""CLIP: two towers, the softmax contrastive loss over the global batch (Radford et al. 2021, arXiv:2103.00020).

    python -m vlm_jax.train --config=configs/clip.py:smoke --workdir=runs/smoke     # seconds: does it run?

    python -m vlm_jax.train --config=configs/clip.py:B/32 --workdir=runs/b32 \\
        --config.data.uri='wds:/data/laion/{00000..41455}.tar' --config.mesh.fsdp=8

B/32, B/16 and L/14 follow the paper's tables 18-20 (batch 32,768, 32 epochs); each fits 256 chips of 16 GiB.
"""

from ml_collections import ConfigDict

from configs.embedded import two_towers
from vlm_jax.catalogue import method

TOWERS = {  # image, text, embedding width, peak learning rate (tables 19 and 20)
    "B/32": ("B/32", "M", 512, 5e-4),
    "B/16": ("B/16", "M", 512, 5e-4),
    "L/14": ("L/14", "B", 768, 4e-4),
}


@method(
    family="recipes",
    paper="arXiv:2103.00020",
    where="section 2",
    differs="two towers, the softmax over the global batch",
)
def get_config(variant: str = "B/32") -> ConfigDict:
    if variant not in TOWERS:
        return two_towers(variant, penalty="softmax")
    image, text, width, lr = TOWERS[variant]
    released = dict(activation="quick_gelu", norm_eps=1e-5, out_dim=width, head_bias=False, scan=True, remat="dots")
    return ConfigDict(
        dict(
            batch_size=32_768,
            accumulate=1,
            duration="32 epochs",
            tokenizer="clip",
            preprocess="decode(exif=True) | resize_shortest(224) | central_crop(224) | normalize('clip')",
            tokenize="tokenize(77)",
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops="decode(exif=True) | random_resized_crop(224, scale=(0.9, 1.0)) | normalize('clip')"
                " | caption('txt') | tokenize(77) | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                image=dict(
                    variant=image,
                    image_size=224,
                    pool="tok",
                    cls_position=True,
                    patch_bias=False,
                    pre_norm=True,
                    **released | dict(remat="full" if variant == "L/14" else "dots"),
                ),
                text=dict(
                    variant=text, vocab_size=49_408, length=77, pool="eos", eos_id=49_407, causal=True, **released
                ),
                scale_init=1 / 0.07,
                dtype="bfloat16",
            ),
            objective=dict(name="contrastive", penalty="softmax", max_scale=100.0),
            optimizer=dict(
                name="adamw",
                lr=lr,
                b1=0.9,
                b2=0.98,
                eps=1e-6,
                weight_decay=0.2,
                schedule=dict(name="cosine", warmup="2000 steps"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )
