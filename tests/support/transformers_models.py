"""Models of Transformers at random init, small: what the parity suite saves there and loads here."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from vlm_jax import models
from vlm_jax.zoo import recognize
from vlm_jax.zoo.load import read_params

IMAGE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
IMAGE |= dict(patch_size=16)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
TEXT |= dict(max_position_embeddings=16)
ROBERTA = TEXT | dict(max_position_embeddings=18, pad_token_id=1)
DINO = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}
DINOV3 = IMAGE | dict(num_register_tokens=3, image_size=48)
PACKED = {key: value for key, value in IMAGE.items() if key != "image_size"} | dict(num_patches=16)
SPECIAL = dict(bos_token_id=61, eos_token_id=62, pad_token_id=0)
T = transformers


def dual(vision, text=None):
    text = text or T.BertConfig(**TEXT)
    return T.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=24)


def clip(**text):
    return T.CLIPConfig(vision_config=IMAGE, text_config=TEXT | SPECIAL | text, projection_dim=24)


CLASSIFIED = lambda config: config(vision_config=IMAGE, text_config=TEXT, num_labels=5)
PAIRS = {
    "clip_eos": lambda: T.CLIPModel(clip()),
    "clip_argmax": lambda: T.CLIPModel(clip(eos_token_id=2, hidden_act="gelu")),
    "siglip": lambda: T.SiglipModel(T.SiglipConfig(vision_config=IMAGE, text_config=TEXT)),
    "dual_vit": lambda: T.VisionTextDualEncoderModel(dual(T.ViTConfig(**IMAGE))),
    "dual_xlm_roberta": lambda: T.VisionTextDualEncoderModel(
        dual(T.ViTConfig(**IMAGE), T.XLMRobertaConfig(**ROBERTA | dict(type_vocab_size=1)))
    ),
    "metaclip_2": lambda: T.MetaClip2Model(
        T.MetaClip2Config(vision_config=IMAGE, text_config=TEXT | SPECIAL, projection_dim=24)
    ),
    "metaclip_2_eos_of_2": lambda: T.MetaClip2Model(
        T.MetaClip2Config(vision_config=IMAGE, text_config=TEXT | dict(eos_token_id=2), projection_dim=24)
    ),
    "chinese_clip": lambda: T.ChineseCLIPModel(
        T.ChineseCLIPConfig(vision_config=IMAGE, text_config=TEXT, projection_dim=24)
    ),
    "altclip": lambda: T.AltCLIPModel(
        T.AltCLIPConfig(vision_config=IMAGE, text_config=ROBERTA | dict(project_dim=20), projection_dim=24)
    ),
    "dual_dinov3": lambda: T.VisionTextDualEncoderModel(dual(T.DINOv3ViTConfig(**DINOV3, use_gated_mlp=True))),
    "dual_clip": lambda: T.VisionTextDualEncoderModel(dual(T.CLIPVisionConfig(**IMAGE))),
}
IMAGES = {
    "clip": lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**IMAGE, projection_dim=24)),
    "vit": lambda: T.ViTModel(T.ViTConfig(**IMAGE)),
    "vit_relu": lambda: T.ViTModel(T.ViTConfig(**IMAGE, pooler_act="relu")),
    "clip_classifier": lambda: T.CLIPForImageClassification(CLASSIFIED(T.CLIPConfig)),
    "siglip_classifier": lambda: T.SiglipForImageClassification(CLASSIFIED(T.SiglipConfig)),
    "vit_classifier": lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE, num_labels=5)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**DINO, layerscale_value=0.7)),
    "dinov2_gated": lambda: T.Dinov2Model(T.Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "vit_no_biases": lambda: T.ViTModel(T.ViTConfig(**IMAGE, qkv_bias=False)),
    "dinov2_no_biases": lambda: T.Dinov2Model(T.Dinov2Config(**DINO, qkv_bias=False)),
    "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**DINOV3, layerscale_value=0.7)),
    "dinov3_gated": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**DINOV3, use_gated_mlp=True, hidden_act="silu")),
    "dinov3_biases": lambda: T.DINOv3ViTModel(
        T.DINOv3ViTConfig(**DINOV3, key_bias=True, value_bias=False, mlp_bias=False, rope_theta=50.0)
    ),
    "metaclip_2": lambda: T.MetaClip2VisionModelWithProjection(T.MetaClip2VisionConfig(**IMAGE, projection_dim=24)),
    "chinese_clip": lambda: T.ChineseCLIPVisionModel(T.ChineseCLIPVisionConfig(**IMAGE)),
    "dinov2_registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO)),
}
TEXTS = {
    "clip": lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT | SPECIAL, projection_dim=24)),
    "bert": lambda: T.BertModel(T.BertConfig(**TEXT)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**ROBERTA)),
    "xlm_roberta": lambda: T.XLMRobertaModel(T.XLMRobertaConfig(**ROBERTA, layer_norm_eps=1e-5)),
    "camembert": lambda: T.CamembertModel(T.CamembertConfig(**ROBERTA)),
    "chinese_clip": lambda: T.ChineseCLIPTextModel(T.ChineseCLIPTextConfig(**TEXT)),
    "altclip": lambda: T.AltCLIPTextModel(T.AltCLIPTextConfig(**ROBERTA, project_dim=20)),
    "metaclip_2": lambda: T.MetaClip2TextModelWithProjection(
        T.MetaClip2TextConfig(**TEXT | SPECIAL, projection_dim=24)
    ),
    "bert_decoder": lambda: T.BertModel(T.BertConfig(**TEXT, is_decoder=True)),
}


def save_and_load(make, folder):
    """The model there (randomised, in eval mode), and (model, params, released) here."""
    torch.manual_seed(0)
    theirs = make().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim:  # zeros and ones of an init would hide swapped biases
                parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    released = recognize.understand(folder)
    params = read_params(released.match(), released.shapes, released.tensors)
    tree = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(params, sep="/"))
    return theirs, models.build(released.model), tree, released


def batch(rng, size=3, side=32, length=16):
    images = rng.normal(size=(size, side, side, 3)).astype(np.float32)
    token_ids = rng.integers(3, 61, (size, length)).astype(np.int32)
    token_ids[0, 9], token_ids[0, 10:] = 62, 0  # a short text
    token_ids[1:, -1] = 62
    return images, token_ids


def padded(model, token_ids):
    """Token ids with the padding of the model's text tower."""
    return np.where(token_ids == 0, model.text.pad_id, token_ids) if model.text.pad_mask else token_ids


def to_torch(images, token_ids):
    mask = torch.ones(token_ids.shape, dtype=torch.long)
    return dict(
        pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
        input_ids=torch.tensor(token_ids, dtype=torch.long),
        attention_mask=mask,
    )
