"""Self-distillation: views of a picture match an average of the model in a space of prototypes.

    terms=dict(
        self_distillation=dict(weight=dict(begin="80%")),
        masked_patches=dict(weight=dict(begin="80%", value=0.25)),
    ),
    teachers=dict(average=dict(decay=0.996, of="image/.*|objective/.*", inputs=dict(image="global"))),

The teacher's `inputs` say which view it sees; the alignment of pictures and texts goes on with the plain picture.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models.token_loss import in_chunks
from vlm_jax.models.two_tower import unit
from vlm_jax.objectives.alignment.sides import collapse
from vlm_jax.objectives.outputs import Outputs, fold
from vlm_jax.objectives.term import WHERE, Term
from vlm_jax.params.sharding import gathered, split_batch


class ProjectionHead(nn.Module):
    """A three-layer MLP and a normalisation (DINO: Caron et al. 2021, arXiv:2104.14294, section 3.1).

    Attributes:
      hidden: width of the hidden layers.
      bottleneck: D, width of the result.
    """

    hidden: int = 2048
    bottleneck: int = 256

    @nn.compact
    def __call__(self, x):
        """[..., width] -> unit norm, at least fp32 [..., D]."""
        dense = lambda width, name: nn.Dense(width, dtype=x.dtype, param_dtype=_exact(x), name=name)
        y = nn.gelu(dense(self.hidden, "fc1")(x))
        y = nn.gelu(dense(self.hidden, "fc2")(y))
        return unit(dense(self.bottleneck, "fc3")(y))


class Prototypes(nn.Module):
    """The last layer's matrix, of columns of unit norm.

    Attributes:
      number: K.
    """

    number: int

    @nn.compact
    def __call__(self, x):
        """[..., D], of which only the width counts -> [D, K]."""
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.number), _exact(x))
        return gathered(unit(kernel.T).T)


class MaskToken(nn.Module):
    """The embedding of patches that the student does not see."""

    @nn.compact
    def __call__(self, x):
        """[..., width], of which only the width counts -> [width]."""
        return self.param("token", nn.initializers.normal(0.02), x.shape[-1:], _exact(x))


def sinkhorn(logits: jax.Array, iterations: int = 3) -> jax.Array:
    """Returns exp(logits) [..., K], scaled in turns so that prototypes, then rows have equal sums; rows sum to 1.

    Sinkhorn-Knopp over all rows of the batch (SwAV: arXiv:2006.09882), which DINOv2 has in the place of the centre.
    """
    rows = tuple(range(logits.ndim - 1))
    for _ in range(iterations):
        logits = logits - jax.nn.logsumexp(logits, axis=rows, keepdims=True)
        logits = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(logits)


class _Match:
    """The cross-entropy of a teacher's and a student's prototypes; arguments as for `self_distillation`."""

    def __init__(self, head, prototypes, temperature, teacher_temperature, balance, momentum, chunk):
        self.head = config.call(ProjectionHead, head or {}, f"{WHERE}.head")
        self.prototypes, self.momentum, self.chunk = Prototypes(prototypes), momentum, chunk
        self.temperature, self.sharp = temperature, teacher_temperature
        self.centred = config.choose({"centre": True, "sinkhorn": False}, balance, f"{WHERE}.balance")
        self.memory = dict(init=self.init, update=self.update) if self.centred else {}

    def features(self, outputs: Outputs, taught: Outputs, student: jax.Array, teacher: jax.Array) -> dict[str, Any]:
        """Student's vectors [B, M, D], the teacher's [B, M | 1, D] -> what the loss needs of each row."""
        found = {
            "student": outputs.part("head", self.head, student),
            "teacher": taught.part("head", self.head, teacher),
        }
        if self.centred:
            mean = jnp.sum(found["teacher"], axis=1) / max(teacher.shape[1], 1)
            found["mean"] = mean @ taught.part("prototype_head", self.prototypes, mean)
        return found

    def loss(self, outputs: Outputs, taught: Outputs, features: Mapping, centre: Any) -> tuple[jax.Array, dict]:
        """Returns (the mean cross-entropy, metrics)."""
        own, other = split_batch(features["student"]), split_batch(features["teacher"])
        of_own = outputs.part("prototype_head", self.prototypes, own)
        of_other = taught.part("prototype_head", self.prototypes, other)
        scores = lambda z: z @ of_other / self.sharp
        targets = lambda z: jax.nn.softmax(scores(z) - centre / self.sharp) if self.centred else z
        if not self.centred:
            other = sinkhorn(scores(other))

        def some(own, *other_of_own):
            log_q = jax.nn.log_softmax(own @ of_own / self.temperature)
            p = targets(*other_of_own) if other_of_own else one
            return -jnp.sum(p * log_q, axis=-1), jnp.sum(jax.scipy.special.entr(p), axis=-1)

        if other.shape[1] == own.shape[1]:
            losses, entropies = in_chunks(some, (own, other), self.chunk)
        else:
            one = targets(other)
            losses, entropies = in_chunks(some, (own,), self.chunk)
        mean = lambda x: jnp.sum(x) / max(x.size, 1)
        return mean(losses), {"entropy": mean(entropies)}

    def init(self, features: Mapping) -> jax.Array:
        return jnp.zeros(features["mean"].shape[1:], features["mean"].dtype)

    def update(self, centre: jax.Array, features: Mapping, ctx: Any) -> jax.Array:
        return self.momentum * centre + (1 - self.momentum) * jnp.mean(features["mean"], axis=0)


@method(
    family="terms",
    system="SILC",
    paper="arXiv:2310.13355",
    differs="local crops match an average of the model on the whole picture",
    needs={
        "objective.teachers": {"average": {"decay": 0.99, "inputs": {"image": "global"}}},
        "objective.head": {"hidden": 16, "bottleneck": 8},
        "objective.prototypes": 32,
    },
)
def self_distillation(
    *,
    model: Any,
    teacher: str = "average",
    views: str | Sequence[str] = "local",
    head: Mapping[str, Any] | None = None,
    prototypes: int = 65_536,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    balance: str = "centre",
    momentum: float = 0.9,
    chunk: int = 1,
) -> Term:
    """Local-to-global self-distillation (Naeem et al. 2023), in the form of DINO (arXiv:2104.14294, equations 1 to 4).

        -mean_iv sum_k p_ik log q_ivk,  q = softmax(g_s(x_iv) / temperature),  p = softmax((g_t(x_i) - c) / teacher's)

    g are cosines of the projected, pooled picture with K prototypes: the student's for local views x_iv, the teacher's
    for the picture x_i that its `inputs` name. After each step, c <- momentum c + (1 - momentum) mean_i g_t(x_i).

    Args:
      model: linen module with the output `image_pooled`; for views of another size, `model.image.any_size`.
      teacher: name of the teacher, an average of the run's parameters.
      views: key of the batch with the student's views, [B, V, h, w, 3]; the data op `views` makes them. Or keys
        for views of several sizes: `("second", "local")` has another global view, as in DINO.
      head: fields of `ProjectionHead`; its parameters belong to the term, the teacher has averages of them.
      prototypes: K.
      temperature, teacher_temperature: DINO, section 3.2; a low teacher's sharpens.
      balance: against collapse: "centre" subtracts c; "sinkhorn" is `sinkhorn` in the place of the teacher's softmax.
      momentum: of the centre.
      chunk: number of views whose logits are in memory at a time.

    Metrics: `entropy`, the mean entropy of the teacher's p: 0 or log K tells of a collapse; `image_spread` and
    `image_effective_rank` of a view's pooled output, see `collapse`.
    """
    keys = (views,) if isinstance(views, str) else tuple(views)
    match = _Match(head, prototypes, temperature, teacher_temperature, balance, momentum, chunk)

    def features(outputs, ctx):
        pooled = jnp.concatenate([_pooled_views(outputs, key) for key in keys], axis=1)
        taught = outputs.teacher(teacher)
        return match.features(outputs, taught, pooled, taught["image_pooled"][:, None]) | {"pooled": pooled[:, 0]}

    def loss(outputs, features, rows, ctx):
        value, metrics = match.loss(outputs, outputs.teacher(teacher), features, ctx.state)
        return value, metrics | {f"image_{name}": x for name, x in collapse(features["pooled"]).items()}

    return Term("self_distillation", features, loss, **match.memory)


@method(
    family="terms",
    system="TIPS",
    paper="arXiv:2410.16512",
    differs="masked patches match an average of the model that sees them",
    needs={
        "objective.teachers": {"average": {"decay": 0.99, "inputs": {"image": "global"}}},
        "objective.head": {"hidden": 16, "bottleneck": 8},
        "objective.prototypes": 32,
    },
)
def masked_patches(
    *,
    model: Any,
    teacher: str = "average",
    share: float = 0.5,
    head: Mapping[str, Any] | None = None,
    prototypes: int = 65_536,
    temperature: float = 0.1,
    teacher_temperature: float = 0.04,
    balance: str = "centre",
    momentum: float = 0.9,
    chunk: int = 8,
) -> Term:
    """Masked prediction of patches (Maninis et al. 2025), in the form of iBOT (Zhou et al. 2022, arXiv:2111.07832).

    The loss of `self_distillation` on the masked patches of each picture, mean over patches, then over pictures. The
    student sees the picture that the teacher sees, with `share` of its patches replaced by a mask token; which ones
    depends on the seed, the step and the picture alone. The centre is that of masked patches.

    Args:
      model: linen module with the output `patch_tokens`, whose call takes `hidden` (see `ViT`).
      share: of a picture's patches, rounded to a whole number of patches.
      chunk: number of patches whose logits are in memory at a time.
      Others: as for `self_distillation`; "sinkhorn" holds the logits of all masked patches at once.

    Metrics: `entropy`, as for `self_distillation`.
    """
    if not 0 <= share <= 1:
        raise UserError(f"{WHERE}.share is {share}; expected a share of the patches, from 0 to 1")
    match = _Match(head, prototypes, temperature, teacher_temperature, balance, momentum, chunk)

    def features(outputs, ctx):
        taught = outputs.teacher(teacher)
        tokens = taught["patch_tokens"]
        if taught["of_image"].image_mask is not None:
            raise UserError(f"{WHERE}: masked_patches takes pictures of one size; these are packed, with padding")
        where, index = masks(outputs.keys, *tokens.shape[:2], share)
        hidden = where, outputs.part("mask", MaskToken(), tokens)
        seen = outputs.apply("__call__", taught.rows["image"], None, hidden=hidden).image_tokens
        pick = lambda x: jnp.take_along_axis(x[:, -tokens.shape[1] :], index[..., None], axis=1)
        return match.features(outputs, taught, pick(seen), pick(tokens))

    def loss(outputs, features, rows, ctx):
        return match.loss(outputs, outputs.teacher(teacher), features, ctx.state)

    return Term("masked_patches", features, loss, **match.memory)


def _pooled_views(outputs: Outputs, key: str) -> jax.Array:
    """Returns the pooled outputs [B, V, D] of views [B, V, h, w, 3] of the batch."""
    views = outputs[key]
    if views.ndim != 5:
        raise UserError(f"{WHERE}: `{key}` has the shape {views.shape}; expected [B, V, h, w, 3]: op `views`")
    pooled = outputs.apply("__call__", views.reshape(-1, *views.shape[2:]), None).image_pooled
    return pooled.reshape(*views.shape[:2], -1)


def masks(keys: jax.Array | None, rows: int, length: int, share: float) -> tuple[jax.Array, jax.Array]:
    """Returns (bool [B, N], int [B, M]): M of N patches of each row, drawn by its key."""
    count = round(share * length)
    keys = jax.random.split(jax.random.key(0), rows) if keys is None else keys
    order = jax.vmap(lambda key: jax.random.permutation(fold(key, "mask"), length))(keys)
    return order < count, jnp.argsort(order >= count, axis=1, stable=True)[:, :count]


def _exact(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
