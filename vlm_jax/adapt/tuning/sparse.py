"""Tuning of chosen scalars and layers: by movement, by Fisher information, by sensitivity; grafts; low rank and sparse.

Each method looks at the task first, by a tuning or by gradients of some batches (`Extended.first`), and then trains
what it chose. Masks choose what is stored and moved; passes are dense, and no faster.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.adapt.parameters import full
from vlm_jax.adapt.recipe import Extended, Masked, tree
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.sparse import LowRankSparse
from vlm_jax.objectives import Term, of_model
from vlm_jax.params import budget as budgets
from vlm_jax.params import importance, layers, masks
from vlm_jax.params.table import named_leaves


def _share(name: str, value: float, least: float = 0.0) -> None:
    if not least < value <= 1:
        raise UserError(f"{name} is {value}; expected a share above 0, up to 1")


def _scalars(share: float, count: int) -> int:
    return max(round(share * count), 1)


@method(
    family="parameters",
    system="LT-SFT",
    paper="arXiv:2110.07560",
    where="section 3.1",
    differs="the scalars that full tuning moves furthest train, from the base model again",
    identity=True,
)
def lt_sft(model: nn.Module, *, share: float = 0.05, where: str = ".*") -> Extended:
    """Lottery-ticket fine-tuning (Ansell et al. 2022): full tuning, `masks.largest_moves`, tuning under the mask.

    Adapters of several such runs add up, see `zoo.adapters.composed`.

    Args:
      model: any.
      share: of the scalars of `where`; 1 is full tuning.
      where: regex of the parameters that may train.
    """
    _share("share of lt_sft", share)
    whole = Masked(((where, True), (".*", False)) if where != ".*" else ((".*", True),))

    def first(this, look):
        tuned, base = named_leaves(look.tune(whole).params), named_leaves(look.base.params)
        names = [name for name in base if re.fullmatch(where, name)]
        base, tuned = ({name: leaves[name] for name in names} for leaves in (base, tuned))
        mask = masks.largest_moves(base, tuned, _scalars(share, sum(leaf.size for leaf in base.values())))
        return dataclasses.replace(this, recipe=Masked(masks.rules(mask)), first=None)

    return Extended(whole, first=None if share == 1 else first)


@method(
    family="parameters",
    system="FIM-surgical",
    paper="arXiv:2310.17041",
    differs="the blocks with the most Fisher information train",
    identity=True,
)
def fim_surgical(model: nn.Module, *, blocks: int = 2, passes: int = 32, rows: int = 1, tower: str = "") -> Extended:
    """Surgical fine-tuning (Lodha et al. 2023): a block scores the sum of the mean g^2 over its scalars.

    Args:
      model: of towers with blocks.
      blocks: k, of all towers together; all other parameters are frozen.
      passes: number of gradients g.
      rows: pictures of a gradient; 1 is the diagonal of the empirical Fisher information.
      tower: "image" or "text", whose blocks may train; "": both.
    """

    def first(this, look):
        gradients = look.gradients(full(model), steps=passes, batch_size=rows)
        totals = layers.block_totals(tree(importance.scores("fisher", gradients)))
        totals = {block: total for block, total in totals.items() if block[0].startswith(tower)}
        if not blocks <= len(totals):
            raise UserError(f"blocks of fim_surgical is {blocks}; `{tower or 'the model'}` has {len(totals)} blocks")
        best = sorted(totals, key=totals.get, reverse=True)[:blocks]
        mask = masks.of_blocks(look.base.params, best)
        return dataclasses.replace(this, recipe=Masked(masks.rules(mask)), first=None)

    return Extended(full(model), first=first)


@method(
    family="parameters",
    system="SPT-sensitivity",
    paper="arXiv:2303.08566",
    differs="a budget goes to sensitive scalars, and to low-rank updates of matrices that have many of them",
    identity=True,
)
def spt(
    model: nn.Module,
    *,
    budget: float = 0.01,
    rank: int = 4,
    share: float = 0.2,
    passes: int = 8,
    where: str = r".*(blocks|norm).*",
) -> Extended:
    """Sensitivity-aware tuning (SPT, He et al. 2023): sensitivities of some batches, then `budget.allocate`.

    Args:
      model: any.
      budget: share of the model's scalars that may train, those of low-rank updates included.
      rank: of the updates.
      share: see `budget.allocate`.
      passes: number of batches; the authors' code has 8.
      where: regex of the parameters that may train; the authors leave embeddings out.
    """
    _share("budget of spt", budget)

    def first(this, look):
        may = Masked(((where, True), (".*", False)))
        sensitive = importance.scores("sensitivity", look.gradients(may, steps=passes))
        size = _scalars(budget, sum(leaf.size for leaf in jax.tree.leaves(look.base.params)))
        found = budgets.allocate(tree(sensitive), size, rank, share)
        mask, modules = dict(found.scalars), ()
        for name, rows in found.low_rank.items():
            place = name.removesuffix("/kernel")
            rows = rows[:, None, None] if np.ndim(rows) else True
            mask |= {f"{place}/inserted_a": rows, f"{place}/inserted_b": rows}
        if found.low_rank:
            places = "|".join(re.escape(name.removesuffix("/kernel")) for name in found.low_rank)
            modules = (LowRank(where=places, rank=rank),)
        return dataclasses.replace(this, recipe=Masked(masks.rules(mask), modules), first=None)

    return Extended(full(model), first=first)


@method(
    family="parameters",
    system="Skill-localization",
    paper="arXiv:2302.06600",
    differs="few scalars of a fully tuned model, chosen by gradients, are grafted onto the base model",
)
def skill_graft(
    model: nn.Module, *, share: float = 0.01, penalty: float = 0.1, bias: float = 10.0, speed: float = 1000.0
) -> Extended:
    """Grafting (Panigrahi et al. 2023): base + m * (tuned - base), m by gradient, then rounded to 0 or 1.

        m = b + (1 - 2 b) sigmoid(S - bias), b the mask of the scalars that full tuning moved furthest, S 0 at first

    The loss is the classes' + penalty * sum m / sum b; the authors have no penalty and take few steps.

    Args:
      model: any.
      share: of the scalars that b has.
      penalty: as above.
      bias: how sure the mask is at first.
      speed: multiplies the learning rate, for S alone.
    """
    _share("share of skill_graft", share)

    def first(this, look):
        tuned, base = named_leaves(look.tune(full(model)).params), named_leaves(look.base.params)
        begun = named_leaves(masks.largest_moves(base, tuned, _scalars(share, sum(x.size for x in base.values()))))
        graft = Graft(tuned, begun, bias)
        size = sum(int(mask.sum()) for mask in begun.values())

        def sparsity(outputs, features, rows, ctx):
            return sum(jnp.sum(m) for m in graft.masks(of_model(outputs.params)).values()) / size, {}

        term = Term("sparsity", lambda outputs, ctx: outputs["label"], sparsity, weight=penalty)
        finish = partial(grafted, tuned=tuned)
        return dataclasses.replace(this, recipe=graft, terms=(term,) if penalty else (), finish=finish, first=None)

    return Extended(full(model), first=first, optimizer={"params": ((".*", {"lr": speed, "wd": 0.0}),)})


class Graft(NamedTuple):
    """Logits S of a mask m between the base model and a tuned one, see `skill_graft`.

    Attributes:
      tuned: parameters by name.
      begun: b, bools by name.
      bias: of the sigmoid.
    """

    tuned: Mapping[str, jax.Array]
    begun: Mapping[str, np.ndarray]
    bias: float

    def insertions(self, model, at):
        return ()

    def begin(self, rng, model, leaves):
        return {name: jnp.zeros_like(leaf) for name, leaf in leaves.items()}

    def masks(self, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns m, by name."""
        soft = {name: jax.nn.sigmoid(logits - self.bias) for name, logits in own.items()}
        return {name: jnp.where(self.begun[name], 1 - m, m) for name, m in soft.items()}

    def combine(self, own, leaves):
        return {name: leaves[name] + m * (self.tuned[name] - leaves[name]) for name, m in self.masks(own).items()}


