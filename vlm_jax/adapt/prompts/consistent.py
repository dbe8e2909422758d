"""Prompts of both towers whose embeddings stay near the base model's: PromptSRC, CoPrompt, RESTORE."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax.adapt import tables
from vlm_jax.adapt.prompts.guided import zero_shot_divergence
from vlm_jax.adapt.prompts.maple import Coupled
from vlm_jax.adapt.prompts.placing import Independent, Joined
from vlm_jax.adapt.recipe import Extended
from vlm_jax.catalogue import method
from vlm_jax.models.insertions.after_towers import OutputAdapter
from vlm_jax.objectives import Term
from vlm_jax.params.averages import gaussian


@method(
    family="prompts",
    system="PromptSRC",
    paper="arXiv:2307.06948",
    where="section 3.2",
    differs="prompts of both towers near the base model in features and logits, averaged over epochs by a Gaussian",
    count="length * min(depth, L_t, L_v) * (D_t + D_v)",
)
def promptsrc(
    model: nn.Module,
    *,
    length: int = 4,
    depth: int = 9,
    std: float = 0.02,
    image_weight: float = 10.0,
    text_weight: float = 25.0,
    logit_weight: float = 1.0,
    templates: str | None = "imagenet80",
    mean: float | None = 0.75,
    spread: float = 0.05,
) -> Extended:
    """PromptSRC (Khattak et al. 2023), with the weights of the authors' code.

    Adds image_weight x the mean of |x - x_base| over pictures and dimensions, text_weight x that of class embeddings,
    and logit_weight x KL(zero-shot || prompted) / C.

    Args:
      model: of two transformers.
      length, depth, std: of the prompts.
      image_weight, text_weight, logit_weight: 0 leaves a loss out.
      templates: of the base model's class embeddings, a list of prompts; None: those of the task.
      mean, spread: of the Gaussian that weighs epochs, as shares of the training; mean None: the last epoch.
    """
    texts = "ensembled" if templates else "zero_shot"
    distance = lambda x, base: jnp.mean(jnp.abs(x - base), axis=-1)
    of_pictures = lambda o, ctx: distance(o["image_embedding"], o.teacher("base")["image_embedding"])
    of_texts = lambda o, ctx: distance(o["text_embedding"], o[texts])
    divergence = zero_shot_divergence("logits", texts, logit_weight)

    def per_class(outputs, features, rows, ctx):
        loss, metrics = divergence.loss(outputs, features, rows, ctx)
        return loss / len(features["classes"]), metrics

    terms = (
        Term("pictures", of_pictures, mean_of_real, weight=image_weight),
        Term("texts", of_texts, lambda o, features, rows, ctx: (jnp.mean(features), {}), "classes", text_weight),
        Term("logits", divergence.features, per_class, weight=logit_weight),
    )
    return Extended(
        Independent(length, depth, std),
        tuple(term for term in terms if term.weight),
        tables={"ensembled": tables.ensembled(templates)} if templates else {},
        average=None if mean is None else gaussian(mean, spread),
    )


@method(
    family="prompts",
    system="CoPrompt",
    paper="arXiv:2306.01195",
    where="authors' code",
    differs="coupled prompts and adapters agree with the base model on a changed picture and another text",
    count="min(depth, L_t, L_v) * (length * D_t + D_t * D_v + D_v) + 4 * E * (E // 4)",
)
def coprompt(
    model: nn.Module,
    *,
    length: int = 2,
    depth: int = 9,
    std: float = 0.02,
    weight: float = 8.0,
    templates: str = "imagenet80",
    image_share: float = 0.1,
    text_share: float = 0.2,
) -> Extended:
    """CoPrompt (Roy and Etemad 2024): adds weight x (1 - cos of pictures + 1 - cos of classes) with the base model.

    The base model sees a random crop of the picture, perhaps mirrored, and at each step one prompt of `templates`; the
    paper's other texts are sentences that a language model wrote about the class.

    Args:
      model: of two transformers.
      length, depth, std: of the prompts, as in MaPLe.
      weight: 0 leaves the consistency out.
      templates: a list of prompts.
      image_share, text_share: of the adapters after the towers.
    """

    def pictures(outputs, ctx):
        changed = outputs["image"] if outputs.keys is None else jax.vmap(view)(outputs.keys, outputs["image"])
        base = outputs.on(image=changed).teacher("base")["image_embedding"]
        return jnp.sum(outputs["image_embedding"] * base, axis=-1)

    def loss(outputs, features, rows, ctx):
        described = rows["classes"]["described"]
        which = 0 if ctx.rng is None else jax.random.randint(ctx.rng, (), 0, described.shape[1])
        texts = jnp.sum(features["classes"] * described[:, which], axis=-1)
        of_pictures = jnp.mean(features["batch"], where=rows["batch"]["label"] >= 0)
        return 2 - of_pictures - jnp.mean(texts), {}

    features = {"batch": pictures, "classes": lambda o, ctx: o["text_embedding"]}
    adapters = OutputAdapter("image", share=image_share), OutputAdapter("text", share=text_share)
    return Extended(
        Joined(Coupled(length, depth, std), adapters),
        (Term("consistency", features, loss, weight=weight),) if weight else (),
        tables={"described": tables.described(templates)} if weight else {},
    )


def view(key: jax.Array, image: jax.Array, least: float = 0.5) -> jax.Array:
    """Returns a random crop of a picture [H, W, 3], sides of `least` to 1, resized; half of the crops are mirrored."""
    size, place, side = jax.random.split(key, 3)
    extent = jnp.asarray(image.shape[:2], jnp.float32)
    share = jax.random.uniform(size, (2,), minval=least)
    corner = jax.random.uniform(place, (2,)) * (1 - share) * extent
    cropped = jax.image.scale_and_translate(
        image, image.shape, (0, 1), 1 / share, -corner / share, "linear", antialias=False
    )
    return jnp.where(jax.random.bernoulli(side), cropped[:, ::-1], cropped)


@method(
    family="prompts",
    system="RESTORE",
    paper="arXiv:2403.06136",
    where="abstract",
    differs="prompts move the embeddings of both towers equally far; adapters follow both towers",
    count="length * min(depth, L_t, L_v) * (D_t + D_v) + 4 * E * (E // reduction)",
)
def restore(
    model: nn.Module,
    *,
    length: int = 4,
    depth: int = 9,
    std: float = 0.02,
    weight: float = 1.0,
    reduction: int = 4,
    share: float = 0.1,
) -> Extended:
    """RESTORE (Yang et al. 2024): adds weight x (mean |x - x_base| of pictures - mean |w - w_base| of classes)^2.

    Args:
      model: of two transformers.
      length, depth, std: of the prompts.
      weight: of the difference between the towers' feature shifts; 0 leaves it out.
      reduction, share: of the adapters after the towers, the "surgery".
    """
    moved = lambda x, base: jnp.sqrt(jnp.sum(jnp.square(x - base), axis=-1) + 1e-12)
    features = {
        "batch": lambda o, ctx: moved(o["image_embedding"], o.teacher("base")["image_embedding"]),
        "classes": lambda o, ctx: moved(o["text_embedding"], o["zero_shot"]),
    }

    def loss(outputs, features, rows, ctx):
        image = jnp.mean(features["batch"], where=rows["batch"]["label"] >= 0)
        text = jnp.mean(features["classes"])
        return jnp.square(image - text), {"image": image, "text": text}

    adapters = OutputAdapter("image", reduction, share), OutputAdapter("text", reduction, share)
    shift = Term("shift", features, loss, weight=weight)
    return Extended(Joined(Independent(length, depth, std), adapters), (shift,) if weight else ())


def mean_of_real(outputs, features, rows, ctx):
    """The loss that is the mean of features [B] over labelled pictures."""
    return jnp.mean(features, where=rows["label"] >= 0), {}
