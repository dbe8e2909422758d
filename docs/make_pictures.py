"""Draws the README's pictures, of the packaged model and a style that it has not seen: python docs/make_pictures.py"""

from pathlib import Path

import vlm_jax
from vlm_jax.evaluators.tasks.zeroshot import zeroshot
from vlm_jax.report import figures

HERE = Path(__file__).parent
found = zeroshot(uri="tfds:emoji", split="unseen_style", label="concept", classes="emoji:seen", gallery=12)
found = found(vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")).artifacts
figures.gallery(**found["gallery"]).save(HERE / "gallery.png")
figures.similarity(**found["similarity"]).save(HERE / "similarity.png")
space = {name: values[::3] for name, values in found["space"].items()}  # few enough to be told apart
figures.embedding_space(**space).save(HERE / "embedding_space.png")
