"""What self-supervision compares: views of a picture, or a picture and its text, through projectors; and collapse."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.errors import UserError
from vlm_jax.models.vocabulary import is_text
from vlm_jax.objectives.outputs import Outputs
from vlm_jax.objectives.term import WHERE, Context

SIDES = ("image", "text")
Section = Mapping[str, Any]


class Projector(nn.Module):
    """Dense layers, with a norm and a ReLU after each but the last.

    Attributes:
      hidden, out: widths.
      layers: number of dense layers; 0 for none.
      norm: "batch", over the rows of the global batch in training and evaluation; "layer"; or "none".
      last: whether the norm also follows the last layer.
    """

    hidden: int = 2048
    out: int = 2048
    layers: int = 3
    norm: str = "batch"
    last: bool = False

    @nn.compact
    def __call__(self, x):
        """[B, width] -> [B, out], for batch norm of all rows."""
        exact = jnp.promote_types(x.dtype, jnp.float32)
        norm = config.choose({"batch": BatchNorm, "layer": nn.LayerNorm, "none": None}, self.norm, f"{WHERE}: norm")
        for i in range(1, self.layers + 1):
            end = i == self.layers
            x = nn.Dense(self.out if end else self.hidden, dtype=x.dtype, param_dtype=exact, name=f"fc{i}")(x)
            if norm is not None and (self.last or not end):
                x = norm(param_dtype=exact, name=f"norm{i}")(x).astype(x.dtype)
            x = x if end else nn.relu(x)
        return x


class BatchNorm(nn.Module):
    """A norm over rows by their own statistics, which are not stored."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        """[B, D] -> [B, D], at least fp32."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return standardised(x.astype(self.param_dtype), 1e-5) * scale + bias


def standardised(x: jax.Array, eps: float = 0.0) -> jax.Array:
    """Returns x [B, D] with mean 0 and variance 1 over the rows."""
    x = x - jnp.mean(x, axis=0)
    return x / jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(x), axis=0) + eps, 1e-12))


class Compared:
    """The sides of a term; arguments as for `simsiam`."""

    def __init__(self, of, crops=None, teacher=None, projector=None, predictor=None):
        self.of, self.crops, self.teacher = ((of,) if isinstance(of, str) else tuple(of)), crops, teacher
        self.projector, self.predictor = projector, predictor

    def features(self, outputs: Outputs, ctx: Context) -> dict[str, dict[str, jax.Array]]:
        """Returns {"own": {modality: [B, V, D]}}, and such dicts of "crops", and "taught" by the teacher."""
        found = {"own": _sides(outputs, self.of, ctx)}
        if self.crops:
            found["crops"] = _sides(outputs, (self.crops,), ctx)
        if self.teacher:
            found["taught"] = _sides(outputs.teacher(self.teacher), self.of, ctx)
        return found

    def projected(self, outputs: Outputs, features: Mapping, *kinds: str) -> list[tuple[str, jax.Array]]:
        """Returns [(modality, projection [B, D])], at least fp32, of each side."""
        given = [one for kind in kinds for one in each_side(features.get(kind, {}))]
        return [(side, self.project(outputs, side, x)) for side, x in given]

    def project(self, outputs: Outputs, side: str, x: jax.Array) -> jax.Array:
        """Returns the projection of vectors of a modality, at least fp32."""
        return self._through(outputs, f"{side}_projector", self.projector, x)

    def predict(self, outputs: Outputs, side: str, x: jax.Array) -> jax.Array:
        """Returns what the predictor of a modality makes of projections."""
        module = self.predictor if self.projector.layers else self.predictor.clone(out=x.shape[-1])
        return self._through(outputs, f"{side}_predictor", module, x)

    def _through(self, outputs, name, module, x):
        x = outputs.part(name, module, x) if module.layers else x
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sides(outputs: Outputs, names: Sequence[str], ctx: Context) -> dict[str, jax.Array]:
    """Returns {modality: vectors [B, V, D]} of outputs and of keys of the batch, before they are normalised.

    A text of the batch that is lacking, all padding, gives NaN: the run stops.
    """
    found: dict[str, list] = {}
    for name in names:
        if name in SIDES:
            side, x = name, _vectors(outputs[f"of_{name}"], name)[:, None]
        else:
            rows = outputs[name]
            side = "text" if jnp.issubdtype(rows.dtype, jnp.integer) else "image"
            one = 2 if side == "text" else 4
            if rows.ndim not in (one, one + 1):
                raise UserError(
                    f"{WHERE}: `{name}` has the shape {rows.shape}; expected pictures [B, V, h, w, 3] (op `views`), "
                    "or texts [B, V, L]"
                )
            flat = rows if rows.ndim == one else rows.reshape(-1, *rows.shape[2:])
            x = _vectors(outputs.apply("__call__", *((None, flat) if side == "text" else (flat, None))), side)
            x = jnp.where(jnp.any(is_text(flat, *ctx.special()), axis=-1)[:, None], x, jnp.nan) if side == "text" else x
            x = x.reshape(len(rows), -1, x.shape[-1])
        found.setdefault(side, []).append(x)
    return {side: jnp.concatenate(parts, axis=1) for side, parts in found.items()}


