"""The contract of objectives: a weighted sum of terms over row sets.

A row set is a dict of arrays with one leading axis: a source of the batch, or what a selection made of another set. The
model runs once on each set, on the outputs that the set's terms ask for. A term has features, row by row, and then a
cheap loss over all rows:

    def features(outputs, ctx):
        return {"image": outputs["image_embedding"], "text": outputs["text_embedding"]}

    def loss(outputs, features, rows, ctx):
        logits = outputs["scale"] * features["image"] @ features["text"].T
        return cross_entropy(logits), {"scale": outputs["scale"]}

    Objective((Term("contrastive", features, loss),))
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from vlm_jax.errors import UserError

WHERE = "config.objective"


class Context(NamedTuple):
    """What else a term or a selection may read.

    Attributes:
      step: int scalar, the number of steps before this one.
      train: whether the parameters train; False in evaluation.
      rng: a `jax.random.key` for this user at this step; None in features, which draw from `outputs.keys`.
      state: the term's memory; None in features, and for terms without `init`.
      tokenizer: the run's tokenizer, or None.
    """

    step: Any
    train: bool
    rng: Any = None
    state: Any = None
    tokenizer: Any = None

    def special(self, pad_id: int | None = None, end_id: int | None = None) -> tuple[int, int | None]:
        """Returns (id of padding, id of the end token) of the tokenizer; without one, what is given, or (0, None).

        Raises:
          UserError: an option says otherwise than the tokenizer.
        """
        if self.tokenizer is None:
            return (0 if pad_id is None else pad_id), end_id
        own = self.tokenizer.pad_id, self.tokenizer.eos_id
        for name, given, has in (("pad_id", pad_id, own[0]), ("end_id", end_id, own[1])):
            if given is not None and given != has:
                raise UserError(
                    f"{WHERE} has {name}={given}, tokenizer `{self.tokenizer.spec}` {has}; leave {name} out"
                )
        return own


@dataclasses.dataclass(frozen=True)
class Term:
    """A loss.

    Attributes:
      name: of its metrics ("<name>/loss", ...) and of its own parameters ("objective/<name>/...").
      features: `features(outputs, ctx) -> tree`, the set's rows as the leading axis of all leaves; row i depends on row
        i alone. A mapping {row set: such a function} couples several sets. See `Outputs`.
      loss: `loss(outputs, features, rows, ctx) -> (scalar, metrics)`, once over all rows. `outputs` has parameters and
        no rows. For several sets, `features` and `rows` are dicts by set.
      on: the row set.
      weight: a number, or a function of the step. Where the function is 0, nothing of the term is computed.
      reaches: regex of whole parameter names: no gradient of the term flows to other parameters.
      init: for a memory (a queue, a centre): `init(features) -> state`. Only shapes and dtypes of the features count.
      update: `update(state, features, ctx) -> state`, after the optimizer.
    """

    name: str
    features: Callable | Mapping[str, Callable]
    loss: Callable
    on: str = "batch"
    weight: float | Callable = 1.0
    reaches: str = ".*"
    init: Callable | None = None
    update: Callable | None = None

    @property
    def sets(self) -> tuple[str, ...]:
        return tuple(self.features) if isinstance(self.features, Mapping) else (self.on,)

    def features_of(self, name: str) -> Callable:
        """Returns the function that makes the features of one row set."""
        return self.features[name] if isinstance(self.features, Mapping) else self.features

    def seen(self, by_set: Mapping[str, Any]) -> Any:
        """Returns what the loss gets of something that exists for each row set."""
        return {name: by_set[name] for name in self.sets} if isinstance(self.features, Mapping) else by_set[self.on]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Makes a row set of another one: mined pairs, chosen rows, sampled texts. No gradient flows through the choice.

    Attributes:
      name: of the row set.
      features: `features(outputs, ctx) -> dict of arrays`, as for a term.
      select: `select(features, rows, ctx) -> {key: array | Row | Feature}`, over all rows, of static shapes. Random
        draws of more than a row belong here.
      on: the row set that it reads.
      groups: number of equal parts of the rows; `select` runs on each part alone, and look-ups stay in their part.
        With a multiple of the devices that split the batch, no row travels.
    """

    name: str
    features: Callable
    select: Callable
    on: str = "batch"
    groups: int = 1

    @property
    def sets(self) -> tuple[str, ...]:
        return (self.on,)

    def features_of(self, name: str) -> Callable:
        return self.features


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """A look-up: entries `index` [P] of a key of the rows that a selection reads, e.g. pictures to encode again."""

    key: str = dataclasses.field(metadata=dict(static=True))
    index: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Feature:
    """A look-up: entries `index` [P] of a key of the selection's own features. Gradient flows back to them."""

    key: str = dataclasses.field(metadata=dict(static=True))
    index: jax.Array


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Other parameters that see the same rows, without gradient and without dropout.

    Attributes:
      decay: d of the average d * average + (1 - d) * parameters that follows the run's own parameters after each step,
        a number or a function of the step. 1.0 keeps the initial parameters. Not for a teacher with a `spec`.
      spec: a checkpoint, as for `vlm_jax.load`: frozen, read at every start, not saved with the run.
      stored: what the teacher says stands in the rows, as "<teacher>/<output>" (`config.data.reinforced`); the
        checkpoint is not read.
      model, params: of the checkpoint.
      inputs: {"image": "teacher_image"}: rows that the teacher reads in the place of the model's.
      of: regex of whole parameter names that are averaged; all others are the run's own. Not with a `spec`.
      refresh: whether the teacher begins every stage of the run as the model is then. With decay 1.0, the teacher is
        the model at the end of the stage before. Not with a `spec`.
      anchor: name of another average; this one follows the mean of the parameters and of the anchor's (CTP,
        arXiv:2308.07146). Not with a `spec`.
    """

    decay: float | Callable | None = None
    spec: str | None = None
    stored: bool = False
    model: Any = None
    params: Any = dataclasses.field(default=None, repr=False)
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of: str = ".*"
    refresh: bool = False
    anchor: str | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """A weighted sum of terms.

    Attributes:
      terms: with different names.
      selections: in an order in which each reads a source or an earlier selection.
      teachers: by name.
      combine: `combine({term: its weighted gradients}, params) -> gradients`: projection, surgery. Each term then has a
        backward pass of its own. None: the sum.
      tokenizer: for `Context`.
    """

    terms: tuple[Term, ...]
    selections: tuple[Selection, ...] = ()
    teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
    combine: Callable | None = None
    tokenizer: Any = None

    def __post_init__(self):
        names = [user.name for user in self.users]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{WHERE}: two terms or selections are called `{name}`; rename one")
        for i, selection in enumerate(self.selections):
            if selection.on in {later.name for later in self.selections[i:]}:
                raise UserError(
                    f"{WHERE}: the selection `{selection.name}` reads `{selection.on}`, which is made later"
                )
        for name, teacher in self.teachers.items():
            anchor = self.teachers.get(teacher.anchor)
            follows = anchor and anchor is not teacher and (anchor.spec, anchor.of) == (None, teacher.of)
            if teacher.anchor and not follows:
                raise UserError(
                    f"{WHERE}.teachers.{name}: the anchor `{teacher.anchor}` is not another average with `of` "
                    f"`{teacher.of}`; the teachers: {', '.join(self.teachers)}"
                )
        for term in self.terms:
            if not callable(term.weight) and term.weight == 0:
                raise UserError(f"{WHERE}: the weight of `{term.name}` is 0 at every step; leave the term out")

    @property
    def users(self) -> tuple[Term | Selection, ...]:
        """All that has features."""
        return (*self.terms, *self.selections)

    @property
    def made(self) -> dict[str, Selection]:
        """The selections by the row set that they make."""
        return {selection.name: selection for selection in self.selections}

    @property
    def sets(self) -> tuple[str, ...]:
        """The row sets, in an order in which they can be encoded: sources first."""
        used = [name for user in self.users for name in user.sets]
        return tuple(dict.fromkeys([*(name for name in used if name not in self.made), *self.made]))

    def users_of(self, name: str) -> list[Term | Selection]:
        return [user for user in self.users if name in user.sets]

    def schedules_of(self, user: Term | Selection) -> tuple[Callable, ...] | None:
        """Returns the weights of which one must differ from 0 for the user to be computed; None: always."""
        if isinstance(user, Term):
            return (user.weight,) if callable(user.weight) else None
        behind = [self.schedules_of(other) for other in self.users_of(user.name)]
        return None if None in behind else tuple(dict.fromkeys(itertools.chain(*behind)))


def model_inputs(batch: Mapping[str, Any], model: Any = None) -> tuple[Any, ...]:
    """Returns what initialises a model, from the rows of all sources: the model's `inputs`, or a picture and a text.

    For a model that reads texts instead of pictures: (input texts, texts). None for a tower that the model lacks.
    """
    rows = {key: array for part in row_sets(batch).values() for key, array in part.items()}
    given = "image" if "image" in rows or "input_ids" not in rows else "input_ids"
    keys = getattr(model, "inputs", (given, "token_ids"))
    lacks = {key for key, side in (("image", "image"), ("token_ids", "text")) if getattr(model, side, key) is None}
    for key in keys:
        if key not in rows and key not in lacks:
            raise UserError(f"{WHERE}: the batch lacks `{key}`, it has: {', '.join(rows)}; see config.data.ops")
    return tuple(None if key in lacks else rows[key] for key in keys)


def row_sets(batch: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns {source: rows} of a batch, which is that already, or the rows of the source "batch"."""
    nested = batch and all(isinstance(rows, Mapping) for rows in batch.values())
    return dict(batch) if nested else {"batch": batch}
