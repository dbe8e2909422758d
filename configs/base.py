"""Recipes of the packaged base models: towers as the field's, in small, on single emoji and on scenes of them.

base                all training styles.
base_multilingual   the same, with names and keywords in nine languages.
base_select         one style (emojione) held out of training; the recipes are chosen on this style.

Most of a run sees single emoji of 32 px with short texts, its end 64 px, scenes and their captions, as CLIPA
(arXiv:2305.07017) does. In the first part embeddings of pictures follow those of `clip:tiny` (CLIP-KD,
arXiv:2307.12732): its head reads patches by their place, which a class token takes long to learn. For
base_select, the teacher is the run runs/clip_select of `clip:select`. All but `clip:base` begin with towers of
`clip_base`, and so need a third of its examples. `pkg:vlm_jax/zoo/cappa_base` is `cappa.py:base`, seed 0, in bfloat16
(params_sha256 of the run aac4e8e501c8921f..., jax 0.10.2): 160,000 examples. `siglip.py:base`, trained likewise, names
44.0 % of the unseen style and is not packaged.

`pkg:vlm_jax/zoo/clip_base` is `clip.py:base`, seed 0, in bfloat16 (params_sha256 of the run 068e81a442784d3b..., jax
0.10.2): 480,000 examples in 95 minutes on two cores, beside other work. It names 58.5 % of 732 pictures of the unseen
style; experiments/base_models has the rest. A recipe with scenes at the end of a cosine, and one foil a caption, forgot
names: 62.7 % after its first part, 45.6 % at its end.
"""

from typing import Any

from ml_collections import ConfigDict

from vlm_jax.data.emoji.splits import TRAIN_STYLES

VARIANTS = ("base", "base_multilingual", "base_select")
SIZE, SMALL = 64, 32  # pixels
LENGTH, SHORT, LONG = 32, 8, 64  # tokens: captions of four things with two attributes each have up to 33, names 8
WIDTH = 192
TOWER = dict(width=WIDTH, heads=3, mlp_dim=4 * WIDTH)
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ja", "ko", "zh")
TEACHERS = {"base_select": "runs/clip_select"}
CLIP = {"base_select": "runs/clip_base_select"}
IMAGE = dict(patch=8, depth=6, image_size=SIZE, **TOWER)
WEAK = "random_affine(10.0, 0.06, (0.82, 1.22)) | flip | jitter(0.1, 0.2, 0.4)"  # as the teacher's
FOR_TEACHER = f"view('small', crop_to_content | resize({SMALL}) | normalize)"
FOILS = tuple(f"foils/{kind}" for kind in ("object", "attribute", "relation", "count", "order"))


def tokenize(length: int) -> str:
    return f"lower | tokenize({length}, bos=False)"


def languages(variant: str) -> tuple[str, ...]:
    return LANGUAGES if variant == "base_multilingual" else ("en",)


def name(variant: str, *fields: str) -> str:
    """Returns the op that draws one of a single emoji's fields, in one of the variant's languages."""
    drawn = ", ".join(f"'{field}/{language}'" for language in languages(variant) for field in fields)
    return f"random_caption({drawn}, join=' ')"


def beds(variant: str) -> dict[str, dict[str, Any]]:
    """Returns the sources of both test beds, in training styles, without ops."""
    styles = [style for style in TRAIN_STYLES if variant != "base_select" or style != "emojione"]
    return dict(
        emoji=dict(uri="tfds:emoji", split="train", where=dict(style=styles)),
        scenes=dict(uri=f"scenes:?size={SIZE}&styles={','.join(styles)}", split="train"),
    )


def two_towers(variant: str, penalty: str) -> ConfigDict:
    """CLIP's or SigLIP's towers; captions that are wrong by a word stand beside those of the scenes (NegCLIP)."""
    tower = TOWER | dict(out_dim=128)  # the teacher's
    text = dict(vocab_size=2985, length=LENGTH, depth=4, **tower)
    if penalty == "sigmoid":  # SigLIP's: attention pooling; the last place, whatever it holds
        pools = dict(pool="map"), dict(pool="last")
    else:  # CLIP's: a class token; causal, read at the end
        pools = dict(pool="tok", cls_position=True), dict(pool="eos", eos_id=2, causal=True, pad_mask=True)
    wrong = f"captions(3, {', '.join(map(repr, FOILS))}, ops=lower, least=0)"
    wrong = f"{wrong} | tokenize({LENGTH}, bos=False, key='texts', to='texts')"
    called = f"{name(variant, 'name', 'keywords')} | {tokenize(SHORT)}"
    drawn = ["random_caption('caption', 'sub_captions', weights=(3, 1))"]
    if others := ", ".join(f"'names/{language}'" for language in languages(variant)[1:]):
        drawn.append(f"random_caption({others}, join=', ')")
    teacher = TEACHERS.get(variant, "pkg:vlm_jax/zoo/clip_tiny")
    follows = dict(name="feature_distillation", on="emoji", teacher="tiny", of=("image_embedding",), weight=10.0)
    names = dict(name="contrastive", on="emoji", penalty=penalty, targets="concept")
    captions = dict(name="contrastive", on="scenes", penalty=penalty, negatives="texts")
    config = in_two_stages(
        variant,
        model=dict(
            image=IMAGE | tower | pools[0],
            text=text | pools[1],
            scale_init=10.0,
            bias_init=-10.0 if penalty == "sigmoid" else None,
        ),
        objective=dict(
            teachers=dict(tiny=dict(spec=teacher)),
            terms=dict(names=names, follows=follows),
        ),
        names=f"{called} | keep('image', 'token_ids', 'concept')",
        names_then=f"{FOR_TEACHER} | normalize | {called} | keep('image', 'small', 'token_ids', 'concept')",
        captions=tuple(f"{op} | {tokenize(LENGTH)} | {wrong} | keep('image', 'token_ids', 'texts')" for op in drawn),
        length=LENGTH,
        then=dict(
            objective=dict(
                teachers=dict(tiny=dict(inputs=dict(image="small"))),
                terms=dict(captions=captions),
            ),
        ),
    )
    return config if (variant, penalty) == ("base", "softmax") else begun(config, variant, "image", "text")


