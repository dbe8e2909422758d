"""Gradient transformations by name: those of optax, Adafactor and Muon as vision-language models use them, and EWC."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlm_jax import config
from vlm_jax.errors import UserError, near
from vlm_jax.params import masks
from vlm_jax.params.importance import spider_importance, weighed
from vlm_jax.params.regularizers import ewc_gradient
from vlm_jax.params.table import map_with_name, named_leaves


def optimizer(name: str, where: str) -> Callable[..., optax.GradientTransformation]:
    """Returns a function of this module or of optax that takes `learning_rate`; `where` names the key in messages."""
    own = {"adafactor": adafactor, "muon": muon, "bert_adam": bert_adam, "spider": spider}
    return _choose(own, name, _takes_learning_rate, f"{where} is `{name}`", "optimizer")


def transform(section: str | Mapping[str, Any], where: str) -> optax.GradientTransformation:
    """Returns a gradient transformation of this module or of optax, e.g. dict(name="clip", max_delta=1.0).

    Raises:
      UserError: unknown name, unknown or missing option, or an option that the function refuses.
    """
    options = dict(section) if isinstance(section, Mapping) else {"name": section}
    name = str(options.pop("name", ""))
    function = _choose({"ewc": ewc}, name, _transforms_gradients, f"{where} is `{name}`", "gradient transformation")
    try:
        return config.call(function, options, f"{where} ({name})")
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} ({name}): {error}") from None


def _choose(own, name, fits, what, kind):
    """Returns `own[name]`, or the function `name` of optax that fits."""
    if name in own:
        return own[name]
    if fits(getattr(optax, name, None)):
        return getattr(optax, name)
    known = [*own, *(n for n in dir(optax) if not n.startswith("_") and fits(getattr(optax, n)))]
    hint = near(name, known, f"expected one of: {', '.join(known)}")
    raise UserError(f"{what}, which is no {kind} of optax; {hint}")


def _takes_learning_rate(function: Any) -> bool:
    return inspect.isfunction(function) and "learning_rate" in inspect.signature(function).parameters


def _transforms_gradients(function: Any) -> bool:
    returns = inspect.isfunction(function) and inspect.signature(function).return_annotation
    return returns is optax.GradientTransformation and not _takes_learning_rate(function)


def hold() -> optax.GradientTransformation:
    """Returns updates that keep parameters bit for bit: -0.0, because adding 0.0 would turn -0.0 into 0.0."""
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates))


def only(parts: Mapping[str, Any], rest: float = 0.0) -> optax.GradientTransformation:
    """Puts `rest` where the mask of an update is False; `parts` are bools by name, other updates pass."""
    masked = lambda name, u: jnp.where(parts[name], u, jnp.asarray(rest, u.dtype)) if name in parts else u
    return optax.stateless(lambda updates, params: map_with_name(masked, updates))


def scale(factors: Mapping[str, Any]) -> optax.GradientTransformation:
    """Multiplies updates by factors, by name: numbers, or arrays that broadcast; other updates pass."""
    scaled = lambda name, u: (factors[name] * u).astype(u.dtype) if name in factors else u
    return optax.stateless(lambda updates, params: map_with_name(scaled, updates))


def shrink(threshold: float | Callable) -> optax.GradientTransformation:
    """Moves parameters after their update towards 0 by a threshold, to exactly 0 where they are smaller.

    sign(p + u) max(|p + u| - threshold, 0), the proximal step of an L1 penalty. The threshold is a number or a function
    of the step.
    """

    def update(updates, state, params=None):
        now = threshold(state.count) if callable(threshold) else threshold
        soft = lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - now, 0)
        moved = jax.tree.map(lambda u, p: (soft(p + u) - p).astype(u.dtype), updates, params)
        return moved, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def sparse(
    tx: optax.GradientTransformationExtraArgs, shares: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """Returns tx, which moves the scalars outside `masks.drawn` to 0 and sees no gradient of them; its state is tx's.

    `shares` are the shares of zeros, by name; other parameters are not changed.
    """

    def update(updates, state, params=None, **others):
        shapes = {name: u.shape for name, u in named_leaves(updates).items() if name in shares}
        kept = {name: masks.drawn(name, shape, shares[name]) for name, shape in shapes.items()}
        pick = lambda name, x, rest: jnp.where(kept[name], x, rest.astype(x.dtype)) if name in kept else x
        moved, state = tx.update(map_with_name(pick, updates, optax.tree.zeros_like(updates)), state, params, **others)
        return map_with_name(pick, moved, optax.tree.scale(-1, params)), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def plain_keys(tx: optax.GradientTransformationExtraArgs, params: Any) -> optax.GradientTransformationExtraArgs:
    """Returns tx with the random keys of its state as numbers, which checkpoints can hold; params may be shapes."""
    kinds = jax.eval_shape(tx.init, params)
    is_key = lambda kind: jnp.issubdtype(kind.dtype, jax.dtypes.prng_key)
    if not any(map(is_key, jax.tree.leaves(kinds))):
        return tx
    plain = lambda state: jax.tree.map(lambda kind, x: jax.random.key_data(x) if is_key(kind) else x, kinds, state)
    keyed = lambda state: jax.tree.map(lambda kind, x: jax.random.wrap_key_data(x) if is_key(kind) else x, kinds, state)

    def update(updates, state, params=None, **others):
        updates, state = tx.update(updates, keyed(state), params, **others)
        return updates, plain(state)

    return optax.GradientTransformationExtraArgs(lambda params: plain(tx.init(params)), update)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    min_dim_size_to_factor: int = 32,
    decay_rate: float = 0.8,
    decay_offset: int = 0,
    beta2_cap: float = 0.999,
    clipping_threshold: float | None = None,
    momentum: float | None = 0.9,
    mu_dtype: str = "bfloat16",
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """The Adafactor of Zhai et al. 2022 (arXiv:2106.04560, Section 3.4), used by LiT, SigLIP and CapPa.

    The second moment is factored for parameters with two sides of at least `min_dim_size_to_factor`. The decay of the
    second moment is min(beta2_cap, 1 - t^-decay_rate). `clipping_threshold` clips updates per parameter, in rms; None
    clips nothing. Momentum has no bias correction and is kept in `mu_dtype`. Parameter norms do not scale updates.
    """
    decay = lambda step, exponent: jnp.minimum(beta2_cap, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent)
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate,
            step_offset=decay_offset,
            min_dim_size_to_factor=min_dim_size_to_factor,
            epsilon=eps,
            decay_rate_fn=decay,
        ),
        optax.clip_by_block_rms(clipping_threshold) if clipping_threshold else optax.identity(),
        optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype) if momentum else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    matrices: str = "kernel",
    b1: float = 0.9,
    b2: float = 0.95,
    beta: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    mu_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for kernels, AdamW (`b1`, `b2`) for embeddings, positions, norms, biases and scales.

    A kernel is a parameter called `matrices` with two or more axes. The last two axes are a matrix; matrices along the
    leading axes (scanned layers) are orthogonalised one by one. With `consistent_rms=0.2` updates have AdamW's size, so
    that one learning rate serves both (Liu et al. 2025, arXiv:2502.16982, Section 2.2).
    """
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    dimensions = lambda name, x: matrix if name.split("/")[-1] == matrices and x.ndim >= 2 else None
    return optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        beta=beta,
        eps=eps,
        ns_steps=ns_steps,
        consistent_rms=consistent_rms,
        mu_dtype=mu_dtype,
        muon_weight_dimension_numbers=lambda tree: map_with_name(dimensions, tree),
    )


