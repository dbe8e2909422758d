"""Draws the pictures of README.md and docs/, of the packaged model and data sets: python docs/make_pictures.py"""

from pathlib import Path

import numpy as np
from PIL import Image

import vlm_jax
from vlm_jax.data.scenes.scene import SPLITS
from vlm_jax.data.sources import open_source
from vlm_jax.evaluators.tasks.zeroshot import zeroshot
from vlm_jax.report import figures

HERE = Path(__file__).parent
found = zeroshot(uri="tfds:emoji", split="unseen_style", label="concept", classes="emoji:seen", gallery=12)
found = found(vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny")).artifacts
figures.gallery(**found["gallery"]).save(HERE / "gallery.png")
figures.similarity(**found["similarity"]).save(HERE / "similarity.png")
space = {name: values[::3] for name, values in found["space"].items()}  # few enough to be told apart
figures.embedding_space(**space).save(HERE / "embedding_space.png")

framed = lambda image: np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=255)
rows = []
for split in SPLITS:
    scenes = open_source("scenes:?size=96", split)
    rows.append(np.concatenate([framed(scenes[i]["image"]) for i in range(8)], 1))
Image.fromarray(np.concatenate(rows)).save(HERE / "scenes.png")
