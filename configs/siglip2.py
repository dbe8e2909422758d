"""SigLIP 2: the sigmoid loss and a decoder, then self-distillation, then larger pictures (arXiv:2502.14786).

    python -m vlm_jax.train --config=configs/siglip2.py:tiny --workdir=runs/siglip2_tiny   # minutes on 2 CPU cores

    python -m vlm_jax.train --config=configs/siglip2.py:So400m/16 --workdir=runs/siglip2 \\
        --config.data.uri='wds:/data/webli/{00000..99999}.tar' --config.mesh.fsdp=16

B/16, L/16, So400m/16 and g/16 follow sections 2.1 to 2.4.1 of the paper: 40B examples, batch 32,768, Adam; captions,
boxes of phrases and phrases of boxes from the start (LocCa); local crops and masked patches against an average of the
image tower from 80 %; pictures of 384 px from 95 %. `So400m/16-512` ends with 512 px, `So400m/16-256` with 256 px.

`So400m/16-naflex` ends with pictures at their native aspect (section 2.4.2): after 90 % of the 40B examples, batches of
128 to 1024 patches, without the self-supervised losses. As in the paper, this part is stretched by 3.75. In the paper
only its schedule is; here the cosine goes over all steps. Here every batch has 2^23 patches, in the paper most have 32k
pictures. `tiny-naflex`, `smoke-naflex` end so on scenes of 3:2.

The paper gives no numbers for views, prototypes and the teacher's average: crops are those of SILC (arXiv:2310.13355),
the rest is DINO's (arXiv:2104.14294). Text towers read the last place, as those released do. `phrases` and `boxes`, in
shares of the picture's sides, are fields of the JSON beside a picture, which a detector has made.

tiny, base and smoke see scenes and single emoji; base has the towers of `siglip.py:base`. Not yet trained to the end:
no numbers.
"""

from ml_collections import ConfigDict

from configs import base
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

FACTORS = {"B": 0.25, "L": 0.5, "So400m": 1.0, "g": 0.5}  # on the weights 1 and 0.25, section 2.3
SIZE, ENDS = 256, (256, 384, 512)  # pixels; of the last 5 %
STRONG = "random_affine(15.0, 0.1, (0.6, 1.25)) | flip | jitter(0.2, 0.4, 0.8) | random_grey(0.2)"
SMALL = ("base", "base_select", "tiny", "smoke")
NAFLEX = dict(lengths=(128, 256, 576, 784, 1024), budget=2**23, multiple=1024)
TOWER = "image/.*|objective/(self_distillation|masked_patches)/.*"
DISTORTED = "flip | jitter(0.4, 0.4, 0.2) | random_grey(0.2) | random_blur(0.5) | normalize"
TASKS = ("cap", "aref", "gcap")


def views(size: int, patch: int) -> str:
    """The teacher's view and eight local ones of the student, of 3/8 of its side: 96 px of 256."""
    local = f"random_resized_crop({round(size * 3 / 8 / patch) * patch}, scale=(0.05, 0.4)) | {DISTORTED}"
    whole = f"random_resized_crop({size}, scale=(0.4, 1.0)) | {DISTORTED}"
    return f"view('global', {whole}) | views('local', 8, {local})"


def packed(patch: int, length: int | None = None) -> str:
    """A picture at its native aspect, in patches; without a length, of the batch's."""
    most = f"{patch}" if length is None else f"{patch}, {length}"
    return f"resize_to_patches({most}) | normalize | pack_patches({most})"


def regions(phrases: str, boxes: str, options: str) -> str:
    """A region for each of the two tasks."""
    return " | ".join(f"region('{phrases}', '{boxes}', '{task}', least=0{options})" for task in TASKS[1:])


def prompts(length: int, located: bool = True) -> str:
    """The decoder's three texts; without regions the texts of two tasks are padding."""
    targets = dict(cap="{text}", aref="{aref} : {aref_box}", gcap="{gcap_box} : {gcap}")
    targets |= {} if located else dict(aref="", gcap="")
    parts = [f"prompted({length}, '{task} :', '{target}', '{task}', ops=lower)" for task, target in targets.items()]
    return " | ".join(parts)


def keep(distil: bool, *others: str) -> str:
    """The fields of a batch, with the views if it distils."""
    texts = [f"{task}_{field}" for task in TASKS for field in ("token_ids", "counts")]
    fields = ["image", "token_ids", *others, *texts, *(("global", "local") if distil else ())]
    return f"keep({', '.join(map(repr, fields))})"


