"""Released families as torch computes them (`tests/support/make_references.py`), from files to values and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.compare import close_in_scale as close
from tests.support.released import by_their_names, loss_and_embeddings, read, unpack
from vlm_jax.models.generate import Special, beam_search, sample
from vlm_jax.zoo.readers.tensors import open_tensors

SIGMOID = ("siglip", "siglip2", "open_clip_siglip")
PAIRS = ("clip_eos", "clip_argmax", "dual", "open_clip", *SIGMOID)
TOWERS = {
    "clip_vision": "image",
    "clip_text": "text",
    "vit": "image",
    "vit_classifier": "image",
    "dinov2": "image",
    "dinov2_gated": "image",
    "dinov2_registers": "image",
    "dinov3": "image",
    "bert": "text",
    "xlm_roberta": "text",
}
FAMILIES = ("open_clip_eva02", "open_clip_resnet", "open_clip_convnext")


def given(inputs):
    """Images (or packed patches) and token ids, as the model takes them."""
    images = {key: inputs[key] for key in ("patches", "grid")} if "patches" in inputs else inputs["image"]
    return images, inputs["token_ids"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_image_towers(name, tmp_path):
    """Their gradients, and more families, are in the parity suite."""
    inputs, outputs = unpack(name, tmp_path)
    _, model, params = read(tmp_path)
    out = jax.jit(model.apply)({"params": params}, *given(inputs))
    close(out.image, outputs["image"])
    close(out.text, outputs["text"])
    close(out.scale * out.image @ out.text.T, outputs["logits"])


@pytest.mark.parametrize("name", PAIRS)
def test_two_towers(name, tmp_path):
    inputs, outputs = unpack(name, tmp_path)
    released, model, params = read(tmp_path)
    loss = lambda params, *inputs: loss_and_embeddings(model, params, *inputs, name in SIGMOID)
    grads, (out, logits) = jax.jit(jax.grad(loss, has_aux=True))(params, *given(inputs))
    close(out.image, outputs["image"])
    close(out.text, outputs["text"])
    close(logits, outputs["logits"])
    for key in outputs.keys() & {"image_tokens", "text_tokens"}:
        want = outputs[key]
        close(np.where(want.any(-1, keepdims=True), getattr(out, key), 0), want)  # what is masked there is 0
    expected = open_tensors(tmp_path / "gradients.safetensors").tensors
    assert max(np.abs(tensor.read()).max() for tensor in expected.values()) > 0.1
    ours = by_their_names(released, grads)
    assert ours.keys() <= expected.keys()
    for tensor, want in expected.items():
        close(ours.get(tensor, 0), want.read())  # that of a tensor without a parameter of ours is 0


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_t5(name, tmp_path):
    """Tied logits and an MLP that is not gated (T5), and the other way round (T5 v1.1)."""
    inputs, outputs = unpack(name, tmp_path)
    released, model, params = read(tmp_path)
    input_ids, targets = inputs["input"], inputs["target"]

    def loss_fn(params):
        context, seen = model.apply({"params": params}, input_ids, method="encode")
        logits = model.apply({"params": params}, input_ids, targets)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        loss = -jnp.sum(jnp.where(targets != 0, log_p, 0)) / jnp.sum(targets != 0)
        return loss, (jnp.where(seen[..., None], context, 0), logits)

    (loss, (context, logits)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    close(loss, outputs["loss"])
    close(context, outputs["encoder"])
    close(logits, outputs["logits"])
    expected, ours = open_tensors(tmp_path / "gradients.safetensors").tensors, by_their_names(released, grads)
    assert ours.keys() == expected.keys()
    for tensor, want in expected.items():
        close(ours[tensor], want.read())
    if name == "t5":
        got = sample(model, params, input_ids, length=8, greedy=True, special=Special(2, 1, 0)).token_ids
        np.testing.assert_array_equal(got, outputs["greedy"])
    else:
        endless = Special(start=2, end=-1, pad=0)
        got = beam_search(model, params, input_ids, length=8, beams=3, length_penalty=0.0, special=endless).token_ids
        np.testing.assert_array_equal(got, outputs["beams"])


@pytest.mark.parametrize("name", TOWERS)
def test_one_tower(name, tmp_path):
    inputs, outputs = unpack(name, tmp_path)
    _, model, params = read(tmp_path)
    side = TOWERS[name]
    assert params.keys() == {side}
    tower = getattr(model, side)
    (given,) = inputs.values()
    encoded = jax.jit(tower.apply)({"params": params[side]}, given)
    close(encoded.pooled, outputs["pooled"])
    if f"{side}_tokens" in outputs:
        want = outputs[f"{side}_tokens"]
        close(np.where(want.any(-1, keepdims=True), encoded.tokens, 0), want)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_sentence_transformers_say_how_to_pool(pool, tmp_path):
    inputs, outputs = unpack("bert", tmp_path)
    modules = [{"path": path, "type": f"sentence_transformers.models.{path}"} for path in ("Transformer", "Pooling")]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "Pooling").mkdir()
    modes = {f"pooling_mode_{mode}_tokens": mode == pool for mode in ("mean", "max")}
    (tmp_path / "Pooling" / "config.json").write_text(json.dumps(modes))
    _, model, params = read(tmp_path)
    tokens, seen = outputs["text_tokens"], (inputs["token_ids"] != 0)[..., None]
    want = tokens.sum(1) / seen.sum(1) if pool == "mean" else np.where(seen, tokens, -np.inf).max(1)
    close(jax.jit(model.text.apply)({"params": params["text"]}, inputs["token_ids"]).pooled, want)


def test_openai_names_in_a_bare_file(tmp_path):
    inputs, outputs = unpack("openai", tmp_path)
    _, model, params = read(tmp_path / "bare.safetensors", "quick_gelu")
    _, (out, logits) = jax.jit(loss_and_embeddings, static_argnums=(0, 4))(model, params, *given(inputs), False)
    close(out.image, outputs["image"])
    close(out.text, outputs["text"])
    close(logits, outputs["logits"])


def test_coca(tmp_path):
    """Embeddings, and the logits of the tokens after the first; the pooler's and the cls token's quirks included."""
    inputs, outputs = unpack("coca", tmp_path)
    _, model, params = read(tmp_path)
    images, token_ids = given(inputs)

    @jax.jit
    def forward(params):
        out = model.apply({"params": params}, images, token_ids)
        hidden = model.apply({"params": params}, out.image_tokens, out.text_tokens[:, :-1], method="describe")
        return out, model.apply({"params": params}, hidden, method="logits")

    out, logits = forward(params)
    close(out.image, outputs["image"])
    close(out.text, outputs["text"])
    close(logits, outputs["logits"])
