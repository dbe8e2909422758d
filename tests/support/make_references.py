"""Writes `tests/golden/released_*.npz`: released families, very small, with what torch computes from them.

python -m tests.support.make_references

Each holds the files of a checkpoint as bytes (its tensors in half precision), inputs, outputs, and, of two towers, the
gradients of the contrastive loss as another such file. `tests/zoo/formats/test_references.py` loads them without torch.
"""

import json
import tempfile

import numpy as np
import open_clip
import timm
import torch
import transformers as T
from open_clip.coca_model import CoCa
from safetensors.torch import load_file, save

from tests.support.paths import GOLDEN
from tests.support.torch_parity import gradients_like

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
IMAGE = dict(**SIZES, intermediate_size=32, image_size=8, patch_size=4)
TEXT = dict(**SIZES, intermediate_size=32, vocab_size=32, max_position_embeddings=8)
DINO = dict(**SIZES, mlp_ratio=2, image_size=8, patch_size=4)
PACKED = dict(**SIZES, intermediate_size=32, num_patches=4, patch_size=4)
SPECIAL = dict(bos_token_id=29, eos_token_id=30, pad_token_id=0)
OUT = dict(projection_dim=12)

# --- models ---------------------------------------------------------------------------------------------------------


def clip(**text):
    return T.CLIPModel(T.CLIPConfig(vision_config=IMAGE, text_config=TEXT | SPECIAL | text, **OUT))


def dual():
    configs = T.ViTConfig(**IMAGE), T.BertConfig(**TEXT)
    return T.VisionTextDualEncoderModel(T.VisionTextDualEncoderConfig.from_vision_text_configs(*configs, **OUT))


TRANSFORMERS = {
    "clip_eos": clip,
    "clip_argmax": lambda: clip(eos_token_id=2, hidden_act="gelu"),
    "siglip": lambda: T.SiglipModel(T.SiglipConfig(vision_config=IMAGE, text_config=TEXT)),
    "siglip2": lambda: T.Siglip2Model(T.Siglip2Config(vision_config=PACKED, text_config=TEXT)),
    "dual": dual,
    "clip_vision": lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**IMAGE, **OUT)),
    "clip_text": lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT | SPECIAL, **OUT)),
    "vit": lambda: T.ViTModel(T.ViTConfig(**IMAGE)),
    "vit_classifier": lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE, num_labels=5)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**DINO, layerscale_value=0.7)),
    "dinov2_gated": lambda: T.Dinov2Model(T.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2_registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO)),
    "dinov3": lambda: T.DINOv3ViTModel(
        T.DINOv3ViTConfig(**IMAGE, num_register_tokens=2, layerscale_value=0.7, use_gated_mlp=True)
    ),
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "xlm_roberta": lambda: T.XLMRobertaModel(
        T.XLMRobertaConfig(**TEXT | dict(max_position_embeddings=9, pad_token_id=0))
    ),
}

# What open_clip_config.json holds: the fields that are not their defaults.
VISION = dict(image_size=8, patch_size=4, layers=2, width=16, head_width=8, mlp_ratio=2)
WORDS = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=2, mlp_ratio=2)
CLIP = dict(embed_dim=12, quick_gelu=True, vision_cfg=VISION, text_cfg=WORDS)
SIGLIP_WORDS = WORDS | dict(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs=dict(eps=1e-6))
TRUNK = dict(image_size=8, head_width=8, timm_model_name="vit_siglip", timm_pool="map", timm_proj="none")
SIGLIP = dict(embed_dim=16, init_logit_bias=-10, custom_text=True, vision_cfg=TRUNK, text_cfg=SIGLIP_WORDS)
# As OpenAI gave them out, heads have 64 dimensions.
BARE = dict(embed_dim=12, quick_gelu=True)
BARE |= dict(vision_cfg=VISION | dict(width=64, head_width=64, layers=1, mlp_ratio=0.5))
BARE |= dict(text_cfg=WORDS | dict(width=64, heads=1, layers=1, mlp_ratio=0.5))


