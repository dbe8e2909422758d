"""Continual learning: the styles of the emoji come one after the other, and what was learned first is to stay.

    vlm-jax train --config=continual:lwf --workdir=runs/lwf               # minutes on 2 CPU cores
    vlm-jax train --config=continual:lwf-smoke --workdir=runs/lwf_smoke   # seconds: does it run?

Each stage sees the pictures of one style, for as many steps as every other; the learning rate begins anew. At the end
of each stage `<style>/top1` is measured on the pictures of each style; `vlm_jax.evaluators.metrics.continual` turns
these numbers into forgetting and transfer. Variants, each also with `-smoke` (two styles):

finetune    nothing is done about forgetting.
replay      a quarter of each batch is of earlier styles, from a memory of 128 pictures of each.
merge       after each stage, half of the way back to the model before it (FoMo-in-Flux).
ewc         parameters that earlier styles need are held.
lwf         the model before the stage is a teacher of the batch's texts.
ctp         it is a teacher of who is near whom; and a queue of a momentum model that also follows it.
mod_x       it is a teacher of the contrastive matrix, where it was right.

Methods combine. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs.embedded import embedded
from vlm_jax.catalogue import method
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.errors import UserError

CLIP = dict(contrastive=dict(targets="concept"))
BEFORE = dict(before=dict(decay=1.0, refresh=True))
MOMENTUM = dict(decay=0.9, anchor="before", refresh=True)
QUEUE = dict(name="contrastive", targets="concept", negatives=dict(name="queue", size=1024))
EWC = ((".*", dict(transform=dict(name="ewc", weight=1000.0))),)
SHARE, MEMORY = 0.25, 128  # of a batch; pictures of each earlier style
METHODS = {  # changes of the config from the first stage on, and from the second on
    "finetune": ({}, {}),
    "replay": ({}, {}),
    "merge": (dict(objective=dict(teachers=BEFORE)), dict(merge=dict(teacher="before", alpha=0.5))),
    "ewc": (dict(optimizer=dict(params=EWC)), {}),
    "lwf": ({}, dict(objective=dict(terms=dict(lwf={}), teachers=BEFORE))),
    "ctp": (
        {},
        dict(objective=dict(terms=dict(momentum=QUEUE, topology={}), teachers=dict(BEFORE, momentum=MOMENTUM))),
    ),
    "mod_x": ({}, dict(objective=dict(terms=dict(off_diagonal=dict(weight=25.0)), teachers=BEFORE))),
}


@method(
    family="recipes",
    system="FoMo-in-Flux",
    paper="arXiv:2408.14471",
    differs="data sets one after the other, with replay, merging, distillation or penalties against forgetting",
)
def get_config(variant: str = "finetune") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{variant}` of this config; expected one of: {', '.join(METHODS)}")
    if size not in ("", "smoke"):
        raise UserError(f"there is no variant `{variant}` of this config; expected `{name}` or `{name}-smoke`")
    config = embedded(size or "tiny", penalty="softmax")
    styles = TRAIN_STYLES[:2] if size == "smoke" else TRAIN_STYLES
    share = f"{100 // len(styles)}%"
    config.duration = "40 steps" if size == "smoke" else "1150 steps"
    config.optimizer.schedule.update(dict(cycles=len(styles), warmup="1%"))
    first, later = METHODS[name]
    config.objective = dict(terms=CLIP)
    for section, changes in first.items():
        config[section].update(changes)
    data = {key: config.data[key] for key in ("uri", "split", "ops")}

    def source(style: str, **options) -> dict:
        return dict(data, where=dict(style=[style]), **options)

    def seen(number: int) -> dict:
        """The data of a stage: the new style, and the memory of those before."""
        earlier = styles[:number] if name == "replay" else ()
        part = SHARE / (1 - SHARE) / max(len(earlier), 1)
        memory = {f"memory_{style}": source(style, limit=MEMORY, weight=part) for style in earlier}
        return dict(sources=dict(new=source(styles[number]), **memory))

    config.data = dict(seen(0), workers=0)
    config.stages = [dict(share=share, data=seen(n), **(later if n else {})) for n in range(len(styles))]
    each = dict(type="zeroshot", uri="tfds:emoji", label="concept", classes="emoji:seen", every=share)
    config.evals = {style: dict(each, split="train", where=dict(style=[style])) for style in styles}
    if size != "smoke":
        config.evals.unseen_style = dict(each, split="unseen_style")
    return config
