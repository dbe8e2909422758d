"""CoCa as open_clip releases it: `visual.attn_pool`, `text` with a cls token at the end, `text_decoder`."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.zoo import families
from vlm_jax.zoo.formats import open_clip
from vlm_jax.zoo.formats.settings import check
from vlm_jax.zoo.key_map import expand
from vlm_jax.zoo.released import NOTHING, Told

POOLED_IMAGE = tuple(row for row in open_clip.IMAGE if row[0] not in ("norm", "head/kernel"))
POOL = (
    ("image/norm", "visual.attn_pool.ln_k", "norm"),
    ("pool/queries", "visual.attn_pool.query", "table"),
    ("pool/query_norm", "visual.attn_pool.ln_q", "norm"),
    ("pool/attn/query/bias", "visual.attn_pool.attn.in_proj_bias#0/3", "same"),
    ("pool/attn/key/bias", "visual.attn_pool.attn.in_proj_bias#1/3", "same"),
    ("pool/attn/value/bias", "visual.attn_pool.attn.in_proj_bias#2/3", "same"),
    ("pool/attn/out", "visual.attn_pool.attn.out_proj", "dense"),
    ("pool/norm", "visual.ln_post", "norm"),
    ("image_head/kernel", "visual.proj", "same"),
    ("text_head/kernel", "text.text_projection", "same"),
    ("head/kernel", "text_decoder.text_projection", "same"),
    ("logit_scale", "logit_scale", "same"),
)
TEXT = (("cls", "cls_emb", "vector"), *open_clip.TEXT)
DECODER = (
    *((ours, theirs.removeprefix("transformer."), kind) for ours, theirs, kind in open_clip.BLOCKS),
    ("blocks_{i}/cross_norm", "cross_attn.{i}.ln_1", "norm"),
    ("blocks_{i}/context_norm", "cross_attn.{i}.ln_1_kv", "norm"),
    *(
        (f"blocks_{{i}}/cross_attn/{name}", f"cross_attn.{{i}}.attn.in_proj#{part}/3", "in_proj")
        for part, name in enumerate(("query", "key", "value"))
    ),
    ("blocks_{i}/cross_attn/out", "cross_attn.{i}.attn.out_proj", "dense"),
    ("blocks_{i}/cross_mlp_norm", "cross_attn.{i}.ln_2", "norm"),
    ("blocks_{i}/cross_mlp/fc1", "cross_attn.{i}.mlp.c_fc", "dense"),
    ("blocks_{i}/cross_mlp/fc2", "cross_attn.{i}.mlp.c_proj", "dense"),
    ("norm", "ln_final", "norm"),
)
START_ID = 49_406  # of CLIP's vocabulary, which all of open_clip's CoCas have


def recognise(names) -> bool:
    """Whether tensors of these names are a CoCa's."""
    return any(name.startswith("text_decoder.") for name in names)


def describe(
    tensors: Mapping[str, Any], model_cfg: Mapping[str, Any] | None = None, told: Told = NOTHING
) -> tuple[dict[str, Any], list, tuple[str, ...]]:
    """Returns the model of these tensors; arguments and result as in `open_clip.describe`."""
    shapes, cfg = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, dict(model_cfg or {})
    activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
    vision, text, multimodal = (dict(cfg.get(f"{part}_cfg") or {}) for part in ("vision", "text", "multimodal"))
    if problem := families.image_of_open_clip(shapes, vision):
        raise UserError(problem)
    if name := text.get("hf_model_name"):
        raise UserError(f"the text tower is {name!s:.60}; of CoCas, only those with open_clip's own text tower load")
    _check(cfg, vision, text, multimodal)
    two_pools = any(name.startswith("visual.attn_pool_contrastive.") for name in shapes)
    if two_pools or "visual.attn_pool.query" not in shapes or "text.cls_emb" not in shapes:
        raise UserError("only CoCas with one attentional pooler and a cls token in the text tower can be loaded")
    image = open_clip.image_fields(shapes, vision, activation, told)
    image |= dict(pool="none", cls=True, out_dim=None)
    queries, width = shapes["visual.attn_pool.query"]
    pool = dict(width=width, queries=queries, heads=vision.get("attn_pooler_heads", 8))
    vocab_size, text_width = shapes["text.token_embedding.weight"]
    common = dict(vocab_size=vocab_size, start_id=START_ID, activation=activation, norm_eps=1e-5)
    unimodal = dict(
        width=text_width,
        depth=open_clip.blocks(shapes, "text.transformer.resblocks."),
        heads=text.get("heads", 8) if cfg else open_clip.text_heads(text_width, told),
        mlp_dim=shapes["text.transformer.resblocks.0.mlp.c_fc.weight"][0],
        length=shapes["text.positional_embedding"][0] - 1,
        **common,
    )
    decoder = dict(
        width=text_width,
        depth=open_clip.blocks(shapes, "text_decoder.resblocks."),
        heads=multimodal.get("heads", 8) if cfg else open_clip.text_heads(text_width, told),
        mlp_dim=shapes["text_decoder.resblocks.0.mlp.c_fc.weight"][0],
        length=unimodal["length"],
        logits_bias=False,
        **common,
    )
    section = dict(
        name="coca", image=image, pool=pool, text=unimodal, decoder=decoder, out_dim=shapes["visual.proj"][1]
    )
    kernels = [  # PyTorch joins the three kernels if widths are equal
        ("attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"),
        [f"attn.in_proj_weight#{part}/3" for part in range(3)],
    ]["visual.attn_pool.attn.in_proj_weight" in shapes]
    rows = [
        (f"pool/attn/{name}/kernel", f"visual.attn_pool.{kernel}", "matrix")
        for name, kernel in zip(("query", "key", "value"), kernels, strict=True)
    ]
    entries = expand(
        POOLED_IMAGE, "image/", "visual.", depth=image["depth"], heads=image["heads"], patch=image["patch"]
    )
    entries += expand([*POOL, *rows])
    entries += expand(TEXT, "text/", "text.", depth=unimodal["depth"], heads=unimodal["heads"])
    entries += expand(DECODER, "decoder/", "text_decoder.", depth=decoder["depth"], heads=decoder["heads"])
    return section, entries, open_clip.IGNORED


def _check(cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any], multimodal: Mapping[str, Any]):
    """Raises a UserError for a setting that is neither read nor known to change nothing."""
    if vision.get("attentional_pool") not in (None, True) or text.get("embed_cls") not in (None, True):
        raise UserError("model_cfg has no attentional_pool or no embed_cls; a CoCa has both")
    if text.get("pad_id") or multimodal.get("pad_id"):
        raise UserError("text_cfg.pad_id is not 0; only 0 is supported in a CoCa")
    without = lambda part, *keys: {key: value for key, value in part.items() if key not in keys}
    cfg, known = without(cfg, "multimodal_cfg"), open_clip.READ["text_cfg"]
    open_clip.check_settings(cfg, without(vision, "attentional_pool"), without(text, "embed_cls"))
    own = without(multimodal, "attn_pooler_heads", "n_queries", "dim_head")
    check(own, known, open_clip.NEUTRAL["text_cfg"], "multimodal_cfg")
