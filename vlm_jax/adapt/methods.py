"""The ways to adapt a model to a few labelled pictures, by name: `METHODS[name](base, shots, validation, ...)`.

    heads on embeddings     zero_shot, linear_probe, gda, tip_adapter, tip_adapter_f, tip_x, cross_modal_probe
    the model's own         prolip, bias, norm, head, last_1, full
    inserted modules        lora, adapter, adaptformer, prefix
    learned tokens          coop, cocoop, vpt, vpt_deep, maple, upt

Each returns the adapted `Pretrained`; hyper-parameters that it searches are chosen on the validation pictures.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import config
from vlm_jax.adapt import coupled, heads
from vlm_jax.adapt.tune import Inserted, Masked, Recipe, tune
from vlm_jax.errors import DivergedError, UserError
from vlm_jax.models import insertion
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained, class_embeddings

ALPHAS, BETAS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], [0.3, 1.0, 2.0, 3.5, 5.5, 8.0]
LEARNING_RATES = [1e-3, 1e-2]


class Shots(NamedTuple):
    """Labelled pictures.

    Attributes:
      images: preprocessed, [N, H, W, 3], or None where no method asks for them.
      features: their embeddings, unit norm, float [N, D].
      labels: int [N], in range(C).
    """

    images: Any
    features: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """What is to be told apart.

    Attributes:
      names: of the C classes.
      templates: prompts.
      text: embeddings of the classes, unit norm, float [C, D].
      scale: of the model's logits.
      seed: of what is drawn.
    """

    names: Sequence[str]
    templates: Sequence[str]
    text: np.ndarray
    scale: float
    seed: int


def _head(fit: Callable) -> Callable:
    """A method of a function (features, labels, text, scale), validation -> head."""

    def method(base: Pretrained, shots: Shots, validation: Shots, task: Task) -> Pretrained:
        head = fit((shots.features, shots.labels, task.text, task.scale), validation[1:])
        return dataclasses.replace(base, classes=tuple(task.names), templates=tuple(task.templates), head=head)

    return method


def _zero_shot(base: Pretrained, shots: Shots, validation: Shots, task: Task) -> Pretrained:
    return dataclasses.replace(base, classes=tuple(task.names), templates=tuple(task.templates), head=None)


def accuracy(base: Pretrained, adapted: Pretrained, queries: Shots, names: Sequence[str]) -> float:
    """The share of pictures that an adapted model gives their name; an image tower that is as it was embeds no more."""
    if adapted.head is not None:
        logits = adapted.head(queries.features)
    elif adapted.compares_pairs or _image_tower_changed(base, adapted):
        logits = adapted.class_logits(queries.images, names)
    else:
        text = class_embeddings(adapted.embed_texts, names, adapted.templates)
        logits = queries.features.astype(np.float64) @ text.T
    return share_right(logits, queries)


def share_right(logits: np.ndarray, queries: Shots) -> float:
    """The share of pictures whose largest logit is their label's."""
    return float(np.mean(np.argmax(logits, axis=1) == queries.labels))


def _image_tower_changed(base: Pretrained, adapted: Pretrained) -> bool:
    own = named_leaves(base.params)
    changed = (name for name, leaf in named_leaves(adapted.params).items() if own.get(name) is not leaf)
    return any(name.startswith("image/") for name in changed)


def _linear_probe(few, validation):
    features, labels, text, _ = few
    build = lambda l2: heads.linear_probe(features, labels, len(text), l2)
    return heads.choose(build, {"l2": [0.1, 0.3, 1.0, 3.0, 10.0]}, *validation).head


def _gda(few, validation):
    grid = {"alpha": [10.0**k for k in range(-4, 3)]}
    return heads.choose(functools.partial(heads.gda, *few), grid, *validation).head


def _tip_adapter(few, validation):
    grid = {"alpha": ALPHAS, "beta": BETAS}
    return heads.choose(functools.partial(heads.tip_adapter, *few), grid, *validation).head


def _tip_adapter_f(few, validation):
    trained = heads.tip_adapter_f(*few, alpha=1.0, beta=5.5)  # of the authors' code, before their search
    return heads.choose(trained._replace, {"alpha": ALPHAS, "beta": BETAS}, *validation).head


def _tip_x(few, validation):
    tip = _tip_adapter(few, validation)
    build = functools.partial(heads.tip_x, *few, alpha=tip.alpha, beta=tip.beta, reference=validation[0])
    return heads.choose(build, {"gamma": ALPHAS}, *validation).head


