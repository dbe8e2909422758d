"""Text towers of Transformers in open_clip: RoBERTa, XLM-R and the encoder of mT5.

`text_cfg.hf_model_name` decides the family; open_clip reads that model's own config, which its folders do not hold.
All models of these names have heads of 64 channels, and their epsilons and activations are the family's.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from vlm_jax.errors import UserError
from vlm_jax.models.encoder_decoder import T5 as T5_FIELDS
from vlm_jax.zoo.formats import t5
from vlm_jax.zoo.formats.head_counts import HEAD_WIDTH
from vlm_jax.zoo.formats.transformers_tables import BERT

NAMES = {  # family -> hf_model_name: width, depth, mlp_dim, rows of the token table
    "roberta": {
        "roberta-base": (768, 12, 3072, 50_265),
        "roberta-large": (1024, 24, 4096, 50_265),
        "xlm-roberta-base": (768, 12, 3072, 250_002),
        "xlm-roberta-large": (1024, 24, 4096, 250_002),
        "facebook/xlm-v-base": (768, 12, 3072, 901_629),
    },
    "mt5": {
        "google/mt5-small": (512, 8, 1024, 250_112),
        "google/mt5-base": (768, 12, 2048, 250_112),
        "google/mt5-large": (1024, 24, 2816, 250_112),
        "google/mt5-xl": (2048, 24, 5120, 250_112),
    },
}
OWNERS = ("FacebookAI/", "facebook/", "google/")
ROBERTA = dict(posemb="counted", pad_id=1, norm_eps=1e-5, activation="gelu", post_norm=True, pre_norm=True)
MT5 = dict(T5_FIELDS, posemb="none", pad_id=0, norm_eps=1e-6, activation="gelu_tanh")
LENGTH = 77  # of mT5, which has no table of positions: open_clip's default
POOLS = {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "first", "cls_pooler": "first"}
TRUNK = "text.transformer."


def _family(name: Any) -> str | None:
    bare = lambda name: re.sub(f"^({'|'.join(OWNERS)})", "", str(name))
    return next((family for family, known in NAMES.items() if bare(name) in map(bare, known)), None)


def recognise(names: Collection[str], cfg: Mapping[str, Any]) -> bool:
    """Whether `text_cfg` names a tower of this module."""
    return _family(cfg.get("hf_model_name")) is not None


def text_fields(shapes: Mapping[str, tuple], cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the text tower; arguments as for `open_clip.image_fields`."""
    family, pooler = _family(cfg["hf_model_name"]), cfg.get("hf_pooler_type", "mean_pooler")
    if pooler not in POOLS or (family == "mt5" and pooler == "cls_pooler"):
        raise UserError(f"text_cfg.hf_pooler_type is {pooler!r:.60}; expected one of: {', '.join(POOLS)}")
    fields = (_roberta if family == "roberta" else _mt5)(shapes, cfg)
    fields |= dict(pool=POOLS[pooler], pad_mask=True, head_bias=False)
    hidden, head = (shapes.get(f"text.proj{part}.weight") for part in (".0", ".2"))
    if head is None:
        head = shapes.get("text.proj.weight")
    if pooler == "cls_pooler":  # the model's own, with tanh
        if hidden:
            raise UserError("text_cfg has hf_pooler_type `cls_pooler` and a projection `mlp`, which no tower here has")
        fields["rep_dim"] = fields["width"]
    elif hidden:
        fields |= dict(rep_dim=hidden[0], rep_activation="gelu", rep_bias=False)
    return fields | {"out_dim": head[0] if head else None}


def _roberta(shapes, cfg):
    vocab_size, width = shapes[f"{TRUNK}embeddings.word_embeddings.weight"]
    return ROBERTA | dict(
        width=width,
        depth=_depth(shapes, f"{TRUNK}encoder.layer."),
        heads=width // HEAD_WIDTH,
        mlp_dim=shapes[f"{TRUNK}encoder.layer.0.intermediate.dense.weight"][0],
        vocab_size=vocab_size,
        length=shapes[f"{TRUNK}embeddings.position_embeddings.weight"][0] - ROBERTA["pad_id"] - 1,
        token_types=shapes[f"{TRUNK}embeddings.token_type_embeddings.weight"][0],
    )


def _mt5(shapes, cfg):
    first = f"{TRUNK}block.0.layer."
    vocab_size, width = shapes[f"{TRUNK}embed_tokens.weight"]
    buckets, heads = shapes[f"{first}0.SelfAttention.relative_attention_bias.weight"]
    return MT5 | dict(
        width=width,
        depth=_depth(shapes, f"{TRUNK}block."),
        heads=heads,
        head_dim=shapes[f"{first}0.SelfAttention.q.weight"][0] // heads,
        mlp_dim=shapes[f"{first}1.DenseReluDense.wi_0.weight"][0],
        vocab_size=vocab_size,
        length=cfg.get("context_length") or LENGTH,
        relative_buckets=buckets,
    )


def _depth(shapes, prefix):
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})


def rows_of(text: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Returns the key table of a tower with these fields; names begin after "text."."""
    if text["posemb"] == "counted":
        rows = [row for row in BERT if row[0] != "rep"]
    else:
        mlp = [(ours, theirs.replace("{layer}", "1"), kind) for ours, theirs, kind in t5.GATED_MLP]
        rows = [("token_embed", "embed_tokens", "embedding"), *t5.ENCODER, *mlp]
    head = [("head", "proj", "dense")]
    if text["rep_dim"]:
        pooler = text.get("rep_bias", True)
        rows += [BERT[-1]] if pooler else []
        head = head if pooler else [("rep", "proj.0", "dense"), ("head", "proj.2", "dense")]
    return (*((ours, f"transformer.{theirs}", kind) for ours, theirs, kind in rows), *head)


def config(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the `text_cfg` of a text tower, or None if it is of no family of this module.

    Raises:
      UserError: no model of a known name has such sizes.
    """
    family = "roberta" if text.get("posemb") == "counted" else "mt5" if text.get("relative_buckets") else None
    if family is None:
        return None
    sizes = tuple(text[key] for key in ("width", "depth", "mlp_dim", "vocab_size"))
    name = next((name for name, own in NAMES[family].items() if own == sizes), None)
    if name is None:
        shape = f"width {sizes[0]}, depth {sizes[1]}, MLP {sizes[2]} and {sizes[3]:,} tokens"
        raise UserError(f"open_clip's format needs a text tower of a known name; none has {shape}")
    plain = "cls_last_hidden_state_pooler"
    pooler = (
        "mean_pooler"
        if text["pool"] == "mean"
        else "cls_pooler"
        if text.get("rep_bias") and text.get("rep_dim")
        else plain
    )
    proj = (
        "mlp" if text.get("rep_dim") and not text.get("rep_bias", True) else "linear" if text.get("out_dim") else None
    )
    named = dict(hf_model_name=name, hf_model_pretrained=False, hf_tokenizer_name=name)
    length = {} if family == "roberta" else dict(context_length=text["length"])
    return named | dict(hf_pooler_type=pooler, hf_proj_type=proj) | length
