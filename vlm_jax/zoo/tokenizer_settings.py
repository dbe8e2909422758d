"""Settings beside a tokenizer's file (tokenizer_config.json): read, known to change nothing, or refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers as hf

from vlm_jax.errors import UserError
from vlm_jax.zoo.formats import settings as allowed

FIX = "pass tokenizer= (a spec such as `json:/path/tokenizer.json`)"
# Settings that are read here, or compared with the tokenizer's own file; and those that change no token id.
READ = {
    "tokenizer_class", "padding_side", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "extra_ids",
    "pad_token", "bos_token", "eos_token", "cls_token", "sep_token", "add_bos_token", "add_eos_token",
    "add_prefix_space",
}  # fmt: skip
NEUTRAL = allowed.neutral(
    "unk_token mask_token additional_special_tokens extra_special_tokens added_tokens_decoder "
    "model_specific_special_tokens model_max_length max_length max_len model_input_names name_or_path "
    "tokenizer_file special_tokens_map_file vocab_file merges_file auto_map processor_class image_processor_type "
    "feature_extractor_type device_map is_local local_files_only from_slow backend legacy trim_offsets errors "
    "clean_up_tokenization_spaces spaces_between_special_tokens use_default_system_prompt chat_template "
    "response_schema truncation truncation_strategy stride padding pad_to_multiple_of pad_token_id "
    "pad_token_type_id pad_token_type cls_token_id sep_token_id bos_token_id eos_token_id return_token_type_ids "
    "language transformers_version tokenizer_type verbose",
    truncation_side=["right"], split_special_tokens=[False], do_basic_tokenize=[True], never_split=[[]],
    sp_model_kwargs=[{}], word_delimiter_token=[], remove_space=[True],
)  # fmt: skip


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Raises a UserError for the first setting that is neither read nor known to change nothing."""
    try:
        allowed.check(settings, READ, NEUTRAL, str(where))
    except UserError as error:
        raise UserError(f"{error}, or {FIX}") from None


def check_model(path: Path, kind: str, model: hf.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Raises a UserError if the settings, which override the file in Transformers, ask for another tokenization.

    Args:
      path: the tokenizer's file.
      kind: of its spec: "json", "wordpiece", "bpe".
      model: the tokenizer.
      settings: of tokenizer_config.json.
    """
    has = {}
    if isinstance(rule := model.normalizer, hf.normalizers.BertNormalizer):
        has = {"strip_accents": rule.strip_accents, "tokenize_chinese_chars": rule.handle_chinese_chars}
        has |= {"do_lower_case": rule.lowercase} if kind == "json" else {}
    if isinstance(rule := model.pre_tokenizer, hf.pre_tokenizers.ByteLevel):
        has["add_prefix_space"] = rule.add_prefix_space
    elif isinstance(rule, hf.pre_tokenizers.Metaspace):
        has["add_prefix_space"] = rule.prepend_scheme != "never"
    for key, value in has.items():
        asked = settings.get(key)
        if asked is not None and asked != value:
            raise UserError(f"{path}: tokenizer_config.json has {key} {asked!r:.20}, the tokenizer {value}; {FIX}")
