"""An image tower alone learns from views of pictures, without texts: DINO (arXiv:2104.14294) and its kin.

    python -m vlm_jax.train --config=configs/dino.py:smoke --workdir=runs/dino_smoke        # seconds: does it run?
    python -m vlm_jax.train --config=configs/dino.py:base --workdir=runs/dino
    python -m vlm_jax.train --config=configs/dino.py:byol-base --workdir=runs/byol

base: the image tower of configs/base.py, on single emoji and on scenes of 64 px. base_select has one style (emojione)
held out of training. Each also as `METHOD-base`, with one of `METHODS`, which share the views: two global ones, `image`
and `second`, and for some six local ones. In DINO both global views are seen by teacher and student; here the teacher
sees `image`, the student `second` and the local ones. The log has `image_spread` and `image_effective_rank`: if both
fall toward 0 and 1, the features collapse. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs import base
from configs.siglip2 import DISTORTED
from vlm_jax.catalogue import method
from vlm_jax.data.emoji.splits import TRAIN_STYLES
from vlm_jax.errors import UserError

SIZES = ("base", "base_select", "smoke")
LOCAL, LOCALS = 24, 6  # pixels; number
TWO = dict(of=("image", "second"))
AVERAGE = dict(average=dict(decay=0.996))
HEAD = dict(hidden=4 * base.WIDTH, bottleneck=64)
WIDE = dict(hidden=4 * base.WIDTH, out=4 * base.WIDTH)
METHODS = {  # the objective, whether there are local views
    "dino": (
        dict(
            terms=dict(self_distillation=dict(views=("second", "local"), head=HEAD, prototypes=1024)), teachers=AVERAGE
        ),
        True,
    ),
    "simsiam": (dict(terms=dict(simsiam=TWO | dict(projector=WIDE, predictor=dict(hidden=base.WIDTH)))), False),
    "byol": (dict(terms=dict(byol=TWO | dict(projector=WIDE | dict(out=256))), teachers=AVERAGE), False),
    "barlow_twins": (dict(terms=dict(barlow_twins=TWO | dict(projector=WIDE))), False),
    "vicreg": (dict(terms=dict(vicreg=TWO | dict(projector=WIDE))), False),
    "swav": (dict(terms=dict(swav=TWO | dict(crops="local", projector=WIDE | dict(out=64), prototypes=1024))), True),
    "moco": (dict(terms=dict(moco=TWO | dict(projector=WIDE | dict(out=128), size=8192))), False),
}
METHODS["moco"][0]["teachers"] = dict(momentum=dict(decay=0.99))


def views(size: int, local: bool) -> str:
    """The second global view, local ones, and the first global view as `image`."""
    whole = f"random_resized_crop({size}, scale=(0.4, 1.0)) | {DISTORTED}"
    crops = f"random_resized_crop({LOCAL}, scale=(0.05, 0.4)) | {DISTORTED}"
    found = [f"views('second', 1, {whole})", *([f"views('local', {LOCALS}, {crops})"] if local else []), whole]
    return " | ".join([*found, f"keep('image', 'second'{', ' + repr('local') if local else ''})"])


@method(
    family="recipes",
    system="DINO",
    paper="arXiv:2104.14294",
    differs="an image tower without texts: views of a picture match an average of the tower",
)
def get_config(variant: str = "base") -> ConfigDict:
    name, _, size = variant.rpartition("-")
    name = name or "dino"
    if name not in METHODS or size not in SIZES:
        known = f"{', '.join(SIZES)}, each also after one of {', '.join(f'{name}-' for name in METHODS)}"
        raise UserError(f"there is no variant `{variant}` of dino; such are {known}")
    objective, local = METHODS[name]
    styles = [style for style in TRAIN_STYLES if size != "base_select" or style != "emojione"]
    shown = views(base.SIZE, local)
    unseen = (
        dict(split="train", where=dict(style=["emojione"])) if size == "base_select" else dict(split="unseen_style")
    )
    emoji = dict(uri="tfds:emoji", label="concept", **unseen)
    known = dict(train_where=dict(style=styles), classes="emoji:seen")
    config = ConfigDict(
        dict(
            seed=0,
            batch_size=256,
            duration="600k examples",
            tokenizer=None,
            preprocess=f"decode(exif=True) | resize({base.SIZE}) | normalize",
            tokenize=None,
            data=dict(
                sources=dict(
                    emoji=dict(
                        uri="tfds:emoji",
                        split="train",
                        where=dict(style=styles),
                        ops=f"decode | resize({base.SIZE}) | cache | {shown}",
                    ),
                    scenes=dict(uri=f"scenes:?size={base.SIZE}&styles={','.join(styles)}", split="train", ops=shown),
                ),
                workers=0,
            ),
            model=dict(
                name="two_tower", image=base.IMAGE | dict(pool="tok", cls_position=True, any_size=True), text=None
            ),
            objective=objective,
            optimizer=dict(name="adamw", lr=5e-4, weight_decay=0.04, schedule=dict(name="cosine", warmup="10%")),
            evals=dict(
                knn=dict(type="probe", solver="knn", every="20%", **emoji, **known),
                linear=dict(type="probe", **emoji, **known),
                pictures=dict(
                    type="image_retrieval",
                    gallery_split="train",
                    gallery_where=dict(style=styles),
                    **emoji,
                ),
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=2),
            log=dict(every="20 steps", tensorboard=True),
            profile=dict(steps=""),
        )
    )
    if size == "smoke":
        config.model.image.update(dict(width=32, depth=1, heads=1, mlp_dim=64))
        config.update(dict(batch_size=32, duration="16 steps"))
        config.log.every, config.checkpoint.every = "2 steps", "8 steps"
        for section in config.evals.values():
            section.split, section.every = "unseen_style[800:832]", None
        config.evals.knn.train_where = config.evals.linear.train_where = dict(style=styles[:1])
        config.evals.pictures.gallery_where = dict(style=styles[:1])
    return config
