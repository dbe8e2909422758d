"""OpenVision 2: captions alone teach the tower; the decoder sees a third of it (Liu et al. 2025, arXiv:2509.01644).

    python -m vlm_jax.train --config=configs/openvision2.py:tiny --workdir=runs/openvision2_tiny   # 2 CPU cores

    python -m vlm_jax.train --config=configs/openvision2.py:L/14 --workdir=runs/openvision2_l14 \\
        --config.data.uri='wds:/data/recap/{00000..99999}.tar' --config.mesh.fsdp=8

L/14 and H/14 have the numbers of the paper and its code: 10,000 ImageNet epochs of pictures of 84 px, 800 of 224 px;
batch 32,768; 35 % of the tokens, before the text in a causal decoder without positions of its own; BERT's vocabulary.
The paper halves the batch and starts another, lower schedule for 224 px; here one cosine ends with them.
"""

from ml_collections import ConfigDict

from configs import cap
from vlm_jax.catalogue import method

KEEP = 0.35
DECODERS = {  # width, depth, heads, mlp_dim: those of the released code
    "L/14": dict(width=768, depth=12, heads=12, mlp_dim=3072),
    "H/14": dict(width=1024, depth=24, heads=16, mlp_dim=4096),
}
TEXT = "lower | tokenize(128, bos=False)"


def pictures(size: int) -> dict:
    """The sections of pictures of a size: training's and evaluation's ops."""
    ops = f"random_resized_crop({size}, (0.4, 1.0), method='bilinear') | jitter(0.32, 0.32, 0.32) | random_grey(0.2)"
    return dict(
        data=dict(
            uri="wds:/data/recap_datacomp_1b/{00000..99999}.tar",
            ops=f"decode(exif=True) | {ops} | normalize('imagenet') | caption('txt') | {TEXT}"
            " | keep('image', 'token_ids')",
            workers=32,
        ),
        preprocess=f"decode(exif=True) | resize({size}, method='bilinear') | normalize('imagenet')",
    )


@method(
    family="recipes",
    system="OpenVision 2",
    paper="arXiv:2509.01644",
    where="section 2.2",
    differs="captions alone; a third of the picture's tokens stand before the text",
)
def get_config(variant: str = "L/14") -> ConfigDict:
    if variant not in DECODERS:
        return as_prefix(cap.get_config(variant))
    tower = dict(scan=True, remat="full")
    return ConfigDict(
        dict(
            batch_size=32_768,
            duration="13.84B examples",  # 10,800 x 1,281,167
            tokenizer="wordpiece:bert_base_uncased.txt",
            tokenize=TEXT,
            **pictures(224),
            model=dict(
                name="prefix_captioner",
                keep=KEEP,
                image=dict(variant=variant, image_size=224, posemb="sincos2d", **tower),
                decoder=dict(
                    vocab_size=32_000,
                    length=128,
                    posemb="none",
                    embed_std=0.02,
                    logits_bias=False,
                    **DECODERS[variant],
                    **tower,
                ),
                dtype="bfloat16",
            ),
            objective=dict(name="captioning", mean="token", weight=2.0),
            optimizer=dict(
                name="adamw",
                lr=1.024e-3,
                b1=0.9,
                b2=0.95,
                mu_dtype="bfloat16",
                weight_decay=0.2,
                schedule=dict(name="cosine", warmup="1564 steps"),
            ),
            stages=(
                dict(share="92.6%", model=dict(image=dict(image_size=84)), **pictures(84)),
                dict(share="7.4%"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def as_prefix(config: ConfigDict) -> ConfigDict:
    """A captioner's config with the picture as the text's prefix, of which training keeps a share."""
    config.model.update(dict(name="prefix_captioner", keep=KEEP))
    config.model.decoder.mask_token = False
    return config
