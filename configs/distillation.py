"""CLIP on the embedded data that follows a teacher, or itself, by one method each; and missing modalities.

    vlm-jax train --config=distillation:similarity_distillation --workdir=runs/teachtext               # on 2 CPU cores
    vlm-jax train --config=distillation:similarity_distillation-smoke --workdir=runs/teachtext_smoke   # does it run?

Variants: the keys of `METHODS`, each also with `-select` and `-smoke`, see configs/embedded.py. The teacher is the
demo's model. In `similarity_distillation` it stands in for two teachers: one reads the names, one the keywords. In
`unmasked_tokens` the text tower is the teacher's, and locked; no text is trained on. `denoising_contrast` has towers
that share their blocks; the published model has MLPs of their own for pictures and texts. `missing_modality` trains
biases, as the paper does, here of towers that have seen nothing: set `model_init`. Where no term compares embeddings,
a linear probe evaluates. `vlm-jax methods NAME` says what a method changes, and where it was published. Not yet
measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import AUGMENTED, SIZE, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

CLIP = dict(targets="concept")
TEACHER = "pkg:vlm_jax/zoo/clip_tiny"
TOKENIZE = "lower | tokenize(8, bos=False, eos=False"
NAMES = f"caption('name/en') | {TOKENIZE})"
PAIRS = f"random_caption('name/en', 'keywords/en', join=' ') | {TOKENIZE})"
VIEW = f"view('view', random_resized_crop({SIZE}, scale=(0.4, 1.0)) | normalize)"
DISTORTED = AUGMENTED.removesuffix(" | normalize")
SMALL = dict(width=64, heads=2, mlp_dim=256)
PATCHES = dict(pool="gap", image_size=SIZE)
CONCEPTS = 2048  # more than there are
LOCKED_TEXT = ((r"text/.*|logit_scale", dict(freeze=True)), (".*", {}))
BIASES = ((r"(image|text)/.*bias|objective/.*", {}), (".*", dict(freeze=True)))
MASKED_WORDS = dict(name="denoising_contrast", of="text", mask_id=2985, share=0.15, weight=0.5)
PROBED = ("mutual_information", "missing_modality")  # which compare no embeddings
METHODS = {  # changes of the config, ops before `normalize` and after it, and further fields of the batch
    "similarity_distillation": (
        dict(
            model=dict(image=SMALL, text=SMALL),
            objective=dict(
                terms=dict(contrastive=CLIP, similarity_distillation=dict(teachers=("names", "keywords"), scale=10.0)),
                teachers=dict(
                    names=dict(spec=TEACHER),
                    keywords=dict(spec=TEACHER, inputs=dict(token_ids="keyword_ids")),
                ),
            ),
        ),
        "",
        f"caption('keywords/en', join=' ') | {TOKENIZE}, to='keyword_ids', tokenizer='emoji') | {NAMES}",
        ("keyword_ids",),
    ),
    "dynamic_distillation": (
        dict(
            model=dict(image=SMALL, text=SMALL),
            objective=dict(name="dynamic_distillation", teachers=dict(teacher=dict(spec=TEACHER)), **CLIP),
        ),
        "",
        PAIRS,
        (),
    ),
    "unmasked_tokens": (
        dict(
            model=dict(image=PATCHES | dict(depth=4), text=dict(width=128, heads=4, mlp_dim=512)),
            model_init=dict(text=TEACHER),
            objective=dict(name="unmasked_tokens", teachers=dict(teacher=dict(spec=TEACHER))),
            optimizer=dict(params=LOCKED_TEXT),
        ),
        "",
        PAIRS,
        (),
    ),
    "denoising_contrast": (
        dict(
            model=dict(shared=True, image=PATCHES | dict(depth=2), text=dict(depth=2, vocab_size=2986)),
            objective=dict(terms=dict(contrastive=CLIP, denoising_contrast={}, denoised_words=MASKED_WORDS)),
        ),
        "",
        PAIRS,
        (),
    ),
    "mutual_information": (
        dict(
            model=dict(image=PATCHES),
            objective=dict(
                name="mutual_information",
                classes=CONCEPTS,
                teachers=dict(average=dict(decay=0.996, of="image/.*")),
            ),
        ),
        VIEW,
        PAIRS,
        ("view",),
    ),
    "missing_modality": (
        dict(
            model=dict(image=PATCHES),
            objective=dict(name="missing_modality", classes=CONCEPTS),
            optimizer=dict(params=BIASES),
        ),
        "",
        f"{PAIRS} | missing(0.0, 'image') | missing(0.8, 'token_ids')",
        ("image_present", "token_ids_present"),
    ),
}


@method(family="recipes", paper="arXiv:2307.12732", differs="a small CLIP follows a teacher by one method each")
def get_config(variant: str = "similarity_distillation") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{name}` of this config; expected one of: {', '.join(METHODS)}")
    changes, views, texts, fields = METHODS[name]
    config = embedded(size or "tiny", penalty="softmax")
    del config.objective
    config.update(changes)
    kept = ", ".join(map(repr, ("image", "token_ids", "concept", *fields)))
    config.data.ops = " | ".join(filter(None, (DISTORTED, views, "normalize", texts, f"keep({kept})")))
    if name in PROBED:
        section = config.evals["emojione" if size == "select" else "unseen_style"].to_dict()
        probe = dict(type="probe", train_where=config.data.to_dict().get("where"), every=None)
        config.evals = dict(probe=section | probe)
    if size == "smoke":
        config.model.image.depth = 1 + config.model.get("shared", False)
    return config
