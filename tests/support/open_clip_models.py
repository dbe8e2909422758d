"""Models of open_clip at random init: what the parity suite saves there and loads here."""

import json

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from tests.support import make_references as references


def new(config):
    """A randomised model of open_clip with a `model_cfg`."""
    torch.manual_seed(0)
    if config is references.SIGLIP:
        return references.randomised(references.open_clip_model(config))
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    return references.randomised(kind(**{key: value for key, value in config.items() if key != "custom_text"}))


def save(model, config, folder):
    """As open_clip puts a model on the hub."""
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def batch(model, size=3):
    """Images [B, H, W, 3] and token ids, the first text a short one."""
    rng = np.random.default_rng(0)
    sides = getattr(model.visual, "image_size", 8)
    sides = (sides, sides) if isinstance(sides, int) else sides
    images = rng.normal(size=(size, *sides, 3)).astype(np.float32)
    of_transformers = hasattr(getattr(model, "text", None), "config")  # has its own length, or none
    length = 16 if of_transformers else model.context_length
    token_ids = rng.integers(3, 29, (size, length)).astype(np.int32)
    token_ids[0, 5:], token_ids[1:, -1] = 0, 30
    token_ids[0, 5] = 30
    return images, token_ids


def theirs(model, images, token_ids):
    """Unit-norm image and text embeddings, and logits."""
    image = model.encode_image(torch.tensor(images).permute(0, 3, 1, 2), normalize=True)
    text = model.encode_text(torch.tensor(token_ids, dtype=torch.long), normalize=True)
    return image, text, model.logit_scale.exp() * image @ text.T + (model.logit_bias or 0)
