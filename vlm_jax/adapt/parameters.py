"""Methods that train parameters of the model itself: each makes a `Recipe` from the model."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.adapt import heads
from vlm_jax.adapt.recipe import Masked
from vlm_jax.adapt.task import Shots, Task
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.pretrained import Pretrained


@method(
    family="parameters",
    system="BitFit",
    paper="arXiv:2106.10199",
    where="section 3",
    differs="biases alone train",
    claim="few_shot: biases alone match tuning everything",
    identity=True,
)
def bias(model: nn.Module) -> Masked:
    """BitFit."""
    return Masked("bias")


@method(
    family="parameters",
    system="LayerNorm-tuning",
    paper="arXiv:2403.20284",
    differs="scales and biases of the norms alone train",
    claim="few_shot: norms alone match tuning everything",
    identity=True,
)
def norm(model: nn.Module) -> Masked:
    """LayerNorm tuning."""
    return Masked("norm")


@method(
    family="parameters",
    system="XAttn-only",
    paper="arXiv:2104.08771",
    differs="cross-attention of a decoder alone trains",
    needs={"model.name": "captioner"},
    identity=True,
)
def cross_attention(model: nn.Module) -> Masked:
    """Cross-attention tuning, of models whose decoder attends to pictures."""
    return Masked("cross_attention")


@method(
    family="parameters",
    differs="the projection heads of both towers train",
    identity=True,
)
def head(model: nn.Module) -> Masked:
    """Tuning of the heads."""
    return Masked("head")


@method(
    family="parameters",
    system="Elsa-freeze",
    paper="arXiv:1911.03090",
    differs="the last block of each tower trains, and what follows it",
    claim="few_shot: the last block alone reaches 90 % of what tuning everything gains",
    identity=True,
)
def last_1(model: nn.Module) -> Masked:
    """Tuning of the last block; `vlm_jax.params.masks` takes any number, for instance `last_3`."""
    return Masked("last_1")


@method(
    family="parameters",
    differs="all parameters train",
    identity=True,
)
def full(model: nn.Module) -> Masked:
    """Tuning of everything."""
    return Masked(((".*", True),))


@method(
    family="parameters",
    system="ProLIP",
    paper="arXiv:2410.05270",
    differs="the image tower's last projection trains, pulled towards where it began",
    claim="few_shot: ProLIP above zero-shot",
)
def prolip(model: nn.Module, *, pull: float | str = "1/N") -> "ProLip":
    """ProLIP, on cached features."""
    return ProLip(pull)


class ProLip(NamedTuple):
    """Fits the projection head by `heads.train_projection`; the learning rate is chosen on validation pictures."""

    pull: float | str

    def fit(
        self,
        base: Pretrained,
        shots: Shots,
        validation: Shots,
        task: Task,
        *,
        steps: int = 300,
        learning_rate: float | None = None,
    ) -> Pretrained:
        """Returns the model with the trained projection."""
        parts = [(base._run(before_head, part.images), part.labels) for part in (shots, validation)]
        own = base.params["image"]["head"]
        given = task.text, task.scale, np.asarray(own["kernel"]), own.get("bias")
        build = partial(heads.train_projection, *parts[0], *given, pull=self.pull, steps=steps)
        rates = [1e-5, 1e-4, 1e-3, 1e-2] if learning_rate is None else [learning_rate]
        best = heads.choose(build, {"learning_rate": rates}, *parts[1]).head
        params = base.params | {"image": base.params["image"] | {"head": own | {"kernel": jnp.asarray(best.kernel)}}}
        named = dict(classes=tuple(task.names), templates=tuple(task.templates), head=None)
        return dataclasses.replace(base, params=params, **named)


@partial(jax.jit, static_argnames="model")
def before_head(model: nn.Module, params: Any, images: Any) -> jax.Array:
    """The input of the image tower's projection head, fp32 [B, E]."""
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
