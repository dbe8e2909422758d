"""Tokenizers beside open_clip's weights: a folder's files, and what open_clip does to a text before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_jax.config import choose
from vlm_jax.data import ops
from vlm_jax.errors import UserError
from vlm_jax.zoo.formats.settings import check
from vlm_jax.zoo.tokenizer_files import FIX, from_transformers

LENGTH = 77  # open_clip's default
# Text ops of open_clip's cleaning, by its name.
CLEAN = {"whitespace": ("clean",), "lower": ("clean", "lower"), "canonicalize": ("clean", "canonicalize")}


def read(folder: Path, length: int, text_cfg: Mapping[str, Any]) -> tuple[str, str]:
    """Returns (tokenizer spec, ops) of an open_clip folder.

    Args:
      folder: holds files as for `from_transformers`, unless `text_cfg` means CLIP's own tokenizer.
      length: the text tower's.
      text_cfg: of open_clip_config.json.

    Raises:
      UserError: there is no tokenizer, or a setting is unknown.
    """
    kwargs = text_cfg.get("tokenizer_kwargs") or {}
    check(kwargs, ("clean", "strip_sep_token"), {}, "text_cfg.tokenizer_kwargs")
    named = bool(text_cfg.get("hf_tokenizer_name"))
    if text_cfg.get("hf_model_name"):  # the tower takes longer texts than open_clip cuts
        length = min(length, text_cfg.get("context_length") or LENGTH)
    clean = kwargs.get("clean") or ("whitespace" if named else "lower")
    ops_of_text = choose(CLEAN, clean, "text_cfg.tokenizer_kwargs.clean")
    if named:
        strip = bool(kwargs.get("strip_sep_token"))
        return from_transformers(folder, length, "siglip", clean=ops_of_text, strip_sep=strip)
    if clean == "whitespace" or kwargs.get("strip_sep_token"):
        raise UserError(f"text_cfg.tokenizer_kwargs are {kwargs}; CLIP's own tokenizer here always lower-cases; {FIX}")
    return "clip", " | ".join([*(ops_of_text if clean != "lower" else ()), f"tokenize({length})"])


def cleaning(tokenize_ops: str, tokenizer: Any) -> str:
    """Returns the key of `CLEAN` that comes nearest to the ops before a tokenizer, and changes no result of theirs."""
    pipeline = ops.parse(tokenize_ops, tokenizer)
    steps = {step.name: step.kwargs for step in (*pipeline.before, *pipeline.after)}
    canonical = steps.get("canonicalize")
    if canonical is not None and canonical.get("lower", True) and canonical.get("underscore", "space") == "space":
        return "canonicalize"
    return "lower" if "lower" in steps else "whitespace"