def distilled(factor: float, **options) -> dict:
    """The section `objective` of stages that distil."""
    terms = dict(self_distillation=dict(options, weight=factor), masked_patches=dict(options, weight=0.25 * factor))
    return dict(terms=terms, teachers=dict(average=dict(decay=0.996, of=TOWER, inputs=dict(image="global"))))


@method(
    family="recipes",
    system="SigLIP 2",
    paper="arXiv:2502.14786",
    where="section 2",
    differs="sigmoid loss and LocCa's decoder, then self-distillation and masked patches, then larger pictures",
)
def get_config(variant: str = "So400m/16") -> ConfigDict:
    name, _, end = variant.partition("-")
    if name in SMALL and end in ("", "naflex"):
        return small(name, native=end == "naflex")
    size, _, patch = name.partition("/")
    if size not in FACTORS or patch != "16" or end not in ("", "naflex", *map(str, ENDS)):
        known = ", ".join([*(f"{size}/16" for size in FACTORS), "So400m/16-512", "So400m/16-naflex", *SMALL])
        raise UserError(f"there is no variant `{variant}` of siglip2; such are {known}")
    native, text = end == "naflex", "So400m" if size == "g" else size  # section 2.1
    end = SIZE if native else int(end or 384)
    width, depth = {"B": (768, 6), "L": (1024, 12), "So400m": (1152, 13), "g": (1536, 13)}[size]
    tower = dict(scan=True, remat="full")
    words = dict(variant=text, vocab_size=256_000, length=64, **tower)
    tokenize = "lower | tokenize(64, bos=False)"
    shown = lambda size: f"resize({size}, method='bilinear') | normalize" if size else packed(16)
    preprocess = lambda size: f"decode(exif=True) | {shown(size)}"

    def ops(size: int | None, more: bool) -> str:
        found = ["decode(exif=True)", regions("json/phrases", "json/boxes", ", shares=True")]
        found += [views(size, 16)] if more else []
        found += [f"{shown(size)} | caption('txt')", prompts(64), tokenize]
        return " | ".join([*found, keep(more)])

    late = distilled(FACTORS[size])
    shares = ("62.745%", "7.843%", "29.412%") if native else ("80%", "15%", "5%") if end > SIZE else ("80%", "20%")
    stages = [dict(share=shares[0]), dict(share=shares[1], data=dict(ops=ops(SIZE, True)), objective=late)]
    if native:
        last = dict(data=dict(ops=ops(None, False), naflex=NAFLEX), preprocess=f"decode(exif=True) | {packed(16, 256)}")
        stages += [dict(share=shares[2], accumulate=4, **last)]
    if end > SIZE:
        large = dict(data=dict(ops=ops(end, True)), model=dict(image=dict(image_size=end)), preprocess=preprocess(end))
        stages += [dict(share=shares[2], accumulate=4, objective=late, **large)]
    return ConfigDict(
        dict(
            batch_size=32_768,
            accumulate=1,
            duration="51B examples" if native else "40B examples",
            tokenizer="sentencepiece:gemma.model",
            preprocess=preprocess(SIZE),
            tokenize=tokenize,
            data=dict(uri="wds:/data/image_text/{00000..99999}.tar", ops=ops(SIZE, False), workers=32),
            model=dict(
                name="two_tower_captioner",
                image=dict(
                    variant="g-opt/16" if size == "g" else name, image_size=SIZE, any_size=True, pool="map", **tower
                ),
                text=dict(words, pool="last", out_dim=width, head_bias=True),
                decoder=dict(words, depth=depth, mask_token=True),
                scale_init=10.0,
                bias_init=-10.0,
                dtype="bfloat16",
            ),
            objective=dict(terms=dict(contrastive=dict(penalty="sigmoid"), locca=dict(chunk=2))),
            optimizer=dict(
                name="adamw",
                lr=1e-3,
                b2=0.95,
                weight_decay=1e-4,
                clip_norm=1.0,
                schedule=dict(name="cosine", warmup="20000 steps"),
            ),
            stages=tuple(stages),
            mesh=dict(data=-1, fsdp=1, tensor=1),
            checkpoint=dict(every="1%", keep=3),
            log=dict(every="50 steps"),
            profile=dict(steps=""),
        )
    )