def begun(config: ConfigDict, variant: str, *towers: str) -> ConfigDict:
    """Begins with towers of `clip_base`."""
    config.model_init = {tower: CLIP.get(variant, "pkg:vlm_jax/zoo/clip_base") for tower in towers}
    config.duration = "160k examples"
    return config


def captioner(variant: str, corruption: str | dict) -> ConfigDict:
    """Cap's tower and decoder; it writes names of single emoji, and short and long captions of scenes."""
    writes = dict(name="captioning", corruption=corruption)
    names = f"{name(variant, 'name')} | {tokenize(SHORT)} | keep('image', 'token_ids')"
    config = in_two_stages(
        variant,
        model=dict(
            name="captioner",
            image=IMAGE,
            decoder=dict(vocab_size=2985, length=LONG, depth=4, mask_token=True, **TOWER),
        ),
        objective=dict(terms=dict(names=writes | dict(on="emoji"))),
        names=names,
        names_then=f"normalize | {names}",
        captions=(
            "random_caption('caption', 'sub_captions', 'long_caption', weights=(2, 1, 2))"
            f" | {tokenize(LONG)} | keep('image', 'token_ids')",
        ),
        length=LONG,
        then=dict(objective=dict(terms=dict(captions=writes | dict(on="scenes")))),
    )
    for section in config.evals.values():
        section.every = None  # only at the end: naming by likelihood takes a minute
    return begun(config, variant, "image")


def in_two_stages(
    variant: str,
    model: dict[str, Any],
    objective: dict[str, Any],
    names: str,
    names_then: str,
    captions: tuple[str, ...],
    length: int,
    then: dict[str, Any],
) -> ConfigDict:
    """Single emoji of 32 px, then those of 64 px and scenes, as row sets `emoji` and `scenes`.

    Args:
      variant: one of `VARIANTS`.
      model: section of the config.
      objective: the same, of the first stage.
      names, names_then: ops on single emoji that make the texts, of the first stage and of the second.
      captions: ops on scenes that make the texts, one string, or a second one for names, of a source of its own.
      length: of texts, in tokens.
      then: sections that the second stage adds.
    """
    small = f"decode | crop_to_content | resize({SMALL}) | cache | {WEAK} | normalize | {names}"
    large = f"decode | resize({SIZE}) | cache | {WEAK} | {names_then}"
    emoji, scenes = beds(variant).values()
    emoji |= dict(ops=small, rows="emoji", weight=3)
    scenes |= dict(rows="scenes", weight=5 / len(captions))
    of_scenes = {
        name: scenes | dict(ops=f"jitter(0.2, 0.2, 0.2) | normalize | {ops}")
        for name, ops in zip(("scenes", "scenes_names"), captions, strict=False)
    }
    naming = dict(type="zeroshot", uri="tfds:emoji", label="concept", classes="emoji:seen")
    return ConfigDict(
        dict(
            seed=0,
            batch_size=256,
            duration="480k examples",
            tokenizer="emoji",
            preprocess=f"decode(exif=True) | resize({SIZE}) | normalize",
            tokenize=tokenize(length),
            data=dict(sources=dict(emoji=emoji), workers=0),
            model=model,
            objective=objective,
            optimizer=dict(
                name="muon",
                lr=3e-3,
                ns_steps=3,
                weight_decay=0.1,
                schedule=dict(name="constant", warmup="2%", cooldown="28%"),
            ),
            stages=(
                dict(
                    share="72%",
                    model=dict(image=dict(image_size=SMALL)),
                    preprocess=f"decode(exif=True) | crop_to_content | resize({SMALL}) | normalize",
                ),
                dict(share="28%", data=dict(sources=dict(emoji=dict(ops=large), **of_scenes)), **then),
            ),
            evals=(
                dict(emojione=naming | dict(split="train", where=dict(style=["emojione"]), every="10%"))
                if variant == "base_select"
                else dict(unseen_style=naming | dict(split="unseen_style"))  # at the end: nothing is chosen on it
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=2),
            log=dict(every="20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )
