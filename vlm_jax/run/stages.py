"""Stages: a run that changes on its way, such as small pictures first (CLIPA, arXiv:2305.07017).

    stages=(
        dict(share="80%", preprocess="decode | resize(112) | normalize", model=dict(image=dict(image_size=112)), ...),
        dict(share="20%"),  # as the config says
    )

A stage is the config with changes, which stand in the places that they have in the config. Schedules, seeds, batch
numbers and the optimizer's state go on from stage to stage. Terms that a stage adds begin as in a new run, and their
teachers as the model is then (SigLIP 2, arXiv:2502.14786, section 2.3). Teachers with `refresh` begin every stage so.

    dict(share="20%", data=..., merge=dict(teacher="before", alpha=0.5))

At the end of such a stage the parameters become (1 - alpha) of the teacher's and alpha of the stage's own: with a
teacher `dict(decay=1.0, refresh=True)`, of the model before the stage (FoMo-in-Flux, arXiv:2408.14471).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlm_jax import config
from vlm_jax.config import choose
from vlm_jax.errors import UserError, near
from vlm_jax.models import positions
from vlm_jax.params import averages, sharding
from vlm_jax.params.table import map_with_name, named_leaves

WHERE = "config.stages"
CHANGES = ("accumulate", "data", "model", "objective", "optimizer", "preprocess", "tokenize")
POSITIONS = "image/pos_embed"
OF_TERMS = re.compile(r"(params|ema|opt_state/.*)/objective/.*|objective_state/.*")
TEACHERS = re.compile(r"objective_state/teachers/([^/]+)/")


class Merge(NamedTuple):
    """What becomes of the parameters at the end of a stage: (1 - alpha) the teacher's + alpha the stage's own."""

    teacher: str
    alpha: float


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A part of a run.

    Attributes:
      number: from 1.
      first, last: its steps are first + 1 to last.
      settings: the config with the stage's changes, without `stages`.
      resample: how learned positions become those of this stage, a key of `positions.RESAMPLING`.
      merge: what becomes of the parameters at the end of the stage, or None: they stay.
    """

    number: int
    first: int
    last: int
    settings: dict[str, Any]
    resample: str = "linear"
    merge: Merge | None = None


def read(settings: Mapping[str, Any], total: int) -> list[Stage]:
    """Returns the stages of a config that takes `total` steps; a config without stages is one.

    Raises:
      UserError: shares that are not 100 % together, a stage without steps, or a change that no stage can make.
    """
    sections = settings.get("stages")
    if not sections:
        return [Stage(1, 0, total, dict(settings))]
    found, percent, first = [], 0.0, 0
    for number, section in enumerate(sections, 1):
        share = re.fullmatch(r"(\d+(?:\.\d+)?)%", str(section.get("share")))
        if not share:
            raise UserError(f"{WHERE}: stage {number} has share={section.get('share')!r}; expected a share such as 80%")
        percent += float(share[1])
        last = round(total * percent / 100)
        if last <= first:
            raise UserError(f"{WHERE}: stage {number} has no step: {share[0]} of {total}")
        resample = section.get("resample", "linear")
        choose(positions.RESAMPLING, resample, f"{WHERE}: resample")
        found.append(Stage(number, first, last, changed(settings, number), resample, _merge(section, number)))
        first = last
    if not math.isclose(percent, 100):
        raise UserError(f"{WHERE}: the shares are {percent:g}% together; expected 100%")
    return found


def _merge(section: Mapping[str, Any], number: int) -> Merge | None:
    if section.get("merge") is None:
        return None
    where = f"{WHERE}: merge of stage {number}"
    merge = config.call(Merge, section["merge"], where)
    if not 0 < merge.alpha <= 1:
        raise UserError(f"{where}: alpha is {merge.alpha}, the share of the stage's own parameters; expected 0 to 1")
    return merge


