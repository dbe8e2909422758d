"""Low-rank updates whose ranks the data choose: AdaLoRA by a budget, AutoLoRA by held-out pictures."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.adapt.heads.training import cross_entropy
from vlm_jax.adapt.recipe import Extended, Inserted, tree
from vlm_jax.catalogue import method
from vlm_jax.config import check_least
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.objectives import Term, of_model
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained


@method(
    family="modules",
    system="AdaLoRA",
    paper="arXiv:2303.10512",
    differs="updates in the form of a singular value decomposition; unimportant singular values go to 0 under a budget",
    count="rank * (8 * (L_t * D_t + L_v * D_v) + 4 * (L_t + L_v))",
    identity=True,
)
def adalora(
    model: nn.Module,
    *,
    where: str = r".*/attn/(query|key|value|out)",
    rank: int = 6,
    alpha: float | None = None,
    budget: float = 4.0,
    begin: str = "10%",
    end: str = "70%",
    every: int = 10,
    orthogonal: float = 0.1,
) -> Extended:
    """AdaLoRA (Zhang et al. 2023): W + P diag(w) Q; all places share a budget of ranks, see `params.rank_budget`.

    Args:
      model: of any dense layers.
      where, rank, alpha: as for `lora`; `rank` is that of each place at the beginning.
      budget: the mean rank at the end; `rank` keeps all.
      begin, end: the budget falls between these durations.
      every: number of steps between two allocations.
      orthogonal: weight of the sum over places of |P^T P - I|^2 + |Q Q^T - I|^2; 0 leaves it out.
    """
    if not 0 < budget <= rank:
        raise UserError(f"budget of adalora is {budget}; expected above 0, to the rank {rank} (all ranks stay)")

    def apart(outputs, features, rows, ctx):
        return sum(map(orthogonality, insertion.by_place(of_model(outputs.params)).values())), {}

    prior = Term("orthogonal", lambda outputs, ctx: outputs["label"], apart, weight=orthogonal)
    rule = dict(wd=1.0, budget=dict(rank=budget, begin=begin, end=end, every=every))
    recipe = Inserted((LowRank(where, rank, alpha, weights="singular"),))
    return Extended(recipe, (prior,) if orthogonal else (), optimizer=dict(params=((".*", rule),)))


def orthogonality(new: Mapping[str, jax.Array]) -> jax.Array:
    """Returns |a^T a - I|^2 + |b b^T - I|^2 of a place, Frobenius norms, summed over blocks in a scan."""
    a, b = new["a"], jnp.swapaxes(new["b"], -1, -2)
    gram = lambda x: jnp.matmul(jnp.swapaxes(x, -1, -2), x, precision="highest") - jnp.eye(x.shape[-1])
    return sum(jnp.sum(jnp.square(gram(x))) for x in (a, b))


@method(
    family="modules",
    system="AutoLoRA",
    paper="arXiv:2403.09113",
    differs="held-out pictures say which ranks of which place stay; these train anew",
    count="4 * rank * (L_t * D_t + L_v * D_v)",
    identity=True,
)
def autolora(
    model: nn.Module,
    *,
    where: str = r".*/attn/(query|value)",
    rank: int = 8,
    alpha: float | None = None,
    search: int = 100,
    held_out: float = 0.3,
    rate: float = 1e-3,
    selection_rate: float = 1e-2,
    unrolled: bool = True,
) -> Extended:
    """AutoLoRA (Zhang et al. 2024): ranks are learned by `searched` on a part of the pictures, then trained on all.

    A term stays where softmax(w) is 1 / rank or more, as in the authors' code. Those that go have a = b = 0, and stay
    so; `low_rank.ranks` counts the others.

    Args:
      model: two towers.
      where, rank, alpha: as for `lora`; `rank` is the largest one.
      search: steps of the search.
      held_out: share of the pictures that the selection learns from; the updates learn from the others.
      rate, selection_rate: learning rates of the search, of updates and of selection.
      unrolled: whether the selection's gradient goes through one step of the updates, see `searched`.
    """
    check_least(1, "autolora", search=search, rank=rank)
    if not 0 < held_out < 1:
        raise UserError(f"held_out of autolora is {held_out}; expected a share between 0 and 1")
    module = LowRank(where, rank, alpha)

    def of_task(base: Pretrained, images: Any, labels: np.ndarray, names: Sequence[str]) -> Extended:
        if base.is_captioner or base.compares_pairs:
            raise UserError("autolora learns ranks of models with an embedding for each picture and name")
        options = dict(steps=search, held_out=held_out, rate=rate, selection_rate=selection_rate, unrolled=unrolled)
        weights = searched(base, module._replace(weights="selection"), images, labels, names, **options)
        stay = {place: w * rank >= 1 - 1e-6 for place, w in weights.items()}
        return Extended(Kept(module, stay))

    return Extended(Inserted((module,)), of_task=of_task)


class Kept(NamedTuple):
    """A `LowRank` of which some terms are 0 from the beginning on.

    Attributes:
      module: the insertion.
      stay: place -> bool [..., r], the terms that train.
    """

    module: LowRank
    stay: Mapping[str, np.ndarray]

    def insertions(self, model, at):
        return (self.module,)

    def begin(self, rng, model, leaves):
        own = insertion.new_leaves(leaves)
        for place, stay in self.stay.items():
            own[f"{place}/inserted_a"] *= stay[..., None, :]  # b is 0: so is the gradient of both
        return own

    def combine(self, own, leaves):
        return dict(own)


def searched(
    base: Pretrained,
    module: LowRank,
    images: Any,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    steps: int,
    held_out: float,
    rate: float,
    selection_rate: float,
    unrolled: bool,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Returns the weights of the terms of each place, [..., r] of sum 1, learned on held-out pictures.

    With updates V = (a, b), selection w, and the cross-entropy L_t of training pictures, L_h of held-out ones:

        V' = V - rate dL_t(V, w) / dV,   w <- w - selection_rate d L_h(V', w) / dw

    unrolled: the gradient includes that of V' by w, exactly (the authors take a difference of two passes); otherwise V'
    is a constant (their code's first order). V and w themselves take steps of Adam. One batch of each part is a step.

    Args:
      base, images, labels, names: as for `tune`; names stand without a template.
      module: with the weights "selection".
      steps, held_out, rate, selection_rate, unrolled: see `autolora`.
      batch_size, seed: of the batches, of the split and of the initial a.
    """
    rng = np.random.default_rng(seed)
    count = min(max(round(held_out * len(labels)), 1), len(labels) - 1)
    if count < 1:
        raise UserError(f"autolora holds pictures out; {len(labels)} are too few: give two or more")
    images = np.asarray(base._pictures(images) if isinstance(images, list) else images)
    parts = np.split(rng.permutation(len(labels)), [len(labels) - count])
    model, token_ids = insertion.inserted(base.model, module), jnp.asarray(base._token_ids(list(names)))
    leaves = named_leaves(insertion.begin(jax.random.key(seed), model, base.params, images[:1], token_ids[:1]))
    own = insertion.new_leaves(leaves)
    w = {name: own.pop(name) for name in list(own) if name.endswith("inserted_selection")}
    search = Search(model, rate, selection_rate, unrolled)
    state = own, w, *(tx.init(x) for tx, x in zip(search.optimizers, (own, w), strict=True))
    for _ in range(steps):
        rows = (rng.choice(part, min(batch_size, len(part)), replace=False) for part in parts)
        state = _search_step(search, state, leaves, token_ids, *((images[own], labels[own]) for own in rows))
    softmax = lambda x: np.asarray(jax.nn.softmax(x))
    return {name.removesuffix("/inserted_selection"): softmax(x) for name, x in state[1].items()}


