"""Fifty scenes, and two models of their pictures and texts: one that knows what is true, one that guesses."""

import functools
import zlib
from collections import defaultdict
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest

from tests.support.colours import unit
from vlm_jax import evaluators
from vlm_jax.data.scenes.source import mask_of
from vlm_jax.data.sources import open_source

URI = "scenes:?examples=50"


@functools.cache
def records(split="train"):
    source = open_source(URI, split)
    return tuple(source[i] for i in range(len(source)))


def run(task, model, /, **section):
    """The result of an evaluator on the fifty scenes."""
    return evaluators.build({"type": task, "uri": URI, "split": "train", "batch_size": 16} | section)(model)


def share(values):
    """Their mean, up to rounding."""
    return pytest.approx(sum(values) / len(values), abs=1e-12)


def seen(image):
    """A picture as the models' `preprocess` gives it."""
    return np.multiply(image, np.float32(1 / 255), dtype=np.float32)


def known(image):
    """What tells pictures apart that a model has seen."""
    return zlib.crc32(image.tobytes())


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


class Says(Writer):
    """A captioner that writes what it was given for a picture."""

    def __init__(self, pairs):
        self.said = {known(seen(image)): text for image, text in pairs}

    def caption_batch(self, images, method):
        return [self.said[known(image)] for image in images]


class Continues(Writer):
    """A captioner that writes on after a prefix.

    Args:
      texts: (picture, prefix, text); other prefixes are followed by nothing.
    """

    def __init__(self, texts):
        self.said = {(known(seen(image)), prefix): text for image, prefix, text in texts}

    def caption_batch(self, images, method, prefix, echo, **options):
        assert (method, echo, options) == ("greedy", False, {"length": 30})
        return [self.said.get((known(image), own), "") for image, own in zip(images, prefix, strict=True)]


class Truth(Guess):
    """Two towers that know which texts are true of which pictures: the product of embeddings is 1, else 0.

    Args:
      pairs: (picture, texts that are true of it); equal pictures share their texts.
    """

    def __init__(self, pairs):
        self.number, self.true = {}, defaultdict(set)
        for image, texts in pairs:
            i = self.number.setdefault(known(seen(image)), len(self.number))
            for text in texts:
                self.true[text].add(i)

    def embed_image_batch(self, images):
        return np.eye(len(self.number), dtype=np.float32)[[self.number[known(image)] for image in images]]

    def embed_texts(self, texts):
        return np.array([[i in self.true.get(text, ()) for i in range(len(self.number))] for text in texts], np.float32)


class Looks(Guess):
    """Guesses with a vector for each patch, equal for equal patches."""

    is_captioner = False

    def __init__(self, patch):
        self.model = SimpleNamespace(image=SimpleNamespace(patch=patch))

    def patch_embedding_batch(self, images):
        return np.stack([self.of_patches(image) for image in images])

    def of_patches(self, image):
        """float32 [h, w, 8]."""
        p, (h, w) = self.model.image.patch, (side // self.model.image.patch for side in image.shape[:2])
        tile = lambda y, x: image[y * p : (y + 1) * p, x * p : (x + 1) * p]
        return self.embed_image_batch([tile(y, x) for y in range(h) for x in range(w)]).reshape(h, w, -1)


class Sees(Looks, Truth):
    """Two towers that see the objects of their pictures, pixel by pixel: 1 where a text is true, else 0."""

    def __init__(self, rows):
        Looks.__init__(self, 1)
        self.maps = {}
        self.texts = {
            text: i for i, text in enumerate(dict.fromkeys(t for row in rows for t in row["regions"]["text"]))
        }
        for row in rows:
            own = np.zeros((*row["image"].shape[:2], len(self.texts)), np.float32)
            for text, i in zip(row["regions"]["text"], row["regions"]["object"], strict=True):
                own[..., self.texts[text]] = mask_of(row["objects"]["mask"][i], *row["image"].shape[:2])
            self.maps[known(seen(row["image"]))] = own

    def of_patches(self, image):
        return self.maps[known(image)]

    def embed_texts(self, texts):
        return np.eye(len(self.texts), dtype=np.float32)[[self.texts[text] for text in texts]]


class Labels(Guess):
    """Embeds a picture as its label, one of 0 to n - 1."""

    def __init__(self, pairs):
        self.label = {known(seen(image)): label for image, label in pairs}

    def embed_image_batch(self, images):
        return np.eye(1 + max(self.label.values()), dtype=np.float32)[[self.label[known(image)] for image in images]]
