"""Visual prompts for metric learning: a class's own prompts make the proxy that its pictures come near (VPT-SP)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt.prompts.placing import spread
from vlm_jax.adapt.recipe import Extended, Inserted, tree
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives import Term
from vlm_jax.params.table import named_leaves


@method(
    family="prompts",
    system="VPT-SemProxy",
    paper="arXiv:2402.02340",
    where="authors' code",
    differs="prompts of the image tower for retrieval; each class's proxy comes from its pictures under own prompts",
    count="length * D_v * L_v",
)
def semantic_proxies(
    model: nn.Module,
    *,
    length: int = 5,
    std: float = 0.02,
    sharpness: float = 32.0,
    margin: float = 0.1,
    bias_share: float = 0.5,
    keep: float = 0.8,
) -> Extended:
    """Semantic proxies from visual prompts (Ren et al. 2024), without names: `proxy_anchor` in the place of classes.

    The proxy of class c is unit(bias_share b_c + (1 - bias_share) m_c). m_c follows, by `keep`, the mean embedding of
    the batch's pictures of c under c's own prompts. Only the prompts of all classes together stay after the training.
    The paper's m_c also has a form with the gates of a GRU.

    Args:
      model: whose image tower is a transformer.
      length: of the prompts, in every block.
      std: of b_c and of the classes' prompts at init.
      sharpness, margin: of the loss.
      bias_share: 1 gives plain proxies, which begin at random.
      keep: of m_c; 0 takes the batch alone.
    """

    def terms(known):
        shape = (model.image.depth, length, model.image.width)
        table = PerClass(len(known.names), shape, std)

        def seen(outputs, ctx):
            label, place = outputs["label"], outputs.model
            leaves = named_leaves(place.effective(outputs.params))
            prompts = outputs.part("prompts", table)[label]

            def one(prompts, image):
                own = tree(leaves | spread("image", prompts, leaves))
                return place.model.apply({"params": own}, image[None], None).image[0]

            semantic = jax.vmap(one)(prompts, outputs["image"])
            return {"image": outputs["image_embedding"], "semantic": semantic, "label": label}

        def loss(outputs, features, rows, ctx):
            biases = outputs.part("bias", PerClass(len(known.names), features["image"].shape[1:], std))
            means = follow(ctx.state, features, keep)
            proxies = unit(bias_share * biases + (1 - bias_share) * means)
            return proxy_anchor(features["image"], proxies, features["label"], sharpness, margin), {}

        begin = lambda features: jnp.zeros((len(known.names), features["image"].shape[1]))
        return (Term("proxies", seen, loss, init=begin, update=lambda state, f, ctx: follow(state, f, keep)),)

    return Extended(Inserted((Prompt(length=length, depth=None),)), terms, names_classes=False)


def follow(means: jax.Array, features: dict[str, jax.Array], keep: float) -> jax.Array:
    """Returns m_c: unit(keep m_c + (1 - keep) x the mean of the batch's embeddings of c); unchanged without one.

    Args:
      means: m, [C, E].
      features: `semantic` [B, E] and `label` int [B], -1 for padding.
      keep: in [0, 1].
    """
    own = jax.nn.one_hot(features["label"], len(means), dtype=means.dtype)
    count = own.sum(0)[:, None]
    batch = jnp.matmul(own.T, features["semantic"], precision="highest") / jnp.maximum(count, 1)
    return jnp.where(count > 0, unit(keep * means + (1 - keep) * batch), means)


def proxy_anchor(x: jax.Array, proxies: jax.Array, labels: jax.Array, sharpness: float, margin: float) -> jax.Array:
    """The proxy-anchor loss (Kim et al. 2020, arXiv:2003.13911) of unit-norm x [B, E] and proxies [C, E].

    The mean over classes in the batch of log(1 + sum over its pictures of exp(-a (s - margin))), plus the mean over all
    classes of log(1 + sum over other pictures of exp(a (s + margin))), with cosines s and a the sharpness.
    """
    cosines = jnp.matmul(x, proxies.T, precision="highest")
    own, real = jax.nn.one_hot(labels, len(proxies), dtype=bool), (labels >= 0)[:, None]
    both = zip((-1, 1), (own, ~own & real), strict=True)
    near, far = (
        jax.nn.logsumexp(jnp.pad(sign * sharpness * (cosines + sign * margin), ((0, 1), (0, 0))), axis=0,
                         where=jnp.pad(rows, ((0, 1), (0, 0)), constant_values=True))
        for sign, rows in both
    )  # fmt: skip
    return jnp.sum(near) / jnp.maximum(jnp.sum(own.any(0)), 1) + jnp.mean(far)


class PerClass(nn.Module):
    """An array of a given shape for each class."""

    classes: int
    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self):
        return self.param("rows", nn.initializers.normal(self.std), (self.classes, *self.shape))