class TimmTower(torch.nn.Module):
    """open_clip's `TimmModel`, of a trunk that timm has no name for."""

    def __init__(self, **fields):
        super().__init__()
        self.trunk = timm.models.VisionTransformer(num_classes=0, class_token=False, global_pool="map", **fields)
        self.head = torch.nn.Sequential()

    def forward(self, images):
        return self.head(self.trunk(images))


SMALLER = {  # timm's name -> arguments that make it a small model
    "eva02_base_patch16_clip_224": dict(embed_dim=64, num_heads=1, depth=1, img_size=8, patch_size=4),
    "convnext_tiny": dict(depths=(1, 1, 2, 1), dims=(8, 8, 12, 16)),
}
EVA02 = dict(image_size=8, timm_model_name="eva02_base_patch16_clip_224", timm_pool="token", timm_proj="")
CONVNEXT = dict(image_size=32, timm_model_name="convnext_tiny", timm_pool="", timm_proj="mlp")
RESNET = dict(image_size=32, layers=[1, 1, 2, 1], width=2, head_width=32, patch_size=None)
FAMILIES = {
    "open_clip_eva02": dict(embed_dim=12, vision_cfg=EVA02, text_cfg=WORDS),
    "open_clip_convnext": dict(embed_dim=12, vision_cfg=CONVNEXT, text_cfg=WORDS),
    "open_clip_resnet": dict(embed_dim=12, quick_gelu=True, vision_cfg=RESNET, text_cfg=WORDS),
}


def open_clip_model(config):
    """The model of a `model_cfg`; a trunk named `vit_siglip`, or in `SMALLER`, is a small one."""
    timm_name = config["vision_cfg"].get("timm_model_name")
    if timm_name in SMALLER:
        create, timm.create_model = timm.create_model, lambda *args, **more: create(*args, **more, **SMALLER[timm_name])
        try:
            return open_clip.CLIP(**config)
        finally:
            timm.create_model = create
    if timm_name is None:
        return open_clip.CLIP(**config)
    config = {key: value for key, value in config.items() if key != "custom_text"} | dict(vision_cfg=VISION)
    model = open_clip.CustomTextCLIP(**config)
    model.visual = TimmTower(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2)
    return model


OPEN_CLIP = {"open_clip": CLIP, "open_clip_siglip": SIGLIP, "openai": BARE} | FAMILIES

POOLER = dict(attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=5, output_tokens=True)
COCA_WORDS = WORDS | dict(width=12)
COCA = dict(embed_dim=12, vision_cfg=VISION | POOLER)
COCA |= dict(text_cfg=COCA_WORDS | dict(embed_cls=True, output_tokens=True))
COCA |= dict(multimodal_cfg={key: value for key, value in COCA_WORDS.items() if key != "mlp_ratio"})

T5_SIZES = dict(vocab_size=32, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2)
T5_SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=2)
T5 = {
    "t5": dict(feed_forward_proj="relu"),
    "t5_gated": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}

# --- what they compute ----------------------------------------------------------------------------------------------


def randomised(model):
    """The model with parameters that half precision holds exactly; zeros and ones would hide swapped biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.05 * torch.randn_like(parameter) if parameter.ndim else 0
            parameter.copy_((parameter + noise).half().float())
        for name, statistic in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                drawn = torch.rand_like(statistic) + (0.5 if name.endswith("var") else -0.5)
                statistic.copy_(drawn.half().float())
    return model.eval()


def inputs(packed=False, side=8):
    """Images and token ids, the first text a short one."""
    rng = np.random.default_rng(0)
    token_ids = rng.integers(3, 29, (3, 8)).astype(np.int32)
    token_ids[0, 5:], token_ids[1:, -1] = (30, 0, 0), 30
    if not packed:
        return dict(image=rng.normal(size=(3, side, side, 3)).astype(np.float32), token_ids=token_ids)
    patches = rng.normal(size=(3, 6, 4 * 4 * 3)).astype(np.float32)
    return dict(patches=patches, grid=np.array([[2, 3], [1, 2], [1, 5]], np.int32), token_ids=token_ids)


def to_torch(arrays, sees_padding):
    """The arguments of Transformers' models."""
    ids = torch.tensor(arrays["token_ids"], dtype=torch.long)
    of = dict(input_ids=ids, attention_mask=torch.ones_like(ids) if sees_padding else (ids != 0).long())
    if "image" in arrays:
        return of | dict(pixel_values=torch.tensor(arrays["image"]).permute(0, 3, 1, 2))
    grid = torch.tensor(arrays["grid"], dtype=torch.long)
    mask = (torch.arange(arrays["patches"].shape[1]) < grid.prod(1)[:, None]).long()
    return of | dict(pixel_values=torch.tensor(arrays["patches"]), spatial_shapes=grid, pixel_attention_mask=mask)


