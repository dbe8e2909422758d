"""CLIP on scenes of the embedded emoji, with other texts: hard negatives, paraphrases, tags, templates.

    vlm-jax train --config=contrastive_texts:hard_negatives --workdir=runs/hard_negatives    # on 2 CPU cores
    vlm-jax train --config=contrastive_texts:hard_negatives-smoke --workdir=runs/texts_smoke    # seconds: does it run?

Variants: the keys of `METHODS`, each also with `-select` (one style held out) and `-smoke`, see configs/embedded.py.
The methods combine: a variant is ops that make texts, an objective that reads them, and changes of the model. To
fine-tune a model with them, set `model_init`. `vlm-jax methods NAME` says what a method changes, and where it was
published. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import SCENE_SIZE, embedded, on_scenes
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

LENGTH = 32  # tokens
TOKENIZE = f"tokenize({LENGTH}, bos=False, eos=False)"
TOKENIZE_TEXTS = f"each('texts', lower) | tokenize({LENGTH}, bos=False, eos=False, key='texts', to='texts')"
FACTS = "objects='objects', relations='relations'"
CAPTION = f"{TOKENIZE_TEXTS} | lower | {TOKENIZE}"
WRONG = f"caption('caption') | hard_negatives(2, foils='foils', {FACTS}) | {CAPTION}"
SWAPPED = f"caption('caption') | hard_negatives(1, kinds=('order',), foils='foils', {FACTS}) | {CAPTION}"
KEEP = "keep('image', 'token_ids', 'concept', 'texts')"

ALONE = f"lower | {TOKENIZE} | keep('image', 'token_ids', 'concept')"
TEMPLATES = "'{}', 'one can see {}', 'the picture shows {}', 'here {} can be found', 'look: {}', '{}, drawn by hand'"

CLIP = dict(name="contrastive", targets="concept")
TOKENS = dict(image=dict(pool="gap"), text=dict(pool="mean", pad_mask=True))  # whose heads tokens can pass alone
METHODS = {  # changes of the model, the objective, ops after those on the picture
    "hard_negatives": ({}, CLIP | dict(negatives="texts"), f"{WRONG} | {KEEP}"),
    "wrong_texts": (
        TOKENS,
        dict(
            terms=dict(
                contrastive=CLIP,
                wrong_texts=dict(weight=0.5),
                wrong_words=dict(name="wrong_texts", scores="local", weight=0.2),
            )
        ),
        f"{WRONG} | {KEEP}",
    ),
    "knowledge": (
        {},
        dict(terms=dict(knowledge=dict(strength=0.2, targets="concept"), semantic_margin=dict())),
        f"{SWAPPED} | triples(6, 4) | {KEEP[:-1]}, 'triples')",
    ),
    "semantic_margin": ({}, dict(terms=dict(contrastive=CLIP, semantic_margin=dict())), f"{SWAPPED} | {KEEP}"),
    "shear": ({}, CLIP, f"random_caption('caption', 'long_caption') | shear(key='text', like='caption') | {ALONE}"),
    "random_template": ({}, CLIP, f"caption('caption') | random_template({TEMPLATES}) | {ALONE}"),
    "tag_softmax": (
        {},
        dict(name="tag_softmax", resample=0.5, rare=0.01),
        f"caption('tags', join=' ') | lower | bag | {TOKENIZE} | keep('image', 'token_ids', 'concept', 'tags')",
    ),
}


@method(family="recipes", paper="arXiv:2103.00020", differs="CLIP with other texts: hard negatives, tags, templates")
def get_config(variant: str = "hard_negatives") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{name}` of this config; expected one of: {', '.join(METHODS)}")
    config = embedded(size or "tiny", penalty="softmax")
    model, objective, texts = METHODS[name]
    on_scenes(config, size, texts, f"lower | {TOKENIZE}", LENGTH)
    for side in ("image", "text"):
        config.model[side] = ConfigDict(config.model[side].to_dict() | model.get(side, {}))
    config.objective = objective
    config.evals.prompts = dict(
        type="prompt_spread",
        uri="tfds:emoji",
        split="unseen_style",
        label="concept",
        classes="emoji:seen",
        templates=("a {}", "{} {}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "there is a {}"),
    )
    config.evals.foils = dict(
        type="foils",
        uri=f"scenes:?size={SCENE_SIZE}&examples={200 if size == 'smoke' else 2000}",
        split="unseen_concepts",
        caption="caption",
        foils="foils",
    )
    return config
