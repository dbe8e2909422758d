"""The tower types of Transformers: their configs in our fields, and their key tables."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.zoo.formats import transformers_tables as tables
from vlm_jax.zoo.formats.settings import check, neutral

ACTIVATIONS = {  # theirs, ours; the first of several names is written
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
IMAGE = {**SIZES, "image_size": "image_size", "patch": "patch_size"}
TEXT = {**SIZES, "vocab_size": "vocab_size", "length": "max_position_embeddings"}
# Of all configs: how a model is trained, generates or is served, and what its outputs are called.
COMMON = neutral(
    "_name_or_path _commit_hash architectures model_type transformers_version torch_dtype dtype use_bfloat16 "
    "torchscript attn_implementation _attn_implementation _attn_implementation_autoset use_cache "
    "gradient_checkpointing "
    "return_dict return_dict_in_generate output_attentions output_hidden_states output_scores tf_legacy_loss "
    "chunk_size_feed_forward tie_encoder_decoder tie_word_embeddings tokenizer_class prefix auto_map custom_pipelines "
    "finetuning_task task_specific_params problem_type id2label label2id num_labels _num_labels "
    "initializer_range initializer_factor logit_scale_init_value hidden_dropout_prob attention_probs_dropout_prob "
    "attention_dropout dropout hidden_dropout classifier_dropout drop_path_rate dropout_rate dropout_prob "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
    "begin_suppress_tokens exponential_decay_length_penalty bos_token_id sep_token_id "
    "pad_token_id eos_token_id projection_dim vocab_size_or_config_json_file",
    pruned_heads=[{}], is_encoder_decoder=[False], is_decoder=[False], add_cross_attention=[False],
    cross_attention_hidden_size=[], num_channels=[3],
)  # fmt: skip
BACKBONE = neutral("out_features out_indices stage_names reshape_hidden_states apply_layernorm use_mask_token")
# The smallest valid numbers.
LEAST = dict(width=1, depth=1, heads=1, mlp_dim=1, patch=1, image_size=1, vocab_size=1, length=1)
LEAST |= dict(token_types=0, registers=0, pad_id=0, eos_id=0)


class Tower(NamedTuple):
    """A tower type (`model_type`) of Transformers.

    Attributes:
      rows: the key table, or a function of our section that returns one.
      fields: our field -> their key.
      fixed: our fields that the type decides.
      defaults: their keys that a config.json may leave out.
      adapt: (section, config, tensor names below the prefix) -> further fields of our section.
      reverse: our section -> further keys of their config.
      neutral: keys besides `COMMON` that change nothing, see `settings.check`.
    """

    rows: tables.Rows | Callable[[Mapping[str, Any]], tables.Rows]
    fields: Mapping[str, str]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    adapt: Callable[[dict, dict, Collection[str]], dict] = lambda section, config, names: {}
    reverse: Callable[[dict], dict] = lambda section: {}
    neutral: Mapping[str, tuple] = {}


CLIP_DEFAULTS = dict(hidden_act="quick_gelu", layer_norm_eps=1e-5)
SIGLIP_DEFAULTS = dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, hidden_size=768, intermediate_size=3072)
SIGLIP_DEFAULTS |= dict(num_hidden_layers=12, num_attention_heads=12)


SQUARE = (tables.CLIP_VISION, tables.SIGLIP_VISION)  # Transformers makes these towers for squares only


def rows_of(tower: Tower, section: Mapping[str, Any]) -> tables.Rows:
    """Returns the tower's table."""
    return tower.rows(section) if callable(tower.rows) else tower.rows


def read_config(tower: Tower, config: Mapping[str, Any], names: Collection[str]) -> dict:
    """Returns our section for their config of a tower; `names`: the tensors', below the prefix.

    Raises:
      UserError: a setting is wrong, or is neither read nor known to change nothing.
    """
    check(config, {*tower.fields.values(), *tower.defaults}, COMMON | tower.neutral, "config.json")
    config = {**tower.defaults, **{key: value for key, value in config.items() if value is not None}}
    fields = {ours: config[theirs] for ours, theirs in tower.fields.items() if theirs in config}
    _check(tower, fields | {"eos_id": config.get("eos_token_id", 0)})
    fields["activation"] = choose(ACTIVATIONS, fields["activation"], "hidden_act of config.json")
    return fields | dict(tower.fixed) | tower.adapt(fields, config, names)


def _check(tower: Tower, fields: Mapping[str, Any]) -> None:
    """Raises a UserError for an invalid number."""
    for ours, least in LEAST.items():
        given = fields.get(ours, least)
        sides = (
            ours == "image_size" and tower.rows not in SQUARE and isinstance(given, list | tuple) and len(given) == 2
        )
        for size in given if sides else [given]:
            if type(size) is not int or not least <= size < 2**31:
                name = tower.fields.get(ours, "eos_token_id")
                raise UserError(f"config.json has {name} {given!r}; expected a whole number of {least} or more")
    if type(fields["norm_eps"]) not in (int, float) or not 0 <= fields["norm_eps"] < 1:
        raise UserError(f"config.json has layer_norm_eps {fields['norm_eps']!r}; expected a small number such as 1e-06")


def write_config(tower: Tower, fields: Mapping[str, Any]) -> dict:
    """Returns their config of a tower from all our `fields`, as far as their keys can express them."""
    config = {theirs: fields.get(ours) for ours, theirs in tower.fields.items()}
    if isinstance(size := config.get("image_size"), tuple) and len({*size}) == 1:
        config["image_size"] = size[0]
    config["hidden_act"] = next((t for t, ours in ACTIVATIONS.items() if ours == fields["activation"]), None)
    return config | tower.reverse(fields)