def of_transformers(name, make):
    """The npz of one model."""
    model = randomised(make())
    arrays = inputs(name == "siglip2")
    given = to_torch(arrays, sees_padding=name not in ("dual", "bert", "xlm_roberta"))
    if name in ("siglip", "siglip2"):
        del given["attention_mask"]
    takes_images = name in ("clip_vision", "vit", "vit_classifier") or name.startswith("dinov")
    two = name in ("clip_eos", "clip_argmax", "siglip", "siglip2", "dual")
    if not two:
        keep = ("pixel_values",) if takes_images else ("input_ids", "attention_mask")
        given = {key: given[key] for key in keep}
        arrays = {key: arrays[key] for key in (("image",) if takes_images else ("token_ids",))}
    stored = {f"input/{key}": value for key, value in arrays.items()}
    stored["config.json"] = text_of(model.config.to_dict())
    stored["model.safetensors"] = file_of(saved_tensors(model), torch.half)
    out = model(**given)
    seen = given["attention_mask"][..., None] if "attention_mask" in given else 1
    if two:
        image_tokens = out.vision_model_output.last_hidden_state
        if name.startswith("clip"):
            image_tokens = model.vision_model.post_layernorm(image_tokens)
        found = dict(image=out.image_embeds, text=out.text_embeds, logits=out.logits_per_image)
        found |= dict(image_tokens=image_tokens, text_tokens=out.text_model_output.last_hidden_state * seen)
        gradients_like(model, out.logits_per_image, "siglip" in name)
        stored["gradients.safetensors"] = file_of(gradients_of(model), torch.float)
    else:
        keys = ("image_embeds", "text_embeds", "logits", "pooler_output")
        found = dict(pooled=next(out[key] for key in keys if key in out))
        if name == "vit" or name.startswith("dinov"):
            found["image_tokens"] = out.last_hidden_state
        elif not takes_images:
            found["text_tokens"] = out.last_hidden_state * seen
    if name == "siglip2":  # positions beyond a picture's patches hold nothing
        found["image_tokens"] = found["image_tokens"] * given["pixel_attention_mask"][..., None]
    return stored | {f"output/{key}": value.detach().numpy() for key, value in found.items()}


def text_of(value):
    """The bytes of a JSON file."""
    return np.frombuffer(json.dumps(value, default=str).encode(), np.uint8)


def file_of(tensors, dtype):
    """The bytes of a safetensors file."""
    return np.frombuffer(save({key: value.detach().to(dtype) for key, value in tensors.items()}), np.uint8)


def saved_tensors(model):
    """The tensors as `save_pretrained` names them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def gradients_of(model):
    """The gradients by the names of the saved tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return saved_tensors(model)


