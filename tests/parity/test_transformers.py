"""Each family of Transformers at random init: saved there, loaded here, the same embeddings, tokens, logits, gradients.

The models are small (two layers); `test_full_size` has B/32's width and depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.support.torch_parity import close, gradients_like, same_gradients
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
    tree = jax.tree.map(jnp.asarray, _tree(params))
    return theirs, models.build(released.model), tree, released


def _tree(flat):
    import flax

    return flax.traverse_util.unflatten_dict(flat, sep="/")


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


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", PAIRS)
def test_two_towers(name, tmp_path):
    theirs, model, params, released = save_and_load(PAIRS[name], tmp_path)
    images, token_ids = batch(np.random.default_rng(0))
    if name == "metaclip_2_eos_of_2":
        token_ids = np.where(token_ids == 62, 2, token_ids)
    token_ids = padded(model, token_ids)
    inputs = to_torch(images, token_ids)
    if model.text.pad_mask:
        inputs["attention_mask"] = torch.tensor(token_ids != model.text.pad_id, dtype=torch.long)
    if name == "siglip":
        del inputs["attention_mask"]
    out = theirs(**inputs)
    logits = out.logits_per_image
    gradients_like(theirs, logits, "siglip" in name)

    def loss_fn(params):
        ours = model.apply({"params": params}, images, token_ids)
        logits = ours.scale * ours.image @ ours.text.T + (0 if ours.bias is None else ours.bias)
        return contrastive_loss(logits, "siglip" in name), (ours, logits)

    grads, (ours, our_logits) = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    close(ours.image, unit(out.image_embeds))
    close(ours.text, unit(out.text_embeds))
    close(our_logits, logits)
    same_gradients(theirs, grads, released, tmp_path / "gradients")


def contrastive_loss(logits, sigmoid):
    if sigmoid:
        return -jax.nn.log_sigmoid((2 * jnp.eye(len(logits)) - 1) * logits).sum() / len(logits)
    return -(jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean() / 2


@pytest.mark.parametrize("name", IMAGES)
def test_image_towers(name, tmp_path):
    theirs, model, params, _ = save_and_load(IMAGES[name], tmp_path)
    images, _ = batch(np.random.default_rng(1), side=model.image.image_size)
    out = theirs(pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    encoded = jax.jit(lambda p, x: model.image.apply({"params": p}, x))(params["image"], images)
    pooled = next(out[key] for key in ("image_embeds", "logits", "pooler_output") if key in out)
    close(encoded.pooled, pooled)
    if name.startswith(("vit", "dinov")) and "last_hidden_state" in out:
        close(encoded.tokens, out.last_hidden_state)


@pytest.mark.parametrize("name", TEXTS)
def test_text_towers(name, tmp_path):
    theirs, model, params, _ = save_and_load(TEXTS[name], tmp_path)
    token_ids = padded(model, batch(np.random.default_rng(2))[1])
    seen = token_ids != model.text.pad_id
    mask = torch.tensor(seen, dtype=torch.long)
    out = theirs(input_ids=torch.tensor(token_ids, dtype=torch.long), attention_mask=mask)
    encoded = jax.jit(lambda p, x: model.text.apply({"params": p}, x))(params["text"], token_ids)
    close(encoded.pooled, out.text_embeds if "text_embeds" in out else out.pooler_output)
    if name != "altclip":  # its tokens are after the projection
        close(np.asarray(encoded.tokens)[seen], out.last_hidden_state.detach().numpy()[seen])


def test_packed_patches(tmp_path):
    make = lambda: T.Siglip2Model(T.Siglip2Config(vision_config=PACKED, text_config=TEXT))
    theirs, model, params, released = save_and_load(make, tmp_path)
    rng = np.random.default_rng(3)
    _, token_ids = batch(rng)
    grid = np.array([[3, 5], [5, 4], [1, 20]], np.int32)  # of a table of 4 x 4
    patches = rng.normal(size=(3, 20, 16 * 16 * 3)).astype(np.float32)
    mask = (np.arange(20) < grid.prod(1)[:, None]).astype(np.int64)
    out = theirs(
        input_ids=torch.tensor(token_ids, dtype=torch.long),
        pixel_values=torch.tensor(patches),
        pixel_attention_mask=torch.tensor(mask),
        spatial_shapes=torch.tensor(grid, dtype=torch.long),
    )
    gradients_like(theirs, out.logits_per_image, True)

    def loss_fn(params):
        ours = model.apply({"params": params}, dict(patches=patches, grid=grid), token_ids)
        return contrastive_loss(ours.scale * ours.image @ ours.text.T + ours.bias, True), ours

    grads, ours = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
    close(ours.image, unit(out.image_embeds))
    close(ours.text, unit(out.text_embeds))
    same_gradients(theirs, grads, released, tmp_path / "gradients")


def test_positions_resample_as_theirs_do(tmp_path):
    make = lambda: T.Dinov2Model(T.Dinov2Config(**DINO | dict(image_size=64)))
    theirs, model, params, _ = save_and_load(make, tmp_path)
    images = np.random.default_rng(4).normal(size=(2, 96, 48, 3)).astype(np.float32)
    out = theirs(pixel_values=torch.tensor(images).permute(0, 3, 1, 2))
    table = np.asarray(params["image"]["pos_embed"])
    rows = models.resample_posemb(table[:, 1:], (4, 4), (6, 3), "bicubic_sharp")
    resized = model.image.clone(image_size=(96, 48))
    at = {"params": params["image"] | {"pos_embed": np.concatenate([table[:, :1], rows], 1)}}
    close(jax.jit(resized.apply)(at, images).pooled, out.pooler_output)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_full_size(name, tmp_path):
    size = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
    image = dict(size, image_size=224, patch_size=32)
    if name == "clip":
        make = lambda: T.CLIPModel(T.CLIPConfig(vision_config=image, text_config=text | SPECIAL | dict(vocab_size=64)))
    else:
        text = dict(size, vocab_size=64)
        make = lambda: T.SiglipModel(T.SiglipConfig(vision_config=image, text_config=text))
    theirs, model, params, _ = save_and_load(make, tmp_path)
    length = model.text.length
    images, token_ids = batch(np.random.default_rng(5), 2, 224, length)
    inputs = to_torch(images, token_ids)
    if name == "siglip":
        del inputs["attention_mask"]
    with torch.no_grad():
        out = theirs(**inputs)
    ours = jax.jit(model.apply)({"params": params}, images, token_ids)
    logits = ours.scale * ours.image @ ours.text.T + (0 if ours.bias is None else ours.bias)
    close(ours.image, unit(out.image_embeds), 1e-4)
    close(ours.text, unit(out.text_embeds), 1e-4)
    close(logits, out.logits_per_image, 1e-4)
