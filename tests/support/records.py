"""Records for tests of data: pictures as arrays and as encoded bytes, and op strings run on them."""

import io

import numpy as np
from PIL import Image

from vlm_jax.data import ops, rows


def picture(height=48, width=64, seed=0):
    """A smooth random uint8 picture [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(array, format="PNG", **options):
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def red(value):
    """The PNG of a 4 x 4 picture of one red, which `red_of` gives back."""
    return encode(np.full((4, 4, 3), (value, 0, 0), np.uint8))


def red_of(data):
    """The red of an encoded picture's first pixel."""
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


def run(string, record, seed=0, tokenizer=None):
    """The example that an op string makes of a record."""
    return ops.parse(string, tokenizer)(record, np.random.default_rng(seed))


def collate(records, texts=False):
    """The batch of some records."""
    return rows.collate(records, rows.fields_of(records, texts))