def _cross_modal_probe(few, validation):
    build = functools.partial(heads.cross_modal_probe, *few)
    return heads.choose(build, {"learning_rate": [1e-3, 1e-4]}, *validation).head


@functools.partial(jax.jit, static_argnames="model")
def before_head(model: nn.Module, params: Any, images: Any) -> jax.Array:
    """What the image tower's projection head takes, fp32 [B, E]."""
    seen = []

    def look(call, args, kwargs, context):
        if context.module.path == ("image", "head"):
            seen.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply({"params": params}, images, None)
    if not seen:
        raise UserError("prolip trains the image tower's projection head; this model has none")
    return seen[0].astype(jnp.float32)


def _prolip(base: Pretrained, shots: Shots, validation: Shots, task: Task) -> Pretrained:
    parts = [(base._run(before_head, part.images), part.labels) for part in (shots, validation)]
    own = base.params["image"]["head"]
    build = functools.partial(
        heads.prolip, *parts[0], task.text, task.scale, np.asarray(own["kernel"]), own.get("bias")
    )  # fmt: skip
    best = heads.choose(build, {"learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]}, *parts[1]).head
    params = base.params | {"image": base.params["image"] | {"head": own | {"kernel": jnp.asarray(best.kernel)}}}
    return dataclasses.replace(_zero_shot(base, shots, validation, task), params=params)


def _tuned(make: Callable[[nn.Module, dict], Recipe]) -> Callable:
    """A method of a recipe, made of the model and options; the learning rate is searched unless it is given."""

    def method(
        base: Pretrained, shots: Shots, validation: Shots, task: Task, *, steps: int = 200, batch_size: int = 32,
        learning_rate: float | None = None, weight_decay: float = 0.0, **options: Any,
    ) -> Pretrained:  # fmt: skip
        recipe = make(base.model, options)
        best = failed = None
        for rate in LEARNING_RATES if learning_rate is None else [learning_rate]:
            try:
                adapted = tune(
                    base, recipe, shots.images, shots.labels, task.names, templates=task.templates, steps=steps,
                    batch_size=batch_size, learning_rate=rate, weight_decay=weight_decay, seed=task.seed,
                )  # fmt: skip
            except DivergedError as error:
                failed = error
                continue
            share = accuracy(base, adapted, validation, task.names)
            if best is None or share > best[0]:
                best = share, adapted
        if best is None:
            raise failed
        return best[1]

    return method


def _masked(trainable: Any) -> Callable:
    return _tuned(lambda model, options: config.call(Masked, options, WHERE, trainable=trainable))


def _inserted(kind: type, **defaults: Any) -> Callable:
    return _tuned(lambda model, options: Inserted((config.call(kind, defaults | options, WHERE),)))


def _cocoop(model: nn.Module, options: dict) -> Recipe:
    width = model.text.out_dim or model.text.width
    return Inserted((config.call(insertion.Context, options, WHERE, image_width=width),))


WHERE = "an option of the method"
HEADS = {
    "zero_shot": _zero_shot,
    "linear_probe": _head(_linear_probe),
    "gda": _head(_gda),
    "tip_adapter": _head(_tip_adapter),
    "tip_adapter_f": _head(_tip_adapter_f),
    "tip_x": _head(_tip_x),
    "cross_modal_probe": _head(_cross_modal_probe),
}
TUNED = {
    "bias": _masked("bias"),
    "norm": _masked("norm"),
    "head": _masked("head"),
    "last_1": _masked("last_1"),
    "full": _masked(((".*", True),)),
    "lora": _inserted(insertion.LowRank),
    "adapter": _inserted(insertion.Adapter),
    "adaptformer": _inserted(insertion.Adapter, form="parallel", scale=0.1),
    "prefix": _inserted(insertion.Prefix, length=4),
    "coop": _inserted(insertion.Context),
    "cocoop": _tuned(_cocoop),
    "vpt": _inserted(insertion.Prompt),
    "vpt_deep": _inserted(insertion.Prompt, depth=None),
    "maple": _tuned(lambda model, options: config.call(coupled.Coupled, options, WHERE)),
    "upt": _tuned(lambda model, options: config.call(coupled.Unified, options, WHERE)),
}
METHODS = HEADS | {"prolip": _prolip} | TUNED
