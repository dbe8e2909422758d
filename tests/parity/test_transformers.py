"""Each family of Transformers at random init: saved there, loaded here, the same embeddings, tokens, logits, gradients.

The models are small (two layers); `test_full_size` has B/32's width and depth.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.support.torch_parity import close, gradients_like, same_gradients
from tests.support.transformers_models import (
    DINO,
    IMAGES,
    PACKED,
    PAIRS,
    SPECIAL,
    TEXT,
    TEXTS,
    T,
    batch,
    padded,
    save_and_load,
    to_torch,
)
from vlm_jax import models


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", PAIRS)
def test_two_towers(name, tmp_path):
    theirs, model, params, released = save_and_load(PAIRS[name], tmp_path)
    images, token_ids = batch(np.random.default_rng(0), side=model.image.image_size)
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
