"""A model with all it needs: embedding, writing, similarity, attention maps."""

from vlm_jax.pretrained.embedding import class_embeddings, features, prompts_of, unit
from vlm_jax.pretrained.pretrained import Pretrained

__all__ = ["Pretrained", "class_embeddings", "features", "prompts_of", "unit"]