def grafted(base: Any, mixed: Any, tuned: Mapping[str, jax.Array]) -> Any:
    """Returns the model with each scalar of `mixed` moved to the nearer end: base's, or that of `tuned` by name."""

    def nearer(name, leaf):
        old, new = base_leaves[name], tuned[name]
        return jnp.where(jnp.abs(leaf - new) < jnp.abs(leaf - old), new, old)

    base_leaves = named_leaves(base.params)
    return dataclasses.replace(
        mixed, params=tree({name: nearer(name, leaf) for name, leaf in named_leaves(mixed.params).items()})
    )


@method(
    family="parameters",
    system="DSEE",
    paper="arXiv:2111.00160",
    differs="a low-rank update and single scalars of dense layers train, on a base model that is pruned halfway",
)
def dsee(
    model: nn.Module,
    *,
    rank: int = 4,
    scalars: int = 64,
    pruned: float = 0.5,
    alpha: float | None = None,
    where: str = r".*/attn/(query|value)",
    pruned_where: str = r".*blocks.*/kernel",
) -> Extended:
    """DSEE (Chen et al. 2021): W * S1 + a b + s, see `LowRankSparse`.

    The places of s are those of the sparse part of W, `sparse_part`. With `pruned`, there are two tunings: on W, then,
    from there, on W * S1, where S1 has the largest |W + a b| of all matrices together, as in the authors' code.

    Args:
      model: of dense layers.
      rank: of a b.
      scalars: of s, in each matrix; 0 is LoRA.
      pruned: share of zeros in W * S1; 0 prunes nothing.
      alpha: see `LowRankSparse`.
      where: regex of the dense layers with updates.
      pruned_where: regex of the parameters that are pruned.
    """
    if not 0 <= pruned < 1 or scalars < 0:
        raise UserError(f"dsee has pruned {pruned} and scalars {scalars}; expected 0 to below 1, and 0 or more")
    module = LowRankSparse(where, rank, alpha) if scalars else LowRank(where, rank, alpha)

    def first(this, look):
        base = named_leaves(look.base.params)
        kernels = {name: x for name, x in base.items() if re.fullmatch(rf"({where})/kernel", name)}
        matrices = [name for name in base if re.fullmatch(pruned_where, name)]
        if not kernels or (pruned and not matrices):
            lacks = where if not kernels else pruned_where
            raise UserError(f"dsee changes `{lacks}`, which matches no parameter of this model; see its names")
        mask: dict[str, Any] = {
            f"{name.removesuffix('kernel')}inserted_{own}": True for name in kernels for own in "ab"
        }
        for name, kernel in kernels.items() if scalars else ():
            mask[f"{name.removesuffix('kernel')}inserted_s"] = sparse_part(np.asarray(kernel), rank, scalars)
        recipe = Masked(masks.rules(mask), (module,))
        if pruned:
            tuned = look.tune(Extended(recipe)).params
            low_rank = LowRank(where, rank, alpha)
            new = {n: x for n, x in insertion.new_leaves(tuned).items() if not n.endswith("inserted_s")}
            whole = named_leaves(insertion.merge(tree(base | new), (low_rank,)))
            sizes = {name: np.abs(whole[name]) for name in matrices}
            kept = masks.largest(sizes, _scalars(1 - pruned, sum(x.size for x in sizes.values())))
            recipe = Pruned(recipe, kept, insertion.new_leaves(tuned))
        return dataclasses.replace(this, recipe=recipe, first=None)

    return Extended(Masked(((insertion.NEW, True), (".*", False)), (module,)), first=first)


