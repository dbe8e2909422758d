"""Flax modules: one transformer under an image tower, a text tower, and the two together."""

from vlm_jax.models.build import build, count
from vlm_jax.models.pooling import Encoded
from vlm_jax.models.positions import resample_posemb
from vlm_jax.models.text import TextTransformer
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import Embeddings, TwoTower
from vlm_jax.models.vit import ViT

__all__ = [
    "Embeddings",
    "Encoded",
    "Encoder",
    "TextTransformer",
    "TwoTower",
    "ViT",
    "build",
    "count",
    "resample_posemb",
]
