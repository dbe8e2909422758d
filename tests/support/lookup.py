"""The smallest model with two embeddings: rows of tables, so that a loss can be compared with its formula."""

from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlm_jax import objectives
from vlm_jax.models import Embeddings
from vlm_jax.models.two_tower import EMBEDDINGS


class Lookup(nn.Module):
    """Images int [B] and texts int [B] or [B, 1] are rows of the tables `image` and `text`: their gradients are those
    of the embeddings."""

    size: int = 48
    width: int = 16
    outputs: ClassVar = EMBEDDINGS

    @nn.compact
    def __call__(self, images, texts, *, train=False):
        table = lambda name: self.param(name, nn.initializers.zeros, (self.size, self.width))
        row = lambda name, ids: None if ids is None else table(name)[ids.reshape(len(ids))]
        scale = jnp.exp(self.param("logit_scale", nn.initializers.zeros, ()))
        bias = self.param("logit_bias", nn.initializers.zeros, ())
        return Embeddings(row("image", images), row("text", texts), None, None, scale, bias)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tables(seed=0, size=48, width=16, dtype=np.float64):
    """Parameters; text i resembles image i; the scale is 5 and the bias -2."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(size, width))
    text = image + rng.normal(size=(size, width))
    scalars = {"logit_scale": dtype(np.log(5)), "logit_bias": dtype(-2)}
    return {"image": unit(image).astype(dtype), "text": unit(text).astype(dtype)} | scalars


def program(section, params, *, model=None, rng=None):
    """run(params, batch, state=None) -> (loss, metrics, gradients, features) of a section, jitted; its name is
    `contrastive` if it has none."""
    model = model or Lookup(*params["image"].shape)
    objective = objectives.build(section if "terms" in section else {"name": "contrastive", **section}, model)
    run = partial(objectives.value_and_grad, objective, model, rng=rng)
    return jax.jit(lambda params, batch, state=None: run(params, batch, state=state))


def differentiate(section, params, batch, *, state=None, model=None, rng=None):
    """(loss, metrics, gradients, features) of a section, see `program`."""
    return program(section, params, model=model, rng=rng)(params, batch, state)


def check(got, by_hand, params, batch):
    """Compares a loss with its formula, by_hand(params, batch), and the gradient with the formula's differences."""
    loss, _, grads, _ = got
    np.testing.assert_allclose(loss, by_hand(params, batch), rtol=1e-10)
    rng, step = np.random.default_rng(5), 1e-6
    move = jax.tree.map(lambda p: rng.normal(size=np.shape(p)), params)
    moved = [by_hand(jax.tree.map(lambda p, m, s=s: p + s * m, params, move), batch) for s in (step, -step)]
    slope = sum(np.vdot(g, m) for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(move), strict=True))
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-8)


# The formulas, as loops over rows: images have candidates in the columns, texts likewise.


def cross_entropy(logits, weights, smoothing=0.0):
    """Mean over rows; candidates of -inf do not count."""
    total = 0.0
    for x, w in zip(logits, weights, strict=True):
        real = [j for j in range(len(x)) if np.isfinite(x[j])]
        log_sum = np.log(sum(np.exp(x[j]) for j in real))
        for j in real:
            target = (1 - smoothing) * w[j] / sum(w) + smoothing / len(real)
            total += target * (log_sum - x[j])
    return total / len(logits)


def sigmoid(of_images, of_texts, w_images, w_texts):
    """Pairs of the batch stand in both: their losses are averaged."""
    size, total = len(of_images), 0.0
    of_pair = lambda x, w: w * np.logaddexp(0, -x) + (1 - w) * np.logaddexp(0, x)
    for x, weights in ((of_images, w_images), (of_texts, w_texts)):
        for i in range(size):
            for j in range(x.shape[1]):
                if np.isfinite(x[i, j]):
                    total += of_pair(x[i, j], weights[i, j]) * (0.5 if j < size else 1.0)
    return total / size


def softmax(of_images, of_texts, w_images, w_texts, smoothing=0.0):
    return 0.5 * (cross_entropy(of_images, w_images, smoothing) + cross_entropy(of_texts, w_texts, smoothing))


LOSSES = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "smoothed": partial(softmax, smoothing=0.1),
}
PENALTIES = {"softmax": "softmax", "sigmoid": "sigmoid", "smoothed": {"name": "softmax", "label_smoothing": 0.1}}


def logits_of(params, images, texts, candidates_of_images=None, candidates_of_texts=None):
    """(of images [B, M], of texts [B, M']) from embeddings."""
    scale, bias = np.exp(params["logit_scale"]), params["logit_bias"]
    more = [texts if candidates_of_images is None else candidates_of_images,
            images if candidates_of_texts is None else candidates_of_texts]  # fmt: skip
    return [scale * x @ y.T + bias for x, y in zip((images, texts), more, strict=True)]