def small(variant: str, native: bool) -> ConfigDict:
    """Scenes, whose objects have phrases and boxes, and single emoji, which have none."""
    settings = base.two_towers("base" if variant in ("tiny", "smoke") else variant, "sigmoid")
    if variant in ("tiny", "smoke"):
        del settings.model_init
    single, several = base.beds(variant).values()
    begin, end = (48, base.SIZE) if variant != "smoke" else (16, 32)
    tokenize = base.tokenize(base.LENGTH)
    preprocess, patch = lambda size: f"decode(exif=True) | resize({size}) | normalize", settings.model.image.patch

    def data(size: int | None, distil: bool) -> dict:
        fit, *end = [f"resize({size})", "normalize"] if size else packed(patch).split(" | ", 1)
        seen = [views(size, patch)] if distil else []
        of_scenes = [regions("regions/text", "regions/box", ""), *seen, f"{fit} | jitter(0.2, 0.2, 0.2)", *end]
        of_emoji = [f"decode | resize({base.SIZE}) | cache", *seen, f"{STRONG} | {fit}", *end]
        ends = lambda located: [prompts(base.LENGTH, located), tokenize, keep(distil, "concept")]
        texts = {
            "emoji": base.name(variant, "name", "keywords"),
            "scenes": "random_caption('caption', 'sub_captions', weights=(3, 1))",
        }
        sources = dict(
            emoji=single | dict(ops=" | ".join([*of_emoji, texts["emoji"], *ends(False)])),
            scenes=several | dict(ops=" | ".join([*of_scenes, texts["scenes"], *ends(True)])),
        )
        return dict(sources=sources, workers=0)

    towers = settings.model.to_dict()
    width, depths = {"tiny": (96, (4, 2, 1)), "smoke": (32, (1, 1, 1))}.get(variant, (base.WIDTH, (6, 4, 2)))
    sizes = lambda depth: dict(width=width, depth=depth, heads=max(width // 64, 1), mlp_dim=4 * width)
    words = dict(vocab_size=2985, length=base.LENGTH)
    settings.model = dict(
        name="two_tower_captioner",
        image=towers["image"] | sizes(depths[0]) | dict(out_dim=width, image_size=begin, any_size=True),
        text=towers["text"] | sizes(depths[1]) | dict(out_dim=width),
        decoder=dict(words, **sizes(depths[2]), mask_token=True),
        scale_init=10.0,
        bias_init=-10.0,
    )
    settings.data, settings.tokenize, settings.preprocess = data(begin, False), tokenize, preprocess(begin)
    contrastive = dict(penalty="sigmoid", targets="concept")
    settings.objective = dict(terms=dict(contrastive=contrastive, locca=dict()))
    head = dict(hidden=4 * width, bottleneck=64)
    late = distilled(1.0, head=head, prototypes=1024 if variant != "smoke" else 64)
    large = dict(data=data(end, True), model=dict(image=dict(image_size=end)), preprocess=preprocess(end))
    settings.stages = (
        dict(share="80%"),
        dict(share="15%", data=data(begin, True), objective=late),
        dict(share="5%", objective=late, **large),
    )
    if variant == "smoke":
        settings.batch_size = 32
    examples = 32 if variant == "smoke" else 1000
    unseen = dict(uri=f"scenes:?size={base.SIZE}&examples={examples}", split="unseen_style")
    settings.evals.regions = dict(type="regions", **unseen)
    settings.evals.grounding = dict(type="grounding", template="aref : {text} :", **unseen)
    if native:
        length = (end // patch) ** 2
        naflex = dict(lengths=(length // 2, length), budget=length // 2 * settings.batch_size)
        shown = data(None, False) | dict(naflex=naflex)
        shown["sources"]["scenes"]["uri"] = several["uri"].replace(f"size={base.SIZE}", "size=96x64")
        last = dict(data=shown, preprocess=f"decode(exif=True) | {packed(patch, length)}")
        settings.stages = (*settings.stages[:1], dict(settings.stages[1], share="10%"), dict(share="10%", **last))
    if variant == "tiny":
        settings.duration = "150k examples"
    if variant == "smoke":
        settings.duration = "40 steps"
        settings.optimizer = dict(name="adamw", lr=1e-3, schedule=dict(name="cosine", warmup="2 steps"))
        settings.log.every, settings.checkpoint.every = "2 steps", "8 steps"
        settings.evals.unseen_style.update(dict(split="unseen_style[800:864]", every=None))
    return settings