def changed(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the config of stage `number`, from 1."""
    section = settings["stages"][number - 1]
    for key in section.keys() - {"share", "resample", "merge"}:
        if key not in CHANGES:
            hint = near(key, CHANGES, f"it can change {', '.join(CHANGES)}")
            raise UserError(f"{WHERE}: stage {number} cannot change `{key}`; {hint}")
    changes = {key: section[key] for key in CHANGES if key in section}
    return _merged({key: value for key, value in settings.items() if key != "stages"}, changes)


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def saved_by(stages: Sequence[Stage], step: int) -> Stage:
    """Returns the stage that a checkpoint of this step is of; the last step of a stage is its own."""
    return next(stage for stage in stages if step <= stage.last)


def left(stages: Sequence[Stage], step: int) -> list[Stage]:
    """Returns the stages with steps after `step`; the last stage if there are none."""
    return [stage for stage in stages if stage.last > step] or [stages[-1]]


def check(before: Any, into: Any, stage: Stage) -> None:
    """Raises a UserError if a state cannot become that of a stage: only positions may change, and terms come and go.

    Args:
      before, into: abstract `TrainState`s, of the stage before and of the new one.
      stage: the new one.
    """
    shapes = [{name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()} for tree in (before, into)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        old, new = (side.get(name, "absent") for side in shapes)
        of_term = "absent" in (old, new) and OF_TERMS.fullmatch(name)
        if old != new and not name.endswith(POSITIONS) and not of_term:
            raise UserError(
                f"{WHERE}: stage {stage.number} changes `{name}`, {old} before, {new} in this stage; only positions of "
                "pictures may change, and terms may come and go: declare the model's parameters in all stages"
            )
    teachers = {match[1] for match in map(TEACHERS.match, shapes[1]) if match}
    if stage.merge and stage.merge.teacher not in teachers:
        raise UserError(
            f"{WHERE}: stage {stage.number} merges with the teacher `{stage.merge.teacher}`, which is no average in "
            f"this stage; config.objective.teachers has: {', '.join(sorted(teachers)) or 'none'}"
        )


def merged(state: Any, stage: Stage) -> Any:
    """Returns a `TrainState` at the end of a stage: parameters and their average, merged if the stage says so."""
    if stage.merge is None:
        return state

    def mixed(tree, teacher):
        own, others = named_leaves(tree), named_leaves(teacher)
        between = averages.wise_ft(others, {name: own[name] for name in others}, stage.merge.alpha)
        return map_with_name(lambda name, leaf: between.get(name, leaf), tree)

    trees = {key: tree for key in ("params", "ema") if (tree := getattr(state, key)) is not None}
    where = {key: jax.tree.map(lambda leaf: leaf.sharding, tree) for key, tree in trees.items()}
    mix = jax.jit(lambda trees, teacher: {k: mixed(tree, teacher) for k, tree in trees.items()}, out_shardings=where)
    return state.replace(**mix(trees, state.objective_state["teachers"][stage.merge.teacher]))


def carried(
    state: Any, into: Any, stage: Stage, begin: Callable[[], Any] | None = None, refreshed: Collection[str] = ()
) -> Any:
    """Returns the state at the beginning of a stage; learned positions of the picture are resampled everywhere.

    Moments are resampled linearly: other methods could make a second moment negative.

    Args:
      state: a `TrainState`, at the end of the stage before.
      into: the stage's abstract state, with shardings, see `check`.
      stage: the new one.
      begin: the state of a new run, for what terms of the stage add; only this is computed.
      refreshed: names of the teachers that begin as the model is now.
    """
    leaves, targets = named_leaves(state), named_leaves(into)
    begins = lambda name: name not in leaves or ((match := TEACHERS.match(name)) and match[1] in refreshed)
    own = {name: leaves.get(TEACHERS.sub("params/", name)) for name in targets if begins(name)}
    leaves |= {name: jnp.copy(leaf) for name, leaf in own.items() if leaf is not None}  # teachers begin as the model
    new = {name: targets[name].sharding for name, leaf in own.items() if leaf is None}
    if new:
        pick = lambda tree: {name: leaf for name, leaf in named_leaves(tree).items() if name in new}
        leaves |= jax.jit(lambda: pick(begin()), out_shardings=new)()

    def place(name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        leaf = leaves[name]
        if leaf.shape == target.shape:
            return leaf
        method = "linear" if name.startswith("opt_state/") else stage.resample
        whole = jax.device_put(leaf, sharding.replicated(target.sharding.mesh))
        table = positions.to_rows(whole, target.shape[1], method).astype(target.dtype)
        return jax.make_array_from_callback(target.shape, target.sharding, lambda index: table[index])

    return map_with_name(place, into)
