"""Tuning on what misleads the model most: TeCoA on pictures, SMART on embedded patches."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended, Inserted
from vlm_jax.adapt.tuning.classifier import IMAGE
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.objectives import Teacher, Term
from vlm_jax.objectives.adversarial import Ball, Pixels, ascend, held, largest, shifted

PATCHES = "image", "patch_embed"


@method(
    family="parameters",
    system="TeCoA",
    paper="arXiv:2212.07016",
    differs="the image tower learns the names of pictures that were changed to mislead it",
)
def tecoa(
    model: nn.Module, *, radius: float = 1.0, steps: int = 2, size: float | None = None, length: int = 0
) -> Extended:
    """TeCoA (Mao et al. 2023): the cross-entropy over class names of pictures at their worst, max over a ball.

    |x' - x| <= radius in grey levels, of 0 to 255, by projected gradient ascent from a uniform draw. Texts stay.

    Args:
      model: two towers.
      radius: in grey levels; 0 is tuning of the image tower.
      steps, size: of the ascent; `size` in grey levels, defaults to the radius.
      length: trains so many learned tokens in the place of the tower, the paper's visual prompts; 0 trains the tower.
    """
    if radius < 0 or steps < 1:
        raise UserError(f"tecoa has radius {radius} and steps {steps}; expected 0 or more, and 1 or more")
    trained = Inserted((Prompt(length=length),)) if length else IMAGE
    if not radius:
        return Extended(trained)

    def of_task(base, images, labels, names):
        return dataclasses.replace(recipe, terms=(adversarial(Pixels.of(base.preprocess)),), of_task=None)

    def adversarial(units):
        features = {"batch": lambda o, ctx: o["image"], "classes": lambda o, ctx: o["text_embedding"]}

        def loss(outputs, features, rows, ctx):
            labels, texts = rows["batch"]["label"], features["classes"]

            def losses(outputs, texts=texts):
                cosines = jnp.matmul(outputs["image_embedding"], texts.T, precision="highest")
                logits = outputs["scale"] * cosines
                losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
                return jnp.where(labels >= 0, losses, 0)

            pixels = units.pixels(features["batch"])
            ball, still = Ball.around(pixels, radius, 0.0, 255.0), jax.lax.stop_gradient(texts)
            risk = lambda p: jnp.sum(losses(held(outputs, image=units.images(p)), still))
            step = radius if size is None else size
            worst = ascend(risk, ball.draw(ctx.rng), ball, steps=steps, size=step)
            value = jnp.sum(losses(outputs.on(image=units.images(worst)))) / jnp.sum(labels >= 0)
            return value, {"moved": jnp.max(jnp.abs(worst - pixels))}

        return Term("adversarial", features, loss)

    recipe = Extended(trained, names_classes=False, of_task=of_task)
    return recipe


@method(
    family="parameters",
    paper="arXiv:1911.03437",
    differs="predictions are smooth around embedded patches, and stay near those of an average of the model",
    identity=True,
)
def smart(
    model: nn.Module,
    *,
    smoothness: float = 1.0,
    proximity: float = 1.0,
    radius: float = 1e-3,
    size: float = 1e-3,
    steps: int = 1,
    noise: float = 1e-5,
    decay: float = 0.99,
) -> Extended:
    """SMART (Jiang et al. 2020): adds smoothness * R + proximity * D to the cross-entropy of all parameters' tuning.

        R = mean_i max_{|delta| <= radius} s(f(x_i + delta), f(x_i)),   D = mean_i s(f(x_i), f_average(x_i))

    s is the symmetrised KL divergence, f the distribution over class names, x the embedded patches, and the average
    follows the parameters. Defaults of size and noise are of the authors' code.

    Args:
      model: two towers, the image tower a transformer.
      smoothness, proximity: 0 leaves the part out.
      radius: of the ball, in units of the embedded patches.
      size, steps: of the ascent, along the gradient over its largest entry.
      noise: standard deviation of the ascent's start.
      decay: of the average, the paper's momentum, above 0: at 0 the average would be the model itself.
    """
    if proximity and not 0 < decay < 1:
        raise UserError(f"smart has decay {decay}; expected above 0 and below 1")
    names = {"batch": lambda o, ctx: o["image_embedding"], "classes": lambda o, ctx: o["text_embedding"]}
    log_p = lambda scale, x, texts: jax.nn.log_softmax(scale * jnp.matmul(x, texts.T, precision="highest"))

    def smooth(outputs, features, rows, ctx):
        images, texts, counts = rows["batch"]["image"], features["classes"], rows["batch"]["label"] >= 0
        clean = log_p(outputs["scale"], features["batch"], texts)

        def apart(view, delta, texts, clean):
            with shifted(PATCHES, delta):
                x = view["image_embedding"]
            return jnp.where(counts, symmetric(log_p(view["scale"], x, texts), clean), 0)

        still, wanted = jax.lax.stop_gradient((texts, clean))
        with shifted(PATCHES, 0) as seen:
            held(outputs, image=images)["image_embedding"]
        if not seen:
            raise UserError("smart changes embedded patches; the model has no `image/patch_embed`")
        ball = Ball.around(jnp.zeros_like(seen[0]), radius)
        begin = jnp.zeros_like(seen[0])
        if ctx.rng is not None:
            begin = noise * jax.random.normal(ctx.rng, begin.shape, begin.dtype)
        risk = lambda delta: jnp.sum(apart(held(outputs, image=images), delta, still, wanted))
        delta = ascend(risk, begin, ball, steps=steps, size=size, direction=largest)
        return jnp.sum(apart(outputs.on(image=images), delta, texts, clean)) / jnp.sum(counts), {}

    of_average = {key: lambda o, ctx, f=f: (f(o, ctx), f(o.teacher("average"), ctx)) for key, f in names.items()}

    def near(outputs, features, rows, ctx):
        views = outputs, outputs.teacher("average")
        own, average = (
            log_p(view["scale"], features["batch"][i], features["classes"][i]) for i, view in enumerate(views)
        )
        return jnp.mean(symmetric(own, average), where=rows["batch"]["label"] >= 0), {}

    terms = [Term("smoothness", names, smooth, weight=smoothness)] if smoothness else []
    terms += [Term("proximity", of_average, near, weight=proximity)] if proximity else []
    return Extended(full(model), tuple(terms), teachers={"average": Teacher(decay)} if proximity else {})


def symmetric(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Returns KL(p || q) + KL(q || p) of log-probabilities [..., C] -> [...]."""
    return jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q), axis=-1)
