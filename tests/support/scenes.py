"""Fifty scenes, and two models of their pictures and texts: one that knows what is true, one that guesses."""

import functools
import zlib
from collections import defaultdict
from types import MappingProxyType

import numpy as np

from tests.support.colours import unit
from vlm_jax.data.sources import open_source

URI = "scenes:?examples=50"


@functools.cache
def records(split="train"):
    source = open_source(URI, split)
    return tuple(source[i] for i in range(len(source)))


def seen(image):
    """A picture as the models' `preprocess` gives it."""
    return np.multiply(image, np.float32(1 / 255), dtype=np.float32)


class Guess:
    """Two towers with arbitrary embeddings, equal for equal inputs, float32 [n, 8]."""

    preprocess = "to_float"
    tokenizer = None
    model = None
    params = MappingProxyType({"logit_scale": 0.0})

    def embed_image_batch(self, images):
        return self._drawn(image.tobytes() for image in images)

    def embed_texts(self, texts):
        return self._drawn(text.encode() for text in texts)

    def _drawn(self, contents):
        draws = [np.random.default_rng(zlib.crc32(content)).standard_normal(8) for content in contents]
        return unit(np.stack(draws)).astype(np.float32)

    def fits(self, image, text):
        """The cosine of a picture (uint8) and a text, float64, by a loop."""
        a, b = self.embed_image_batch([seen(image)])[0], self.embed_texts([text])[0]
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


class Writer(Guess):
    """A captioner whose log-likelihoods are the cosines of `Guess`."""

    is_captioner = True

    def score_batch(self, images, texts):
        assert len(images) == len(texts)
        embedded = self.embed_image_batch(images).astype(np.float64)
        return np.sum(embedded * self.embed_texts(texts), axis=1), np.ones(len(texts), int)


class Truth(Guess):
    """Two towers that know which texts are true of which pictures: the product of embeddings is 1, else 0.

    Args:
      pairs: (picture, texts that are true of it); equal pictures share their texts.
    """

    def __init__(self, pairs):
        self.number, self.true = {}, defaultdict(set)
        for image, texts in pairs:
            i = self.number.setdefault(seen(image).tobytes(), len(self.number))
            for text in texts:
                self.true[text].add(i)

    def embed_image_batch(self, images):
        return np.eye(len(self.number), dtype=np.float32)[[self.number[image.tobytes()] for image in images]]

    def embed_texts(self, texts):
        return np.array([[i in self.true.get(text, ()) for i in range(len(self.number))] for text in texts], np.float32)
