"""Which configs of open_clip load: prints the table of docs/models.md, one row a config. Shapes only, no weights.

python -m tests.support.sweep_open_clip [PART OF A NAME]
"""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as T

from tests.support import torchvision_import
from vlm_jax.errors import UserError
from vlm_jax.zoo.formats import open_clip as ours
from vlm_jax.zoo.formats import open_clip_coca as ours_coca
from vlm_jax.zoo.formats.open_clip_texts import NAMES
from vlm_jax.zoo.known import configs_of_open_clip
from vlm_jax.zoo.readers.tensors import Tensor
from vlm_jax.zoo.released import Released, scanned

torchvision_import.prepare()
open_clip = importlib.import_module("open_clip")

SIZES = {name: (family, *sizes) for family, known in NAMES.items() for name, sizes in known.items()}


def hf_config(name):
    """The config of a text tower's name, which open_clip would read from the hub."""
    if name not in SIZES:
        return T.M2M100Config(d_model=1024 if "600M" in name else 2048, encoder_layers=2, decoder_layers=1)
    family, width, depth, mlp_dim, vocab_size = SIZES[name]
    if family == "mt5":
        sizes = dict(d_model=width, num_layers=depth, d_ff=mlp_dim, num_heads=width // 64, d_kv=64)
        return T.MT5Config(**sizes, vocab_size=vocab_size)
    return (T.XLMRobertaConfig if name.startswith("xlm") else T.RobertaConfig)(
        hidden_size=width, num_hidden_layers=depth, intermediate_size=mlp_dim, num_attention_heads=width // 64,
        vocab_size=vocab_size, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip


def tensors_of(config):
    """Name -> `Tensor` without values, of the model that open_clip makes of a `model_cfg`."""
    custom = config.get("custom_text") or "hf_model_name" in config["text_cfg"]
    config = {key: value for key, value in config.items() if key != "custom_text"}
    config["text_cfg"] = config["text_cfg"] | {"hf_model_pretrained": False}
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with torch.device("meta"):
        model = kind(**config)
    unread = lambda index: np.zeros(())
    return {name: Tensor(tuple(t.shape), np.dtype(np.float32), unread) for name, t in model.state_dict().items()}


def verdict(name):
    config = open_clip.get_model_config(name)
    try:
        tensors = tensors_of(config)
    except Exception as error:  # of their side
        return f"not made: {str(error).splitlines()[0][:80]}"
    family = ours_coca if ours_coca.recognise(tensors) else ours
    try:
        section, entries, ignored = family.describe(tensors, config)
        Released("open_clip", Path(name), tensors, scanned(section), entries, ignored).match()
    except UserError as error:
        return re.sub(r"\s+", " ", f"refused: {error}")[:160]
    return "loads"


if __name__ == "__main__":
    open_clip.hf_model.AutoConfig.from_pretrained = hf_config
    part, wrong = sys.argv[1] if len(sys.argv) > 1 else "", []
    for name in open_clip.list_models():
        if part.lower() in name.lower():
            said = verdict(name)
            print(f"| {name} | {said} |", flush=True)
            wrong += [name] * ((said == "loads") != (name in configs_of_open_clip()))
    sys.exit(f"vlm_jax.zoo.known says otherwise of: {', '.join(wrong)}" if wrong else 0)
