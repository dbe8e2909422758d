"""Recipes of the packaged base models: towers as the field's, in small, on single emoji and on scenes of them.

base          all training styles.
base_select   one style (emojione) held out of training; the recipes are chosen on this style.

Most of a run sees single emoji of 32 px with short texts, its end 64 px, scenes and their captions, as CLIPA
(arXiv:2305.07017) does. Not yet trained to the end: no numbers.
"""

from ml_collections import ConfigDict

from vlm_jax.data.emoji.splits import TRAIN_STYLES

VARIANTS = ("base", "base_select")
SIZE, SMALL = 64, 32  # pixels
LENGTH, SHORT = 32, 8  # tokens: captions of four things with two attributes each have up to 33, names 8
WIDTH = 192
AUGMENT = "random_affine(15.0, 0.1, (0.6, 1.25)) | flip | jitter(0.2, 0.4, 0.8) | random_grey(0.2)"
NAME = "random_caption('name/en', 'keywords/en', join=' ')"
CAPTION = "random_caption('caption', 'sub_captions', weights=(3, 1))"
FOILS = ", ".join(f"'foils/{kind}'" for kind in ("object", "attribute", "relation", "count", "order"))
KEEP = "'image', 'token_ids', 'concept'"


def tokenize(length: int) -> str:
    return f"lower | tokenize({length}, bos=False)"


def preprocess(size: int) -> str:
    return f"decode(exif=True) | resize({size}) | normalize"


def two_towers(variant: str, penalty: str) -> ConfigDict:
    """CLIP's or SigLIP's towers; captions that are wrong by a word stand beside those of the scenes (NegCLIP)."""
    styles = [style for style in TRAIN_STYLES if variant == "base" or style != "emojione"]
    wrong = f"captions(1, {FOILS}, ops=lower, least=0) | tokenize({LENGTH}, bos=False, key='texts', to='texts')"
    emoji = lambda size: f"decode | resize({size}) | cache | {AUGMENT} | normalize | {NAME}"
    ends = f"{tokenize(LENGTH)} | {wrong} | keep({KEEP}, 'texts')"
    single = dict(uri="tfds:emoji", split="train", where=dict(style=styles))
    several = dict(uri=f"scenes:?size={SIZE}&styles={','.join(styles)}", split="train")
    names = dict(type="zeroshot", uri="tfds:emoji", label="concept", classes="emoji:seen", every="10%")
    return ConfigDict(
        dict(
            seed=0,
            batch_size=256,
            duration="1M examples",
            tokenizer="emoji",
            preprocess=preprocess(SIZE),
            tokenize=tokenize(LENGTH),
            data=dict(
                sources=dict(
                    emoji=single | dict(ops=f"{emoji(SIZE)} | {ends}"),
                    scenes=several | dict(ops=f"jitter(0.2, 0.2, 0.2) | normalize | {CAPTION} | {ends}"),
                ),
                workers=0,
            ),
            model=towers(penalty),
            objective=dict(name="contrastive", penalty=penalty, targets="concept", negatives="texts"),
            optimizer=dict(
                name="muon", lr=3e-3, ns_steps=3, weight_decay=0.1, schedule=dict(name="cosine", warmup="2%")
            ),
            stages=(
                dict(
                    share="90%",
                    data=dict(sources=None, **single, ops=f"{emoji(SMALL)} | {tokenize(SHORT)} | keep({KEEP})"),
                    model=dict(image=dict(image_size=SMALL)),
                    objective=dict(negatives="in_batch"),
                    preprocess=preprocess(SMALL),
                    tokenize=tokenize(SHORT),
                ),
                dict(share="10%"),
            ),
            evals={
                "base": dict(unseen_style=names | dict(split="unseen_style")),
                "base_select": dict(emojione=names | dict(split="train", where=dict(style=["emojione"]))),
            }[variant],
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=2),
            log=dict(every="20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )


def towers(penalty: str) -> dict:
    """The section `model`."""
    tower = dict(width=WIDTH, heads=3, mlp_dim=4 * WIDTH, out_dim=WIDTH)
    image = dict(patch=8, depth=6, image_size=SIZE, **tower)
    text = dict(vocab_size=2985, length=LENGTH, depth=4, **tower)
    if penalty == "sigmoid":  # SigLIP's: attention pooling; the last place, whatever it holds
        image, text = image | dict(pool="map"), text | dict(pool="last")
    else:  # CLIP's: a class token; causal, read at the end
        image |= dict(pool="tok", cls_position=True)
        text |= dict(pool="eos", eos_id=2, causal=True, pad_mask=True)
    return dict(image=image, text=text, scale_init=10.0, bias_init=-10.0 if penalty == "sigmoid" else None)
