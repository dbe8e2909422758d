"""Recipes on the embedded data set (emoji pictures and their names), shared by the configs.

tiny    the demo: 5 minutes on 2 CPU cores.
select  the demo with one style (emojione) held out of training; the recipe was chosen on this style.
smoke   seconds: does everything run?
"""

from ml_collections import ConfigDict

from configs import base
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.errors import UserError

SIZE = 32  # pixels
SCENE_SIZE = 64  # pixels
LENGTH = 8  # tokens
CAPTION_LENGTH = 8  # tokens, the end included: 1,497 of the 1,515 names fit
CONTENT = f"decode(exif=True) | crop_to_content | resize({SIZE})"
AUGMENTED = f"{CONTENT} | cache | random_affine(10.0, 0.06, (0.82, 1.22)) | flip | jitter(0.1, 0.2, 0.4) | normalize"


def captioner(variant: str, corruption: str | dict) -> ConfigDict:
    """The captioning counterpart of `embedded`: the same pictures, augmentation, image tower and optimizer."""
    config = embedded(variant, penalty="softmax")
    config.tokenize = f"lower | tokenize({CAPTION_LENGTH}, bos=False)"
    config.data.ops = f"{AUGMENTED} | caption('name/en') | {config.tokenize} | keep('image', 'token_ids')"
    image = config.model.image.to_dict()
    sizes = {key: image[key] for key in ("width", "heads", "mlp_dim", "activation")}
    decoder = dict(vocab_size=2985, length=CAPTION_LENGTH, depth=1, mask_token=True, **sizes)
    for key in ("pool", "out_dim"):
        del image[key]
    config.model = dict(name="captioner", image=image, decoder=decoder)
    config.objective = dict(name="captioning", corruption=corruption)
    for section in config.evals.values():
        section.every = None  # only at the end: naming by likelihood takes a minute
    return config


def coca(variant: str) -> ConfigDict:
    """Contrastive and captioning at once: texts begin with <bos>, the image tower's tokens pass a pooler."""
    config = captioner(variant, corruption="causal")
    length = CAPTION_LENGTH + 1
    config.tokenize = f"lower | tokenize({length})"
    config.data.ops = f"{AUGMENTED} | caption('name/en') | {config.tokenize} | keep('image', 'token_ids', 'concept')"
    decoder = {key: value for key, value in config.model.decoder.to_dict().items() if key != "mask_token"}
    text = decoder | dict(length=length, start_id=1)
    pool = dict(width=decoder["width"], queries=17, heads=decoder["heads"])
    image = config.model.image.to_dict()
    if variant != "smoke":
        config.duration = "208k examples"
    config.model = dict(name="coca", image=image, pool=pool, text=text, decoder=text, out_dim=decoder["width"])
    contrastive, captioning = dict(penalty="softmax", targets="concept"), dict(mean="token", weight=2.0)
    config.objective = dict(terms=dict(contrastive=contrastive, captioning=captioning))
    return config


EMBEDDED = ("tiny", "select", "smoke")


def two_towers(variant: str, penalty: str) -> ConfigDict:
    """`embedded` and `base.two_towers`."""
    return base.two_towers(variant, penalty) if variant in base.VARIANTS else embedded(variant, penalty, base.VARIANTS)


def embedded(variant: str, penalty: str, also: tuple[str, ...] = ()) -> ConfigDict:
    if variant not in EMBEDDED:
        known = ", ".join((*EMBEDDED, *also))
        raise UserError(f"there is no variant `{variant}` of this config; on the embedded data: {known}")
    tower = dict(width=128, heads=4, mlp_dim=512, out_dim=128, activation="relu")
    tokenize = f"lower | tokenize({LENGTH}, bos=False, eos=False)"
    zeroshot = dict(type="zeroshot", uri="tfds:emoji", label="concept")
    config = ConfigDict(
        dict(
            seed=0,
            batch_size=256,
            accumulate=1,
            duration="295k examples",
            tokenizer="emoji",
            preprocess=f"{CONTENT} | normalize",
            tokenize=tokenize,
            data=dict(
                uri="tfds:emoji",
                split="train",
                ops=f"{AUGMENTED} | random_caption('name/en', 'keywords/en', join=' ') | {tokenize}"
                " | keep('image', 'token_ids', 'concept')",
                workers=0,
            ),
            model=dict(
                image=dict(patch=8, depth=2, pool="concat", **tower),
                text=dict(vocab_size=2985, length=LENGTH, depth=1, pool="mean", pad_mask=True, **tower),
                scale_init=10.0,
                bias_init=-10.0 if penalty == "sigmoid" else None,
            ),
            objective=dict(name="contrastive", penalty=penalty, targets="concept"),
            optimizer=dict(
                name="muon", lr=3e-3, ns_steps=3, weight_decay=0.1, schedule=dict(name="cosine", warmup="5%")
            ),
            evals=dict(
                unseen_style=dict(split="unseen_style", classes="emoji:seen", every="25%", **zeroshot),
                unseen_concepts=dict(split="unseen_concepts", classes="emoji:held_out", **zeroshot),
                pixel_neighbour=dict(
                    type="pixel_neighbour",
                    prefix="unseen_style",
                    uri="tfds:emoji",
                    split="unseen_style",
                    train_split="train",
                    label="concept",
                    classes="emoji:seen",
                ),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="25%", keep=2),
            log=dict(every="20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )
    if variant == "select":
        held = "emojione"
        config.data.where = dict(style=[style for style in TRAIN_STYLES if style != held])
        config.evals = dict(
            emojione=dict(split="train", where=dict(style=[held]), classes="emoji:seen", every="25%", **zeroshot)
        )
    if variant == "smoke":
        for tower in (config.model.image, config.model.text):
            tower.update(dict(width=32, depth=1, mlp_dim=64))
        config.update(dict(batch_size=64, duration="40 steps"))
        config.log.every = "2 steps"
        config.checkpoint.every = "8 steps"
    return config


def on_scenes(config: ConfigDict, size: str, texts: str, tokenize: str, length: int) -> None:
    """Changes a config of `embedded` to scenes.

    Args:
      config: of two towers.
      size: the variant of `embedded`, "" for tiny.
      texts: ops that make the texts, and `keep`.
      tokenize: ops of texts in evaluation.
      length: of texts, in tokens.
    """
    styles = [style for style in TRAIN_STYLES if size != "select" or style != "emojione"]
    config.data = dict(
        uri=f"scenes:?size={SCENE_SIZE}&styles={','.join(styles)}",
        split="train",
        ops=f"jitter(0.1, 0.2, 0.4) | normalize | {texts}",
        workers=0,
    )
    config.preprocess = f"decode(exif=True) | resize({SCENE_SIZE}) | normalize"
    config.tokenize = tokenize
    config.model.text.length = length
    if size != "smoke":
        config.duration = "150k examples"
    if "pixel_neighbour" in config.evals:  # of single emoji, which the run does not see
        del config.evals.pixel_neighbour
