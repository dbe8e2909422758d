"""Flax modules: one transformer for image towers, text towers and decoders, and the models built from these.

A model class states what it can do, `can: ClassVar = frozenset({...})`: "embed" pictures and texts in one space,
"describe" pictures, "write" texts about texts.
"""

from vlm_jax.models.build import build, count
from vlm_jax.models.captioner import Captioner
from vlm_jax.models.coca import CoCa
from vlm_jax.models.decoder import Decoder
from vlm_jax.models.encoder_decoder import EncoderDecoder
from vlm_jax.models.many_tower import ManyTower
from vlm_jax.models.pooling import Encoded
from vlm_jax.models.positions import resample_posemb
from vlm_jax.models.prefix_lm import PrefixLM
from vlm_jax.models.text import TextTransformer
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import Embeddings, TwoTower
from vlm_jax.models.two_tower_captioner import TwoTowerCaptioner
from vlm_jax.models.vit import ViT

__all__ = [
    "Captioner",
    "CoCa",
    "Decoder",
    "Embeddings",
    "Encoded",
    "Encoder",
    "EncoderDecoder",
    "ManyTower",
    "PrefixLM",
    "TextTransformer",
    "TwoTower",
    "TwoTowerCaptioner",
    "ViT",
    "build",
    "count",
    "resample_posemb",
]
