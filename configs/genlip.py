"""GenLIP: one transformer reads the picture and then writes the caption (Fang et al. 2026, arXiv:2605.00809).

    python -m vlm_jax.train --config=configs/genlip.py:tiny --workdir=runs/genlip_tiny   # embedded data, 2 CPU cores

    python -m vlm_jax.train --config=configs/genlip.py:L/16 --workdir=runs/genlip_l16 \\
        --config.data.uri='wds:/data/recap/{00000..99999}.tar' --config.mesh.fsdp=8

L/16, So400m/16 and g/16 follow tables 1 and 2 of the paper: 8B examples of 224 px, then 37M larger ones. What differs:
positions are learned, not rotary; larger pictures are squares of 512 px, the paper's largest number of patches, not of
native size; they have the batch of the first stage and the end of its schedule; texts are not packed.
"""

from ml_collections import ConfigDict

from configs import cap
from vlm_jax.catalogue import method

SIZES = {  # table 1, and drop path and warm-up of table 2
    "L/16": (dict(width=1024, depth=24, heads=16, mlp_dim=2816, drop_path=0.1), 32_768, "0.7%"),
    "So400m/16": (dict(width=1152, depth=27, heads=16, mlp_dim=3072, drop_path=0.1), 32_768, "0.7%"),
    "g/16": (dict(width=1536, depth=40, heads=24, mlp_dim=4096, drop_path=0.2), 49_152, "2%"),
}
TEXT = "tokenize(128, bos=False)"


def pictures(size: int) -> dict:
    """The sections of pictures of a size: training's and evaluation's ops."""
    square = f"decode(exif=True) | resize_shortest({size}) | central_crop({size}) | normalize"
    return dict(
        data=dict(
            uri="wds:/data/recap_datacomp_1b/{00000..99999}.tar",
            ops=f"{square} | caption('txt') | {TEXT} | keep('image', 'token_ids')",
            workers=32,
        ),
        preprocess=square,
    )


@method(
    family="recipes",
    system="GenLIP",
    paper="arXiv:2605.00809",
    where="section 3.3",
    differs="one transformer with gated attention, whose tokens of the picture see no text",
)
def get_config(variant: str = "L/16") -> ConfigDict:
    if variant not in SIZES:
        return as_one_tower(cap.get_config(variant))
    sizes, batch_size, warmup = SIZES[variant]
    tower = dict(patch=16, image_size=512, gated=True, activation="silu", attn_gate=True, layer_scale=0.1)
    return ConfigDict(
        dict(
            batch_size=batch_size,
            duration="8.037B examples",
            tokenizer="json:qwen3/tokenizer.json",
            tokenize=TEXT,
            **pictures(512),
            model=dict(
                name="one_tower_captioner",
                image=dict(**tower, **sizes, scan=True, remat="full"),
                decoder=dict(vocab_size=151_936, length=128, embed_std=0.02, logits_bias=False),
                dtype="bfloat16",
            ),
            objective=dict(name="captioning", mean="token"),
            optimizer=dict(
                name="adamw",
                lr=1e-3,
                b1=0.9,
                b2=0.95,
                weight_decay=0.01,
                clip_norm=1.0,
                schedule=dict(name="cosine", warmup=warmup, end=1e-3),
            ),
            stages=(
                dict(share="99.5%", model=dict(image=dict(image_size=224)), **pictures(224)),
                dict(share="0.5%"),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def as_one_tower(config: ConfigDict) -> ConfigDict:
    """A captioner's config whose image tower writes: as many blocks as tower and decoder had, of the tower's width."""
    image, decoder = config.model.image, config.model.decoder
    image.depth += decoder.depth
    image.attn_gate = True
    decoder = dict(vocab_size=decoder.vocab_size, length=decoder.length)
    config.model = dict(name="one_tower_captioner", image=image.to_dict(), decoder=decoder)
    return config
