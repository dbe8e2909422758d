"""CLIP with a basic or a strong recipe, and self-supervision across modalities beside it (arXiv:2305.08675).

    vlm-jax train --config=clip_rocket:strong --workdir=runs/rocket                    # on 2 CPU cores
    vlm-jax train --config=clip_rocket:strong-byol --workdir=runs/byolip
    vlm-jax train --config=clip_rocket:basic-byol-smoke --workdir=runs/rocket_smoke    # seconds: does it run?

`basic` crops pictures and compares them with their names. `strong` adds two augmented views of each picture and of
its text, which are contrasted through projectors of their own, label smoothing and dropout. Either alone or with a loss
of `LOSSES`: across the plain pair, or, with the strong recipe, across the views. Each also with `-select` and `-smoke`,
see configs/embedded.py. The authors' ResNets, synonyms and data are left out. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import CONTENT, EMBEDDED, LENGTH, SIZE, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

HEAD = dict(hidden=512, out=128)
AVERAGE = dict(average=dict(decay=0.99))
LOSSES = {  # as in the authors' code, but for sizes: SiamLIP and BYOLIP have 2 - 2 cos, SwALIP 0.2, BarLIP 0.025
    "simsiam": dict(projector=HEAD, predictor=dict(hidden=128), weight=2.0),
    "byol": dict(projector=HEAD, predictor=dict(hidden=512), weight=0.5),
    "barlow_twins": dict(projector=HEAD, weight=0.025),
    "swav": dict(projector=HEAD, prototypes=512, weight=0.2),
}
STRONG = (
    f"random_resized_crop({SIZE}, scale=(0.3, 1.0)) | flip | jitter(0.4, 0.4, 0.4) | random_grey(0.2)"
    " | random_blur(0.5, sigma=(0.1, 1.0)) | normalize"
)
WEAK = f"random_resized_crop({SIZE}, scale=(0.7, 1.0)) | normalize"
SMOOTH = dict(name="softmax", label_smoothing=0.1)


@method(
    family="recipes",
    system="CLIP-rocket",
    paper="arXiv:2305.08675",
    differs="CLIP with a strong recipe, and self-supervision across modalities with either recipe",
)
def get_config(variant: str = "strong") -> ConfigDict:
    recipe, *rest = variant.split("-")
    size = rest.pop() if rest and rest[-1] in EMBEDDED else "tiny"
    if recipe not in ("basic", "strong") or len(rest) > 1 or not set(rest) <= LOSSES.keys():
        raise UserError(
            f"there is no variant `{variant}` of clip_rocket; expected basic or strong, then one of: "
            f"{', '.join(f'-{name}' for name in LOSSES)}, then one of: {', '.join(f'-{name}' for name in EMBEDDED)}"
        )
    config = embedded(size, penalty="softmax")
    strong = recipe == "strong"
    tokens = f"tokenize({LENGTH}, bos=False, eos=False"
    views = f"views('views', 2, {STRONG}) | " if strong else ""
    texts = f" | text_views(2, drop=0.1, swaps=1) | {tokens}, key='texts', to='texts')" if strong else ""
    kept = "'image', 'token_ids', 'concept'" + (", 'views', 'texts'" if strong else "")
    config.data.ops = (
        f"{CONTENT} | cache | {views}{WEAK} | random_caption('name/en', 'keywords/en', join=' ') | lower{texts}"
        f" | {tokens}) | keep({kept})"
    )
    terms = dict(contrastive=dict(targets="concept"))
    if strong:
        terms["contrastive"]["weight"] = 2 / 3
        terms["projected_contrast"] = dict(projector=HEAD, penalty=SMOOTH, targets="concept", weight=4 / 3)
        config.model.text.dropout = 0.1
    for name in rest:
        terms[name] = LOSSES[name] | dict(of=("views", "texts") if strong else ("image", "text"))
    config.objective = dict(terms=terms) | (dict(teachers=AVERAGE) if "byol" in rest else {})
    return config
