"""Class-aware visual prompts (DPT): the likeliest classes of a picture ask its tokens, in the last blocks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.block import Block
from vlm_jax.models.insertion import inserted, new_leaves, new_parameter, removed
from vlm_jax.models.insertions.after_towers import ZEROS
from vlm_jax.models.transformer import Encoder
from vlm_jax.models.two_tower import unit
from vlm_jax.params.table import named_leaves

ONES = nn.initializers.ones


@method(family="insertions", differs="prompts of the last blocks come from the likeliest classes and the picture")
class ClassAware(NamedTuple):
    """Fills the first K prompts of the image tower's last J blocks (DPT, Xing et al. 2022, arXiv:2208.08340).

        q = W t + b                                        t: embeddings of the K likeliest classes
        u = softmax((q A) (x B)' / sqrt(h)) x V            x: the block's tokens without prompts, and m learned ones
        prompts = norm(u + q)

    The K classes are those of the largest cosines with the model's picture before adaptation; no gradient flows through
    x into the picture's own tokens. E D + D + 2 D h + D^2 + m D + 2 D parameters for each of J blocks. Needs prompts
    in the tower: `Prompt("image", K, L - J)`.

    Attributes:
      classes: K.
      blocks: J, fewer than the tower has.
      width: h.
      tokens: m.
    """

    classes: int = 5
    blocks: int = 1
    width: int = 32
    tokens: int = 10
    where, by_pairs = "", True

    def takes(self, module, method):
        return not module.path and method == "__call__"

    def __call__(self, call, module, *args, **kwargs):
        """Creates the parameters, for `pair_logits`."""
        found, tower = call(*args, **kwargs), module.image
        if not isinstance(tower, Encoder) or not 0 < self.blocks < tower.depth:
            raise UserError(f"{self}: `blocks` is 1 or more, fewer than the image tower's, of a transformer")
        width = (found.image if found.image is not None else found.text).shape[-1]
        dim, normal = tower.width, nn.initializers.normal(0.02)
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
        for name, init, shape in (
            ("meta", uniform, (width, dim)), ("meta_bias", ZEROS, (dim,)), ("query", uniform, (dim, self.width)),
            ("key", uniform, (dim, self.width)), ("value", uniform, (dim, dim)), ("tokens", normal, (self.tokens, dim)),
            ("norm", ONES, (dim,)), ("norm_bias", ZEROS, (dim,)),
        ):  # fmt: skip
            new_parameter(module, f"class_{name}", init, (self.blocks, *shape))
        return found

    def pair_logits(self, model, params, images, token_ids):
        return self.seen(model, params, images, token_ids)[0]

    def seen(self, model, params, images, token_ids) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns logits [B, C], u of each block [B, J, K, D], and the numbers of the K classes, int [B, K]."""
        found, new = model.apply({"params": params}, None, token_ids), new_leaves(params)
        plain = {name: leaf for name, leaf in named_leaves(params).items() if name not in new}
        before = removed(model).apply({"params": unflatten_dict(plain, sep="/")}, images, None).image
        text, scale = found.text, found.scale
        count = min(self.classes, len(text))
        chosen = jax.lax.top_k(jax.lax.stop_gradient(before @ text.T), count)[1]
        parameters = {n.removeprefix("inserted_class_"): x for n, x in new.items() if n.startswith("inserted_class_")}
        filled = inserted(model, _Filled(self, text[chosen], parameters))

        def run(model, images):
            encoded = model.image(images)
            return unit(encoded.pooled), encoded.aux[_AUX]

        image, u = filled.apply({"params": params}, images, method=run)
        return scale * jnp.matmul(image, text.T, precision="highest"), u[:, -self.blocks :], chosen


_AUX = "class_prompts"


class _Filled(NamedTuple):
    """`ClassAware` with its classes' embeddings [B, K, E] and its parameters, for one call of the tower."""

    insertion: ClassAware
    text: Any
    parameters: Any
    where = "image"

    def takes(self, module, method):
        return isinstance(module, Block) and method == "__call__"

    def path(self, module):
        return module.path[:-1]

    def __call__(self, call, module, x, around, layer, *args):
        count, total = self.text.shape[1], self.insertion.classes
        place = jnp.maximum(layer - (module.depth - self.insertion.blocks), 0)
        own = {name: leaf[place].astype(x.dtype) for name, leaf in self.parameters.items()}
        query = self.text.astype(x.dtype) @ own["meta"] + own["meta_bias"]
        more = jnp.broadcast_to(own["tokens"], (len(x), *own["tokens"].shape))
        tokens = jnp.concatenate([jax.lax.stop_gradient(x[:, total:]), more], axis=1)
        scores = jnp.einsum("bkh,bnh->bkn", query @ own["query"], tokens @ own["key"]) / self.insertion.width**0.5
        u = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype) @ tokens @ own["value"]
        prompts = _norm(u + query) * own["norm"] + own["norm_bias"]
        prompts = jnp.where(layer >= module.depth - self.insertion.blocks, prompts, x[:, :count])
        x, result = call(x.at[:, :count].set(prompts), around, layer, *args)
        return x, result._replace(statistics={**result.statistics, _AUX: u})


def _norm(x):
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)
