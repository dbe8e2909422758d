"""T5, T5 v1.1, Flan-T5, mT5 and UL2 in the layout of Transformers."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.zoo.formats.settings import check, neutral
from vlm_jax.zoo.formats.transformers_towers import ACTIVATIONS, COMMON
from vlm_jax.zoo.key_map import Entry, expand

MODEL_TYPES = ("t5", "mt5")
SHARED = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")  # names of one table; files have one or several
IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)  # of old files, never used
PROJECTIONS = (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
SIZES = {  # our field, their key, their default; all whole numbers of 1 or more
    "width": ("d_model", 512),
    "head_dim": ("d_kv", 64),
    "mlp_dim": ("d_ff", 2048),
    "depth": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_distance": ("relative_attention_max_distance", 128),
}
READ = {key for key, _ in SIZES.values()} | {
    "vocab_size", "n_positions", "num_decoder_layers", "feed_forward_proj", "layer_norm_epsilon", "model_type",
    "scale_decoder_outputs", "tie_word_embeddings", "decoder_start_token_id", "pad_token_id",
}  # fmt: skip
# `dense_act_fn` and `is_gated_act` are derived from `feed_forward_proj`.
NEUTRAL = COMMON | neutral("output_past dense_act_fn is_gated_act", is_encoder_decoder=[True])


def _attention(ours: str, theirs: str) -> tuple[tuple[str, str, str], ...]:
    rows = ((f"blocks_{{i}}/{ours}/{name}", f"block.{{i}}.layer.{theirs}.{own}") for name, own in PROJECTIONS)
    return tuple((*row, "dense") for row in rows)


ENCODER = (
    ("relative/table", "block.0.layer.0.SelfAttention.relative_attention_bias.weight", "same"),
    ("blocks_{i}/norm1", "block.{i}.layer.0.layer_norm", "norm"),
    *_attention("attn", "0.SelfAttention"),
    ("norm", "final_layer_norm", "norm"),
)
DECODER = (
    *ENCODER,
    ("blocks_{i}/cross_norm", "block.{i}.layer.1.layer_norm", "norm"),
    *_attention("cross_attn", "1.EncDecAttention"),
)
MLP = (  # {layer}: the last of a block
    ("blocks_{i}/norm2", "block.{i}.layer.{layer}.layer_norm", "norm"),
    ("blocks_{i}/mlp/fc1", "block.{i}.layer.{layer}.DenseReluDense.wi", "dense"),
    ("blocks_{i}/mlp/fc2", "block.{i}.layer.{layer}.DenseReluDense.wo", "dense"),
)
GATED_MLP = (
    MLP[0],
    ("blocks_{i}/mlp/gate", "block.{i}.layer.{layer}.DenseReluDense.wi_0", "dense"),
    ("blocks_{i}/mlp/fc1", "block.{i}.layer.{layer}.DenseReluDense.wi_1", "dense"),
    MLP[2],
)


def describe(config: Mapping[str, Any], shapes: Mapping[str, tuple]) -> tuple[dict[str, Any], list[Entry], list[str]]:
    """Returns the model of a config.json and its tensors; arguments and result as in `transformers.describe`.

    Logits use the token table if the file has no `lm_head`, or if the config scales hidden states for the table
    (original T5, whose files may repeat the table under that name). Transformers 5 also ties by the file; there,
    `scale_decoder_outputs` has the former role of `tie_word_embeddings`.
    """
    check(config, READ, NEUTRAL, "config.json")
    config = {key: value for key, value in config.items() if value is not None}
    numbers = {**dict(SIZES.values()), "vocab_size": 32_128, "n_positions": 512}
    numbers = {key: _whole(config, key, default) for key, default in numbers.items()}
    numbers["num_decoder_layers"] = _whole(config, "num_decoder_layers", numbers["num_layers"])
    if numbers["num_layers"] + numbers["num_decoder_layers"] > len(shapes):
        raise UserError(f"config.json has num_layers {numbers['num_layers']}, the file {len(shapes)} tensors")
    mt5 = config["model_type"] == "mt5"
    kind, _, activation = config.get("feed_forward_proj", "gated-gelu" if mt5 else "relu").rpartition("-")
    if kind not in ("", "gated"):
        raise UserError(f"config.json has feed_forward_proj {kind}-{activation}; expected e.g. relu or gated-gelu")
    activation = "gelu_new" if kind and activation == "gelu" else activation
    eps = config.get("layer_norm_epsilon", 1e-6)
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise UserError(f"config.json has layer_norm_epsilon {eps!r}; expected a small number such as 1e-06")
    fields = {ours: numbers[theirs] for ours, (theirs, _) in SIZES.items()} | dict(
        activation=choose(ACTIVATIONS, activation, "feed_forward_proj of config.json"), gated=bool(kind), norm_eps=eps
    )
    for key in ("scale_decoder_outputs", "tie_word_embeddings"):
        if not isinstance(config.get(key, True), bool):
            raise UserError(f"config.json has {key} {config[key]!r:.60}; expected true or false")
    scaled = config.get("scale_decoder_outputs", not mt5 and config.get("tie_word_embeddings", True))
    tied = scaled or "lm_head.weight" not in shapes
    decoder = fields | dict(
        depth=numbers["num_decoder_layers"],
        vocab_size=numbers["vocab_size"],
        length=numbers["n_positions"],
        start_id=_whole(config, "decoder_start_token_id", 0, 0, numbers["vocab_size"]),
        tied_scale=(fields["width"] ** -0.5 if scaled else 1.0) if tied else None,
    )
    pad_id = _whole(config, "pad_token_id", 0, 0, numbers["vocab_size"])
    section = dict(name="encoder_decoder", encoder=fields, decoder=decoder, pad_id=pad_id)
    shared = next((name for name in SHARED if f"{name}.weight" in shapes), SHARED[0])
    again = [f"{name}.weight" for name in SHARED if name != shared] + (["lm_head.weight"] if tied else [])
    return section, _entries(section, shared), [*IGNORED, *again]


def outline(section: Mapping[str, Any]) -> tuple[dict[str, Any], list[Entry]]:
    """Returns (config.json, entries) that might write a model, from all fields of its parts and its pad_id."""
    encoder, decoder = section["encoder"], section["decoder"]
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    config |= {theirs: encoder[ours] for ours, (theirs, _) in SIZES.items()}
    activation = {"gelu_tanh": "gelu_new"}.get(encoder["activation"], encoder["activation"])
    if encoder["gated"]:
        activation = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    tied = decoder["tied_scale"]
    config |= {
        "feed_forward_proj": activation,
        "num_decoder_layers": decoder["depth"],
        "vocab_size": decoder["vocab_size"],
        "n_positions": decoder["length"],
        "layer_norm_epsilon": encoder["norm_eps"],
        "decoder_start_token_id": decoder["start_id"],
        "pad_token_id": section["pad_id"],
        "eos_token_id": 1,
        "tie_word_embeddings": tied is not None,
        "scale_decoder_outputs": tied == encoder["width"] ** -0.5,
        "dropout_rate": 0.0,
    }
    return config, _entries(section, SHARED[0])


def _entries(section: Mapping[str, Any], shared: str) -> list[Entry]:
    entries = expand([("decoder/token_embed", shared, "embedding"), ("head", "lm_head", "dense")])
    for part, rows, layer in (("encoder", ENCODER, "1"), ("decoder", DECODER, "2")):
        mlp = GATED_MLP if section[part]["gated"] else MLP
        rows += tuple((ours, theirs.replace("{layer}", layer), kind) for ours, theirs, kind in mlp)
        entries += expand(rows, f"{part}/", f"{part}.", depth=section[part]["depth"])
    return entries


def _whole(config: Mapping[str, Any], key: str, default: int, least: int = 1, end: int = 2**31) -> int:
    value = config.get(key, default)
    if type(value) is not int or not least <= value < end:
        below = f", below {end:,}" if end < 2**31 else ""
        raise UserError(f"config.json has {key} {value!r:.60}; expected a whole number of {least} or more{below}")
    return value
