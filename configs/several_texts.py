"""CLIP on scenes, each with several texts: sentences, tags, rewritten texts, one part of another method each.

    vlm-jax train --config=several_texts:grouping --workdir=runs/grouping                # on 2 CPU cores
    vlm-jax train --config=several_texts:grouping-smoke --workdir=runs/grouping_smoke    # seconds: does it run?

Variants: the keys of `METHODS`, each also with `-select` (one style held out) and `-smoke`. Scenes of the embedded
emoji have a caption, a sentence on each look and relation (`sub_captions`), tags and foils. The methods combine: their
sections are parts of one objective and one model, their fields stand side by side in a batch. `paraphrases` trains the
text tower alone: set `model_init`, or the locked image tower has seen nothing. In `paraphrases` and `rewritten` other
sentences on the same scene stand in for rewritten ones. `vlm-jax methods NAME` says what a method changes, and where it
was published. Not yet measured: no numbers.
"""

from ml_collections import ConfigDict

from configs import base
from configs.embedded import SCENE_SIZE, embedded, on_scenes
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError

LENGTH = 24  # tokens of a caption, a sentence
TOKENIZE = f"lower | tokenize({LENGTH}, bos=False, eos=False)"
CLIP = dict(name="contrastive", targets="concept")
PATCHES = dict(pool="patches")  # the picture's embedding is its mean patch
HALF = dict(weight=0.5)
LOCKED = ((r"image/.*", dict(freeze=True)), (".*", {}))


def texts(number: int, *fields: str, to: str = "texts", length: int = LENGTH, least: int = 1) -> str:
    """Ops that make `to`, int [number, length], of some fields of a scene."""
    named = ", ".join(map(repr, fields))
    tokens = f"tokenize({length}, bos=False, eos=False, key='{to}', to='{to}')"
    return f"captions({number}, {named}, ops=lower, to='{to}', least={least}) | {tokens}"


SENTENCES = texts(4, "sub_captions")
METHODS = {  # changes of the image tower, the objective, ops that make its texts, and the fields that these set
    "several_texts": ({}, dict(terms=dict(several_texts={})), SENTENCES, ("texts",)),
    "grouping": (PATCHES, dict(terms=dict(several_texts={}, grouping={})), SENTENCES, ("texts",)),
    "conditioned": (
        PATCHES,
        dict(terms=dict(several_texts=HALF | dict(among="all", penalty="sigmoid"), conditioned=HALF)),
        SENTENCES,
        ("texts",),
    ),
    "tags": (PATCHES, dict(terms=dict(contrastive=CLIP, tags={})), texts(6, "tags", to="tags", length=4), ("tags",)),
    "sentences": (
        PATCHES,
        dict(terms=dict(contrastive=CLIP, sentences=dict(prototypes=512, report=10.0, picture=1.0))),
        SENTENCES,
        ("texts",),
    ),
    "paraphrases": ({}, dict(name="paraphrases"), texts(2, "sub_captions", least=2), ("texts",)),
    "rewritten": (
        {},
        CLIP | dict(negatives="rewritten", penalty="any_positive"),
        f"{texts(2, 'sub_captions', to='paraphrases')} | {texts(2, *base.FOILS, least=0)}",
        ("paraphrases", "texts"),
    ),
    "two_captions": (
        dict(pool="tok", cls=True, registers=1),
        dict(name="two_captions"),
        texts(1, "sub_captions"),
        ("texts",),
    ),
}


@method(family="recipes", paper="arXiv:2103.00020", differs="CLIP on pictures with several texts each")
def get_config(variant: str = "grouping") -> ConfigDict:
    name, _, size = variant.partition("-")
    if name not in METHODS:
        raise UserError(f"there is no variant `{name}` of this config; expected one of: {', '.join(METHODS)}")
    image, objective, ops, fields = METHODS[name]
    penalty = "sigmoid" if name == "conditioned" else "softmax"
    config = embedded(size or "tiny", penalty=penalty)
    kept = ", ".join(map(repr, ("image", "token_ids", "concept", *fields, *(f"{one}_mask" for one in fields))))
    on_scenes(config, size, f"{ops} | caption('caption') | {TOKENIZE} | keep({kept})", TOKENIZE, LENGTH)
    config.model.image = ConfigDict(config.model.image.to_dict() | dict(pool="gap", depth=4) | image)
    config.objective = objective
    if name == "paraphrases":
        config.optimizer.params = LOCKED
    if size == "smoke":
        config.model.image.depth = 1
    unseen = dict(uri=f"scenes:?size={SCENE_SIZE}&examples={32 if size == 'smoke' else 1000}", split="unseen_style")
    config.evals.regions = dict(type="regions", **unseen)
    return config