def of_open_clip(name, config):
    """The npz of one model."""
    model = randomised(open_clip_model(config))
    arrays = inputs(side=config["vision_cfg"]["image_size"])
    images = torch.tensor(arrays["image"]).permute(0, 3, 1, 2)
    image = model.encode_image(images, normalize=True)
    text = model.encode_text(torch.tensor(arrays["token_ids"], dtype=torch.long), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T + (0 if model.logit_bias is None else model.logit_bias)
    stored = {f"input/{key}": value for key, value in arrays.items()}
    if name == "openai":
        stored["bare.safetensors"] = file_of(model.state_dict(), torch.half)
    else:
        gradients_like(model, logits, name == "open_clip_siglip")
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        stored["open_clip_config.json"] = text_of(dict(model_cfg=config))
        stored["open_clip_model.safetensors"] = file_of(model.state_dict(), torch.half)
        if name not in FAMILIES:
            stored["gradients.safetensors"] = file_of(gradients, torch.float)
    found = dict(image=image, text=text, logits=logits)
    return stored | {f"output/{key}": value.detach().numpy() for key, value in found.items()}


def of_coca():
    """The npz of a CoCa, with the logits of the tokens after the first."""
    model = randomised(CoCa(**COCA))
    with torch.no_grad():  # open_clip leaves it as the memory was
        projection = model.text_decoder.text_projection
        projection.copy_((0.3 * torch.randn_like(projection)).half().float())
    arrays = inputs()
    arrays["token_ids"][:, 0] = 29
    images = torch.tensor(arrays["image"]).permute(0, 3, 1, 2)
    out = model(images, torch.tensor(arrays["token_ids"], dtype=torch.long))
    found = dict(image=out["image_features"], text=out["text_features"], logits=out["logits"])
    stored = {f"input/{key}": value for key, value in arrays.items()}
    stored["open_clip_config.json"] = text_of(dict(model_cfg=COCA))
    stored["open_clip_model.safetensors"] = file_of(model.state_dict(), torch.half)
    return stored | {f"output/{key}": value.detach().numpy() for key, value in found.items()}


def of_t5(config):
    """The npz of a T5: states, logits, the loss of a token, and what greedy decoding and a beam search write."""
    model = T.T5ForConditionalGeneration(T.T5Config(**T5_SIZES, **config, dropout_rate=0.0))
    with torch.no_grad():
        model.shared.weight.mul_(0.2)  # else a tied model repeats its last token
    if not model.config.scale_decoder_outputs:  # T5 v1.1, which Transformers 5 ties at init
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(32, 16))
    model = randomised(model)
    rng = np.random.default_rng(0)
    arrays = {key: rng.integers(3, 32, (3, size)).astype(np.int32) for key, size in (("input", 14), ("target", 9))}
    for ids, length in ((arrays["input"], 8), (arrays["target"], 4)):
        ids[0, length:], ids[0, length - 1], ids[1:, -1] = 0, 1, 1
    tensors = {key: torch.tensor(ids).long() for key, ids in arrays.items()}
    seen = (tensors["input"] != 0).long()
    given = dict(input_ids=tensors["input"], attention_mask=seen)
    labels = tensors["target"].masked_fill(tensors["target"] == 0, -100)
    shown = torch.nn.functional.pad(tensors["target"][:, :-1], (1, 0), value=2)
    out = model(**given, decoder_input_ids=shown, labels=labels)
    out.loss.backward()
    found = dict(encoder=out.encoder_last_hidden_state * seen[..., None], logits=out.logits, loss=out.loss)
    options = dict(max_length=9, do_sample=False, use_cache=False, length_penalty=0.0)
    found["greedy"] = model.generate(**given, **options, num_beams=1)[:, 1:]
    model.generation_config.eos_token_id = None  # theirs takes an ended text among the first 3 candidates, ours of 6
    found["beams"] = model.generate(**given, **options, num_beams=3, num_return_sequences=3)[:, 1:].reshape(3, 3, -1)
    stored = {f"input/{key}": value for key, value in arrays.items()}
    stored["config.json"] = text_of(model.config.to_dict())
    stored["model.safetensors"] = file_of(saved_tensors(model), torch.half)
    stored["gradients.safetensors"] = file_of(gradients_of(model), torch.float)
    return stored | {f"output/{key}": value.detach().numpy() for key, value in found.items()}


def make(name):
    torch.manual_seed(0)
    if name in T5:
        return of_t5(T5[name])
    if name == "coca":
        return of_coca()
    return of_open_clip(name, OPEN_CLIP[name]) if name in OPEN_CLIP else of_transformers(name, TRANSFORMERS[name])


if __name__ == "__main__":
    for name in (*TRANSFORMERS, *OPEN_CLIP, *T5, "coca"):
        np.savez_compressed(GOLDEN / f"released_{name}.npz", **make(name))
