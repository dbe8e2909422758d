"""CLIP on the embedded data with one part of another method: what is compared with what, and how.

    vlm-jax train --config=contrastive:mixed --workdir=runs/mixed               # minutes on 2 CPU cores
    vlm-jax train --config=contrastive:mixed-smoke --workdir=runs/mixed_smoke   # seconds: does it run?

Variants: the keys of `METHODS`, each also with `-select` and `-smoke`, see configs/embedded.py. The methods combine:
their sections are parts of one objective and one model. `vlm-jax methods NAME` says what a method changes, and where it
was published. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import LENGTH, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

CLIP = dict(name="contrastive", targets="concept")
TOKENS = dict(image=dict(pool="all"), text=dict(pool="all"))
NO_POOL = dict(image=dict(pool="none", out_dim=None), text=dict(pool="none", out_dim=None))
METHODS = {  # changes of the model, the objective
    "focal": ({}, CLIP | dict(penalty=dict(name="focal", gamma=2.0))),
    "multiple_instance": (TOKENS, CLIP | dict(similarity="multiple_instance")),
    "wasserstein": (dict(space="gaussian"), CLIP | dict(similarity="wasserstein")),
    "codes": (NO_POOL | dict(space=dict(name="codes", size=1024, width=128)), CLIP),
    "lexical": (NO_POOL | dict(space="lexical"), dict(terms=dict(contrastive=CLIP, overuse=dict(weight=0.1)))),
    "boxes": (NO_POOL | dict(space=dict(name="boxes", concepts=2048, width=32)), dict(name="entailment")),
    "mixed": ({}, dict(terms=dict(contrastive=CLIP, mixed=dict(weight=0.1, targets="concept")))),
    "separation": (
        dict(shared=True, image=dict(pool="gap", depth=1)),
        dict(terms=dict(contrastive=CLIP, separation=dict(weight=0.5))),
    ),
    "class_pairs": ({}, dict(terms=dict(contrastive=CLIP, class_pairs=dict(weight=0.1)))),
    "arc_margin": ({}, dict(name="arc_margin", classes=2048, scale=30.0, margin=0.3)),
    "neighbours": ({}, dict(name="neighbours", size=4096)),
    "moco": (
        {},
        dict(
            name="moco",
            of=("image", "text"),
            projector=dict(layers=0),
            size=4096,
            teachers=dict(momentum=dict(decay=0.99)),
        ),
    ),
    "entities": (
        {},
        dict(
            terms=dict(
                contrastive=CLIP,
                entities=dict(entities="emoji:seen", tokenize=f"lower | tokenize({LENGTH}, bos=False, eos=False)"),
            ),
            teachers=dict(prompter=dict(decay=0.999)),  # or a checkpoint trained by contrast, spec=...
        ),
    ),
}


@method(family="recipes", paper="arXiv:2103.00020", differs="CLIP with one part of another method")
def get_config(variant: str = "mixed") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{variant}` of this config; expected one of: {', '.join(METHODS)}")
    config = embedded(size or "tiny", penalty="softmax")
    model, objective = METHODS[name]
    for side in ("image", "text"):
        config.model[side] = ConfigDict(config.model[side].to_dict() | model.get(side, {}))
    config.model.update({key: value for key, value in model.items() if key not in ("image", "text")})
    config.objective = objective
    return config