class Pruned(NamedTuple):
    """A recipe on a base model whose scalars outside `kept` are 0.

    Attributes:
      recipe: of insertions, by a mask.
      kept: bools by name.
      begun: the insertions' parameters to begin with, by name.
    """

    recipe: Masked
    kept: Mapping[str, np.ndarray]
    begun: Mapping[str, jax.Array]

    def insertions(self, model, at):
        return self.recipe.insertions(model, at)

    def begin(self, rng, model, leaves):
        return self.recipe.begin(rng, model, {**leaves, **self.begun})

    def combine(self, own, leaves):
        zero = {name: jnp.where(mask, leaves[name], jnp.zeros_like(leaves[name])) for name, mask in self.kept.items()}
        return zero | self.recipe.combine(own, leaves)


def sparse_part(kernel: np.ndarray, rank: int, scalars: int, steps: int = 10) -> np.ndarray:
    """Returns the places of S in W = L + S, L of a rank and S of so many scalars; bools [..., in, out].

    In turn, L is the best approximation of W - S, and S has the largest |W - L|. The authors' code lets the rank grow
    from 1 to 100, with all |W - L| above 0.01 in S, and takes the largest of S at the end.
    """
    if kernel.ndim > 2:
        return np.stack([sparse_part(one, rank, scalars, steps) for one in kernel])
    kernel = kernel.astype(np.float64)
    if scalars > kernel.size:
        raise UserError(f"dsee takes {scalars} scalars of a matrix of {kernel.size}; fewer?")
    sparse = np.zeros_like(kernel)
    for _ in range(steps):
        u, s, v = np.linalg.svd(kernel - sparse, full_matrices=False)
        rest = kernel - (u[:, :rank] * s[:rank]) @ v[:rank]
        places = np.zeros(kernel.size, bool)
        places[np.argsort(-np.abs(rest), axis=None, kind="stable")[:scalars]] = True
        sparse = np.where(places.reshape(kernel.shape), rest, 0)
    return places.reshape(kernel.shape)
