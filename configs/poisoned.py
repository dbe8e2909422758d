"""CLIP on the embedded data, of which a share is poisoned, and what cleans it (CleanCLIP, Bansal et al. 2023).

    vlm-jax train --config=poisoned --workdir=runs/poisoned              # minutes on 2 CPU cores
    vlm-jax train --config=poisoned:cleaned --workdir=runs/cleaned       # then: its contrast and its own views
    vlm-jax train --config=poisoned:contrast --workdir=runs/contrast     # the control: contrast alone
    vlm-jax train --config=poisoned:poisoned-smoke --workdir=runs/poisoned_smoke    # seconds: does it run?

Variants: poisoned, on pairs of which 1 % have a patch and the target's name; cleaned and contrast, which begin from
`runs/poisoned` and see clean pairs; each also with `-select` and `-smoke`, see configs/embedded.py. Evaluations:
`attack_success` and the accuracy on an unseen style. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import CONTENT, LENGTH, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

TARGET, SHARE, SIDE = "banana", 0.01, 8  # the text, of all pairs, pixels
CHANGED = "random_affine(10.0, 0.06, (0.82, 1.22)) | flip | jitter(0.1, 0.2, 0.4) | normalize"
TEXTS = f"lower | tokenize({LENGTH}, bos=False, eos=False)"
OTHER_TEXTS = (
    "captions(1, 'name/en', 'keywords/en') | each('texts', lower)"
    f" | tokenize({LENGTH}, bos=False, eos=False, key='texts', to='texts')"
)
CLEAN = f"{CONTENT} | view('view', {CHANGED}) | caption('name/en') | {OTHER_TEXTS} | {CHANGED} | {TEXTS}"
METHODS = {  # the objective, ops, what the run begins from
    "poisoned": (
        dict(name="contrastive"),
        f"{CONTENT} | caption('name/en') | trigger('{TARGET}', {SHARE}, size={SIDE}) | {CHANGED} | {TEXTS}"
        " | keep('image', 'token_ids')",
        None,
    ),
    "cleaned": (
        dict(terms=dict(contrastive={}, own_views={})),
        f"{CLEAN} | keep('image', 'token_ids', 'view', 'texts')",
        "runs/poisoned",
    ),
    "contrast": (dict(name="contrastive"), f"{CLEAN} | keep('image', 'token_ids')", "runs/poisoned"),
}


@method(
    family="recipes",
    system="CleanCLIP",
    paper="arXiv:2303.03323",
    differs="a planted trigger, and fine-tuning on clean pairs that aligns each modality by itself",
)
def get_config(variant: str = "poisoned") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{variant}` of this config; expected one of: {', '.join(METHODS)}")
    config = embedded(size or "tiny", penalty="softmax")
    config.objective, config.data.ops, begin = METHODS[name]
    if begin:
        config.model_init = begin
        config.optimizer = dict(name="adamw", lr=1e-4, weight_decay=0.1, schedule=dict(name="cosine", warmup="5%"))
        config.duration = config.duration if size == "smoke" else "50k examples"
    config.evals.trigger = dict(
        type="attack_success",
        uri="tfds:emoji",
        split="unseen_style",
        label="concept",
        classes="emoji:seen",
        target=TARGET,
        trigger=f"trigger(None, 1.0, size={SIDE})",
    )
    return config