def each_side(sides: Mapping[str, jax.Array]) -> list[tuple[str, jax.Array]]:
    """Returns [(modality, [B, D])] of {modality: [B, V, D]}."""
    return [(side, views[:, v]) for side, views in sides.items() for v in range(views.shape[1])]


def _vectors(embeddings: Any, side: str) -> jax.Array:
    pooled = getattr(embeddings, f"{side}_pooled")
    x = getattr(embeddings, side) if pooled is None else pooled
    if x.ndim != 2:
        raise UserError(f'{WHERE}: the {side} tower has a vector for each token; give it another pool than "all"')
    return x


def pairs(own: Sequence[tuple], others: Sequence[tuple] = (), both: bool = True) -> list[tuple]:
    """Returns pairs of what is compared: (side, target) for each order, and for others that come after.

    Args:
      own: (modality, ...) of each target.
      others: of each side; the first are those of `own`; defaults to `own`.
      both: whether pairs come in both orders.
    """
    across = len({side for side, *_ in own}) > 1
    fits = lambda i, j, a, b: (a[0] != b[0] if across else i != j) and (both or i < j)
    given = list(enumerate(others or own))
    found = [(a, b) for i, a in given for j, b in enumerate(own) if fits(i, j, a, b)]
    if not found:
        raise UserError(f"{WHERE}: one view is compared with nothing; give two views, or a picture and a text, in `of`")
    return found


def mean_over(pairs: Sequence[tuple], loss: Callable) -> jax.Array:
    """Returns the mean of `loss(*pair)`."""
    return sum(loss(*pair) for pair in pairs) / len(pairs)


def metrics(features: Mapping) -> dict[str, jax.Array]:
    """Returns `collapse` of each modality's first side, before the projector."""
    return {f"{side}_{name}": x for side, views in features["own"].items() for name, x in collapse(views[:, 0]).items()}


def projector_of(section: Section | None, name: str = "projector", **defaults: Any) -> Projector:
    """Returns the projector of a config section, whose fields override the defaults."""
    return config.call(Projector, defaults | dict(section or {}), f"{WHERE}.{name}")


def collapse(features: jax.Array) -> dict[str, jax.Array]:
    """Returns two metrics of the directions z = x / |x| of features x [B, D], without gradient.

        spread = sqrt(D) mean_d std_b(z_bd)        effective_rank = (trace C)^2 / trace(C^2),  C = cov(z)

    `spread` is near 1 if directions are uniform, and 0 if all are one (SimSiam, arXiv:2011.10566, looks at the same
    standard deviation). `effective_rank` is the number of dimensions that an even spread would need, the participation
    ratio of the eigenvalues of C: 1 if all lie on one line.
    """
    x = jax.lax.stop_gradient(features).astype(jnp.promote_types(features.dtype, jnp.float32))
    z = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    z = z - jnp.mean(z, axis=0)
    covariance = jnp.matmul(z.T, z, precision=jax.lax.Precision.HIGHEST) / len(z)
    square = jnp.sum(jnp.square(covariance))
    rank = jnp.where(square > 0, jnp.square(jnp.trace(covariance)) / jnp.where(square > 0, square, 1), 0)
    return {"spread": x.shape[-1] ** 0.5 * jnp.mean(jnp.sqrt(jnp.diag(covariance))), "effective_rank": rank}
