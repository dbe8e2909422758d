"""Tiny models: one of each kind, built, initialised and compiled once for all tests of a process.

Fields: width 32, depth 2, pictures of 16 x 16 (four patches), 14 tokens, texts of up to 8.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config, models
from vlm_jax.data import tokenizers
from vlm_jax.params.table import map_with_name
from vlm_jax.pretrained import Pretrained

VOCAB, LENGTH, OUT = 14, 8, 16
BOS, EOS = 11, 12
SIZES = dict(width=32, depth=2, heads=2, mlp_dim=64)
T5_SIZES = dict(width=32, depth=2, heads=4, head_dim=12, mlp_dim=48, relative_buckets=8, relative_distance=12)

SPACES = {
    "codes": dict(name="codes", size=24, width=8),
    "boxes": dict(name="boxes", concepts=8, width=4),
}  # those that are not of their default sizes

IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
TOKENS = np.array([[BOS, 3, 4, EOS, 0, 0, 0, 0], [BOS, 5, 6, 7, 8, EOS, 0, 0], [BOS, 9, EOS, 0, 0, 0, 0, 0]])


def section(kind: str, scan: bool = False) -> dict:
    """config.model of a kind, a name of the family "models"."""
    sizes, t5 = dict(SIZES, scan=scan), dict(T5_SIZES, scan=scan)
    image, texts = dict(sizes, patch=8), dict(vocab_size=VOCAB, length=LENGTH)
    match kind:
        case "two_tower":
            return dict(name=kind, image=dict(image, out_dim=OUT), text=dict(sizes, **texts, out_dim=OUT))
        case "two_tower_captioner":
            image, text = dict(image, pool="map", image_size=16, any_size=True), dict(sizes, **texts)
            return dict(name=kind, image=image, text=text, decoder=dict(text, mask_token=True), bias_init=-10.0)
        case "captioner":
            return dict(name=kind, image=image, decoder=dict(sizes, **texts, mask_token=True))
        case "prefix_captioner":
            return dict(name=kind, image=dict(image, width=48), decoder=dict(sizes, **texts, mask_token=True), keep=0.5)
        case "next_patch_captioner":
            return dict(name=kind, image=dict(image, width=48), decoder=dict(sizes, **texts))
        case "one_tower_captioner":
            return dict(name=kind, image=dict(image, attn_gate=True), decoder=dict(texts, mask_token=True))
        case "coca":
            text = dict(sizes, **texts, start_id=BOS)
            pool = dict(width=32, queries=5, heads=2)
            return dict(
                name=kind, image=image, pool=pool, text=text, decoder=dict(text, logits_bias=False), out_dim=OUT
            )  # fmt: skip
        case "encoder_decoder":
            return dict(name=kind, encoder=t5, decoder=dict(t5, **texts))
        case "prefix_lm":
            return dict(name=kind, decoder=dict(t5, **texts))
        case "many_tower":
            image, text = dict(image, image_size=16, out_dim=OUT), dict(sizes, **texts, out_dim=OUT)
            return dict(name=kind, towers=dict(image=image, text=text, audio=image))


class Tiny(NamedTuple):
    """A model, its parameters, and two inputs: pictures (or texts) and texts."""

    model: nn.Module
    params: Any
    inputs: tuple[np.ndarray, ...]

    def apply(self, *inputs, method=None, **options):
        """Runs the model's `method`, compiled once for inputs of one shape; its own inputs by default."""
        return run(self.model, self.params, *(inputs or self.inputs), method=method, **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(model, params, *inputs, method=None, **options):
    """model.apply, one compiled program for equal models and inputs of one shape."""
    return model.apply({"params": params}, *inputs, method=method, **options)


@functools.cache
def tiny(kind: str, scan: bool = False) -> Tiny:
    """The model of `section`; its logits are far from uniform."""
    inputs, model = inputs_of(kind), models.build(section(kind, scan))
    params = initial(model, *inputs)
    return Tiny(model, with_opinions(params, 0.3) if "head" in params else params, inputs)


@functools.cache
def shapes_of(kind: str, scan: bool = False) -> Any:
    """The shapes of its parameters."""
    return jax.eval_shape(models.build(section(kind, scan)).init, jax.random.key(0), *inputs_of(kind))["params"]


def inputs_of(kind: str) -> tuple[np.ndarray, ...]:
    """The inputs of a kind of model."""
    if kind == "many_tower":
        return IMAGES, TOKENS, IMAGES[::-1]
    return (TOKENS if kind in ("encoder_decoder", "prefix_lm") else IMAGES), TOKENS


def with_opinions(params: Any, scale: float = 0.5) -> Any:
    """The parameters with a drawn `head/kernel`, which prefers some tokens, so that texts end."""
    kernel = scale * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    return params | {"head": params["head"] | {"kernel": kernel}}


def initial(model: nn.Module, *inputs: Any) -> Any:
    """Parameters as large as `model.init` makes them, none of them zero, drawn by numpy: compiling takes seconds."""
    rng = np.random.default_rng(0)

    def draw(name, leaf):
        noise = rng.standard_normal(leaf.shape).astype(leaf.dtype)
        match name.split("/")[-1]:
            case "kernel":
                return noise / np.float32(leaf.shape[-2] ** 0.5)
            case "scale":
                return 1 + noise / 10
            case "logit_scale":
                return np.full_like(noise, np.log(1 / 0.07))
        return noise / 10

    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(jnp.asarray, map_with_name(draw, shapes))


def drawn(shapes: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """A tree of arrays drawn by numpy."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)


def untrained(settings: Any, opinionated: bool = False, seed: int = 0) -> Pretrained:
    """The model of a config as a run starts with it; opinionated, its captions are more than one token's."""
    settings = config.plain(settings)
    model = models.build(settings["model"])
    params = _begun(model, settings["preprocess"] is None, seed)
    if opinionated:
        params = with_opinions(params)
    tokenizer = tokenizers.build(settings["tokenizer"])
    return Pretrained(model, params, tokenizer, settings["preprocess"], settings["tokenize"], settings)


@functools.cache
def _begun(model, reads_texts, seed):
    """Parameters by model.init, drawn once for equal models."""
    length = (model.decoder if hasattr(model, "decoder") else model.text).length
    texts = jnp.zeros((1, length), jnp.int32)
    given = texts if reads_texts else jnp.zeros((1, 32, 32, 3))
    return jax.jit(model.init)(jax.random.key(seed), given, texts)["params"]