class Search(NamedTuple):
    """What a compiled step of `searched` depends on, besides arrays."""

    model: nn.Module
    rate: float
    selection_rate: float
    unrolled: bool

    @property
    def optimizers(self) -> tuple:
        return optax.adam(self.rate), optax.adam(self.selection_rate)

    def loss(self, leaves, own, w, token_ids, batch):
        """The mean cross-entropy of a batch (images, labels) over the names."""
        found = self.model.apply({"params": tree({**leaves, **own, **w})}, batch[0], token_ids)
        return cross_entropy(found.scale * jnp.matmul(found.image, found.text.T, precision="highest"), batch[1])


@partial(jax.jit, static_argnums=0)
def _search_step(search, state, leaves, token_ids, train, held):
    own, w, of_own, of_w = state
    loss = lambda own, w, batch: search.loss(leaves, own, w, token_ids, batch)
    gradient, pull = jax.vjp(lambda w: jax.grad(loss)(own, w, train), w)
    updates, of_own = search.optimizers[0].update(gradient, of_own, own)
    after = optax.apply_updates(own, updates)
    if search.unrolled:
        virtual = jax.tree.map(lambda v, g: v - search.rate * g, own, gradient)
        by_own, by_w = jax.grad(loss, argnums=(0, 1))(virtual, w, held)
        by_w = jax.tree.map(lambda direct, through: direct - search.rate * through, by_w, pull(by_own)[0])
    else:
        by_w = jax.grad(loss, argnums=1)(after, w, held)
    updates, of_w = search.optimizers[1].update(by_w, of_w, w)
    return after, optax.apply_updates(w, updates), of_own, of_w
