"""The text towers of Transformers, by model_type."""

from vlm_jax.errors import UserError
from vlm_jax.zoo.formats import transformers_tables as tables
from vlm_jax.zoo.formats.settings import neutral
from vlm_jax.zoo.formats.transformers_towers import CLIP_DEFAULTS, SIGLIP_DEFAULTS, TEXT, Tower


def _clip_text(section, config, names):
    if config["eos_token_id"] == 2:  # CLIPs converted before EOS had its real id: the largest id is EOS
        return {"pool": "argmax"}
    return {"pool": "eos", "eos_id": config["eos_token_id"]}


def _metaclip_2_text(section, config, names):
    return {"pool": "eos", "eos_id": config["eos_token_id"]}


def _siglip_text(section, config, names):
    return {"out_dim": config.get("projection_size", section["width"])}


def _bert(section, config, names):
    if config["position_embedding_type"] != "absolute":
        raise UserError(f"BERT with {config['position_embedding_type']} positions is not supported, only absolute")
    pooler = {"rep_dim": section["width"]} if "pooler.dense.weight" in names else {}
    return pooler | {"causal": True} if config["is_decoder"] else pooler


def _roberta(section, config, names):
    """Rows of positions up to the padding's stand before the first token's."""
    length = section["length"] - section["pad_id"] - 1
    if length < 1:
        raise UserError(f"config.json has max_position_embeddings {section['length']}, of which no token has one")
    return _bert(section, config, names) | {"length": length}


def _roberta_reverse(section):
    rows = {"max_position_embeddings": section["length"] + section["pad_id"] + 1}
    return rows | ({"is_decoder": True} if section.get("causal") else {})


def _altclip(section, config, names):
    return _roberta(section, config, names) | {"rep_dim": config["project_dim"], "rep_activation": "none"}


def _altclip_reverse(section):
    return _roberta_reverse(section) | {"project_dim": section.get("rep_dim")}


TEXTS = {
    "clip_text_model": Tower(
        tables.CLIP_TEXT,
        TEXT,
        dict(causal=True, head_bias=False),
        dict(CLIP_DEFAULTS, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
        | dict(vocab_size=49_408, max_position_embeddings=77, eos_token_id=49_407),
        _clip_text,
        lambda section: {"eos_token_id": 2 if section["pool"] == "argmax" else section.get("eos_id")},
    ),
    "siglip_text_model": Tower(
        tables.SIGLIP_TEXT,
        TEXT,
        dict(pool="last"),
        dict(SIGLIP_DEFAULTS, vocab_size=32_000, max_position_embeddings=64),
        _siglip_text,
        lambda section: {"projection_size": section.get("out_dim")},
        neutral("projection_size"),
    ),
    "bert": Tower(
        tables.BERT,
        {**TEXT, "token_types": "type_vocab_size", "pad_id": "pad_token_id"},
        dict(post_norm=True, pre_norm=True, pad_mask=True, pool="first"),
        dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, hidden_act="gelu")
        | dict(layer_norm_eps=1e-12, vocab_size=30_522, max_position_embeddings=512, type_vocab_size=2)
        | dict(pad_token_id=0, position_embedding_type="absolute", is_decoder=False),
        _bert,
        lambda section: {"is_decoder": True} if section.get("causal") else {},
    ),
}
TEXTS["siglip2_text_model"] = TEXTS["siglip_text_model"]._replace(
    defaults=dict(TEXTS["siglip_text_model"].defaults, vocab_size=256_000)
)
TEXTS["metaclip_2_text_model"] = TEXTS["clip_text_model"]._replace(
    adapt=_metaclip_2_text, reverse=lambda section: {"eos_token_id": section.get("eos_id")}
)
TEXTS["chinese_clip_text_model"] = TEXTS["bert"]
TEXTS["roberta"] = TEXTS["bert"]._replace(
    fixed=dict(TEXTS["bert"].fixed, posemb="counted"),
    defaults=dict(TEXTS["bert"].defaults, vocab_size=50_265, pad_token_id=1),
    adapt=_roberta,
    reverse=_roberta_reverse,
)
TEXTS["xlm-roberta"] = TEXTS["roberta"]._replace(defaults=dict(TEXTS["roberta"].defaults, vocab_size=30_522))
TEXTS["camembert"] = TEXTS["xlm-roberta"]
TEXTS["altclip_text_model"] = TEXTS["roberta"]._replace(
    rows=tables.ALTCLIP_TEXT,
    fixed=dict(TEXTS["roberta"].fixed, last_norm=True),
    defaults=dict(TEXTS["roberta"].defaults, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    | dict(intermediate_size=4096, layer_norm_eps=1e-5, vocab_size=250_002, max_position_embeddings=514)
    | dict(type_vocab_size=1, project_dim=768),
    adapt=_altclip,
    reverse=_altclip_reverse,
)
