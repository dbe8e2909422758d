"""CLIP on captions in nine languages, with self-distillation of crops (RS-M-CLIP: Silva et al. 2024, arXiv:2410.23370).

    vlm-jax train --config=rs_m_clip:both --workdir=runs/rs_m_clip                # on 2 CPU cores
    vlm-jax train --config=rs_m_clip:both-smoke --workdir=runs/rs_m_clip_smoke    # seconds: does it run?

Variants: both; languages, without self-distillation; english, one language; each also with `-select` and
`-smoke`, see configs/embedded.py. The paper continues a released CLIP with a multilingual text tower on remote sensing
data, whose captions a machine translated into nine languages besides English. Here names and keywords of emoji in nine
languages stand in for them. Each picture draws one language anew; eight local crops match an average of the image tower
on a global one, as in DINO. Evaluation is in English. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs import siglip2
from configs.embedded import CONTENT, SIZE, embedded
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

LANGUAGES = ("en", "de", "es", "fr", "it", "ja", "ko", "pt", "zh")
LENGTH = 24  # tokens; the tokenizer spells what is not English
TOWER = "image/.*|objective/self_distillation/.*"


@method(
    family="recipes",
    system="RS-M-CLIP",
    paper="arXiv:2410.23370",
    differs="captions in nine languages, and local crops match an average of the image tower on global ones",
)
def get_config(variant: str = "both") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in ("both", "languages", "english"):
        raise UserError(f"there is no variant `{name}` of this config; expected one of: both, languages, english")
    config = embedded(size or "tiny", penalty="softmax")
    languages = LANGUAGES[:1] if name == "english" else LANGUAGES
    names = ", ".join(f"'{field}/{language}'" for language in languages for field in ("name", "keywords"))
    config.tokenize = f"lower | tokenize({LENGTH}, bos=False, eos=False)"
    views = "" if name == "languages" else f"{siglip2.views(SIZE, 8)} | "
    kept = ("image", "token_ids", "concept", *(("global", "local") if views else ()))
    config.data.ops = (
        f"{CONTENT} | cache | {views}random_affine(10.0, 0.06, (0.82, 1.22)) | flip | jitter(0.1, 0.2, 0.4) | normalize"
        f" | random_caption({names}, join=' ') | {config.tokenize} | keep({', '.join(map(repr, kept))})"
    )
    config.model.image.update(dict(pool="gap", image_size=SIZE, any_size=True))
    config.model.text.length = LENGTH
    config.objective = dict(terms=dict(contrastive=dict(targets="concept")))
    if views:
        config.objective.terms.self_distillation = dict(head=dict(hidden=256, bottleneck=64), prototypes=4096)
        config.objective.teachers = dict(average=dict(decay=0.996, of=TOWER, inputs=dict(image="global")))
    return config
