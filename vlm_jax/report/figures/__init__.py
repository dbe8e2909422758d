"""Figures of a model's results, in one style, readable in grey.

    from vlm_jax.report import figures
    figures.similarity(pictures, texts, clip.logits(pictures, texts))  # the last line of a notebook's cell shows it
    figures.maps(attention_maps.seen(clip, pictures), attention_maps.attention(clip, pictures)).save("attention.png")

Every function takes numbers and pictures, never a model, and returns a `Picture`: a matplotlib figure that shows itself
in a notebook, without pyplot. A picture is a PIL image, a path, encoded bytes or a uint8 array.
"""

from vlm_jax.report.figures.calibration import calibration
from vlm_jax.report.figures.classes import confusion_map, confusion_matrix, confusions, gallery
from vlm_jax.report.figures.curves import compared, curves
from vlm_jax.report.figures.intervals import intervals
from vlm_jax.report.figures.memory import memory
from vlm_jax.report.figures.pairs import retrieval, similarity
from vlm_jax.report.figures.patches import maps, word_patch
from vlm_jax.report.figures.space import embedding_space
from vlm_jax.report.figures.style import Picture

__all__ = [
    "Picture",
    "calibration",
    "compared",
    "confusion_map",
    "confusion_matrix",
    "confusions",
    "curves",
    "embedding_space",
    "gallery",
    "intervals",
    "maps",
    "memory",
    "retrieval",
    "similarity",
    "word_patch",
]
