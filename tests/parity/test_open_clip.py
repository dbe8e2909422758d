"""open_clip's models at random init: saved there, loaded here, the same embeddings, logits and gradients."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip(
    "open_clip", reason="pip install --no-deps open_clip_torch timm torchvision ftfy", exc_type=Exception
)

import open_clip

import vlm_jax
from tests.support import make_references as references
from tests.support.open_clip_models import batch, new, save, theirs
from tests.support.paths import GOLDEN
from tests.support.released import by_their_names, loss_and_embeddings, read
from tests.support.torch_parity import close, gradients_like
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize
from vlm_jax.zoo import save as zoo_save
from vlm_jax.zoo.formats import open_clip_names

CLIP, SIGLIP = references.CLIP, references.SIGLIP
VISION, WORDS, SIGLIP_WORDS = CLIP["vision_cfg"], CLIP["text_cfg"], SIGLIP["text_cfg"]
CUSTOM = dict(embed_dim=12, custom_text=True)
SMALL = {
    "clip": dict(CLIP, quick_gelu=False),
    "clip_quick_gelu": CLIP,
    "layer_scale": dict(CLIP, vision_cfg=VISION | dict(ls_init_value=0.1), text_cfg=WORDS | dict(ls_init_value=0.1)),
    "not_square": dict(CLIP, vision_cfg=VISION | dict(image_size=[8, 16])),
    "avg": dict(CLIP, vision_cfg=VISION | dict(pool_type="avg")),
    "clipa": dict(CLIP, vision_cfg=VISION | dict(pool_type="avg", no_ln_pre=True, final_ln_after_pool=True)),
    "no_ln_pre": dict(CLIP, vision_cfg=VISION | dict(no_ln_pre=True)),
    "custom_text": dict(CUSTOM, vision_cfg=VISION, text_cfg=WORDS | dict(pool_type="eos", eos_id=30)),
    "tanh": dict(CUSTOM, vision_cfg=VISION, text_cfg=SIGLIP_WORDS | dict(act_kwargs=dict(approximate="tanh"))),
    "siglip": SIGLIP,
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name, tmp_path):
    model = new(SMALL[name])
    save(model, SMALL[name], tmp_path)
    inputs = batch(model)
    image, text, logits = theirs(model, *inputs)
    gradients_like(model, logits, model.logit_bias is not None)
    released, ours, params = read(tmp_path)
    loss = lambda params: loss_and_embeddings(ours, params, *inputs, model.logit_bias is not None)
    grads, (out, our_logits) = jax.jit(jax.grad(loss, has_aux=True))(params)
    close(out.image, image)
    close(out.text, text)
    close(our_logits, logits)
    gradients = by_their_names(released, grads)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        close(gradients[key], parameter.grad)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"siglip"}))
def test_exports_load_there(name, tmp_path):
    """What `save` writes, open_clip builds and loads, strictly, and computes the same."""
    model, config = new(SMALL[name]), SMALL[name]
    (tmp_path / "theirs").mkdir()
    save(model, config, tmp_path / "theirs")
    content = zoo_save.content_of(recognize.understand(tmp_path / "theirs"))
    zoo_save.write(dataclasses.replace(content, preprocess=None), tmp_path / "ours", "open_clip")
    written = json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"]
    kind = open_clip.CustomTextCLIP if written.pop("custom_text", False) else open_clip.CLIP
    again = kind(**written).eval()
    again.load_state_dict(load_file(tmp_path / "ours" / "open_clip_model.safetensors"))
    inputs = batch(model)
    with torch.no_grad():
        for got, want in zip(theirs(again, *inputs), theirs(model, *inputs), strict=True):
            close(got.numpy(), want)


def test_b32_from_a_folder_and_from_bare_files(tmp_path):
    config = open_clip.get_model_config("ViT-B-32")
    model = new(config)
    save(model, config, tmp_path)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    training = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": training}, tmp_path / "epoch_3.pt")
    images, token_ids = batch(model, 2)
    with torch.no_grad():
        image, text, logits = theirs(model, images, token_ids)
    for path in (tmp_path, tmp_path / "bare.pt", tmp_path / "epoch_3.pt"):
        bare = {} if path is tmp_path else dict(activation="gelu", preprocess="laion_half")
        loaded = vlm_jax.load(path, **bare)
        out = jax.jit(loaded.model.apply)({"params": loaded.params}, images, token_ids)
        close(out.image, image, 1e-4)
        close(out.text, text, 1e-4)
        close(out.scale * out.image @ out.text.T, logits, 1e-4)
        close(loaded.embed_image_batch(images), image, 1e-4)
    with pytest.raises(UserError, match="bare CLIP weights do not tell their activation; pass activation="):
        vlm_jax.load(tmp_path / "bare.pt")


@pytest.mark.parametrize(
    ("name", "projection"), [("vit_base_patch32_siglip_256", "none"), ("vit_base_patch16_siglip_224", "linear")]
)
def test_timm_towers_of_full_size(name, projection, tmp_path):
    """The first has tanh GELU in timm, the second exact GELU: nothing but the name tells."""
    image = dict(image_size=int(name[-3:]), timm_model_name=name, timm_pool="map", timm_proj=projection)
    config = dict(embed_dim=768, custom_text=True, init_logit_bias=-10, vision_cfg=image, text_cfg=SIGLIP_WORDS)
    model = new(config)
    save(model, config, tmp_path)
    images, token_ids = batch(model, 2)
    with torch.no_grad():
        want = theirs(model, images, token_ids)
    _, ours, params = read(tmp_path)
    out = jax.jit(ours.apply)({"params": params}, images, token_ids)
    close(out.image, want[0], 1e-4)
    close(out.text, want[1], 1e-4)
    close(out.scale * out.image @ out.text.T + out.bias, want[2], 1e-4)


def test_stored_references_are_what_is_computed_now():
    for name in (*references.TRANSFORMERS, *references.OPEN_CLIP):
        with np.load(GOLDEN / f"released_{name}.npz") as stored:
            fresh = references.make(name)
            assert fresh.keys() == set(stored)
            for key in stored:
                if key.startswith(("input/", "output/")):
                    np.testing.assert_allclose(fresh[key], stored[key], rtol=1e-5, atol=1e-5, err_msg=f"{name} {key}")
                elif key.endswith("model.safetensors"):
                    assert np.array_equal(fresh[key], stored[key]), (name, key)


def test_configs_by_name_are_theirs():
    assert all(config == open_clip.get_model_config(name) for name, config in open_clip_names.configs().items())


def test_bare_weights_by_name(tmp_path):
    """Of full size, the smallest there is."""
    theirs_model = open_clip.create_model("ViT-S-32").eval()
    torch.save(theirs_model.state_dict(), tmp_path / "epoch_3.pt")
    ours = vlm_jax.load(f"open_clip:ViT-S-32:{tmp_path / 'epoch_3.pt'}")
    images, texts = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32), ["a cat", "two dogs"]
    with torch.no_grad():
        image, text, _ = theirs(theirs_model, images, open_clip.get_tokenizer("ViT-S-32")(texts).numpy())
    close(ours.embed_image_batch(images), image)
    close(ours.embed_texts(texts), text)