class Ewc(NamedTuple):
    """The state of `ewc`, trees like the parameters.

    Attributes:
      squares: running average of the squared gradients.
      fisher: `squares` of the stages before.
      anchor: the parameters at the beginning of the stage.
    """

    squares: Any
    fisher: Any
    anchor: Any


def ewc(weight: float, decay: float = 0.99, keep: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of `regularizers.ewc`, the pull to the model at the end of the stage before.

    F <- keep * F + squares where a stage begins; keep = 1 sums over the stages before (online EWC, Schwarz et al. 2018,
    arXiv:1805.06370). `squares` is the running average of g^2, g the batch's gradient before the penalty, in place of a
    pass over the stage's data at its end (Chaudhry et al. 2018, arXiv:1801.10112). In the first stage F is 0.

    Args:
      weight: lambda.
      decay: of the running average.
      keep: how much of F the next stage keeps.
    """

    if weight < 0 or not 0 <= decay < 1 or keep < 0:
        raise ValueError(f"weight={weight}, decay={decay}, keep={keep}; expected 0 or more, 0 to below 1, 0 or more")

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return Ewc(zeros(), zeros(), jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None, *, begins=False, **_):
        at_begin = lambda new, old: jax.tree.map(lambda n, o: jnp.where(begins, n, o), new, old)
        summed = jax.tree.map(lambda f, s: keep * f + s, state.fisher, state.squares)
        fisher, anchor = at_begin(summed, state.fisher), at_begin(params, state.anchor)
        squares = jax.tree.map(lambda s, g: decay * s + (1 - decay) * jnp.square(g), state.squares, updates)
        pull = ewc_gradient(params, anchor, fisher, weight)
        return jax.tree.map(jnp.add, updates, pull), Ewc(squares, fisher, anchor)

    return optax.GradientTransformationExtraArgs(init, update)


def bert_adam(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """AdamW without bias correction of the moments, as BERT was tuned at first: a control, unstable on few examples.

    Its first steps are larger than AdamW's (Zhang et al. 2021, arXiv:2006.05987).
    """

    def update(gradients, state, params=None):
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, b2, 2)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return scaled, optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)

    return optax.chain(
        optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def spider(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW whose parameters keep to where they began, by SPIDER's importance, `importance.spider_importance`."""
    return weighed(optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay), spider_importance)
