"""Builds an objective from its config section."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax import catalogue, config
from vlm_jax.errors import UserError
from vlm_jax.objectives.term import WHERE, Objective, Teacher, Term
from vlm_jax.params import schedules


def build(
    section: Mapping[str, Any],
    model: Any,
    *,
    steps: Callable[[int | str], int] | None = None,
    tokenizer: Any = None,
    load: Callable[[str], Any] | None = None,
) -> Objective:
    """Returns the objective of a config section.

    Section keys, of several terms:
      terms: {name: options of the term}; the term is the option `name`, which defaults to the name here. Besides the
        term's own options:
        weight: a number (1.0), or dict(value=2.0, begin="80%", end="100%", **schedule): see `schedules.window`.
        on: the row set; defaults to the term's own. Of a term with selections: the set that these read.
        reaches: regex of the parameters that the term's gradient may move; defaults to all.
      selections: {row set: options}; the method, of the family "selections", is the option `name`, which defaults to
        the name here. `on` is the row set that the selection reads.
      teachers: {name: dict(decay=0.999, of="image/.*", refresh=..., anchor=...) or dict(spec="runs/clip", inputs=...,
        stored=...)}: see `Teacher`.
      combine: what happens to the terms' gradients instead of their sum, a method of the family "combinations".

    In a section of one term, the term's `name` and options stand in the place of `terms`.

    Args:
      section: as above.
      model: linen module.
      steps: duration -> number of steps; needed for weights that change.
      tokenizer: the run's, for terms that read texts.
      load: spec -> `Pretrained`, for teachers with a `spec`.

    Raises:
      UserError: a name is unknown, a term does not take a key, or a weight is always 0.
    """
    section = dict(section)
    if "terms" not in section:
        whole = {key: section.pop(key) for key in ("selections", "teachers", "combine") if key in section}
        section = {"terms": {section.get("name"): section}, **whole}
    return config.call(_build, section, WHERE, model=model, steps=steps, tokenizer=tokenizer, load=load)


def _build(*, terms, model, steps, tokenizer, load, selections=None, teachers=None, combine=None) -> Objective:
    weights: dict[str, Any] = {}  # equal weights are one function: these terms are computed together
    parts, made, known = [], [], {}
    for name, options in (selections or {}).items():
        options = {"name": name, **options}
        changes = {"name": name} | ({"on": options.pop("on")} if "on" in options else {})
        selection = catalogue.build("selections", options, f"{WHERE}.selections.{name}", model=model)
        made.append(dataclasses.replace(selection, **changes))
    for name, options in terms.items():
        where = WHERE if name == options.get("name") and len(terms) == 1 else f"{WHERE}.terms.{name}"
        options = {"name": name, **options}
        weight, on, reaches = (options.pop(key, None) for key in ("weight", "on", "reaches"))
        part = catalogue.build("terms", options, where, model=model)
        found = (part,) if isinstance(part, Term) else part.terms
        if not isinstance(part, Term):
            inner = {selection.name for selection in part.selections}
            moved = lambda user, on=on, inner=inner: user if user.on in inner else dataclasses.replace(user, on=on)
            made += part.selections if on is None else map(moved, part.selections)
            found = found if on is None else tuple(map(moved, found))
            known |= part.teachers
            on = None
        if weight is not None:
            weight = weights.setdefault(repr(weight), schedules.window(weight, steps, f"{where}.weight"))
        if on is not None and any(len(term.sets) > 1 for term in found):
            raise UserError(f"{where}.on is `{on}`, but the term reads several row sets; leave it out")
        changes = {"on": on, "reaches": reaches}
        for term in found:
            given = {key: value for key, value in changes.items() if value is not None}
            given["name"] = name if len(found) == 1 else f"{name}_{term.name}"
            given["weight"] = term.weight if weight is None else _product(term.weight, weight)
            parts.append(dataclasses.replace(term, **given))
    known |= teachers_of(teachers, load)
    combine = combine and catalogue.build("combinations", combine, f"{WHERE}.combine")
    return Objective(tuple(parts), tuple(made), known, combine, tokenizer)


def teachers_of(section: Mapping[str, Any] | None, load: Callable[[str], Any] | None) -> dict[str, Teacher]:
    """Returns the teachers of a config's `objective.teachers`; `load` as for `build`."""
    where = f"{WHERE}.teachers"
    return {name: config.call(_teacher, own, f"{where}.{name}", load=load) for name, own in (section or {}).items()}


def _product(own: float, weight: float | Callable) -> float | Callable:
    if not callable(weight):
        return own * weight
    return weight if own == 1.0 else lambda step: own * weight(step)


def _teacher(
    *,
    load,
    decay: float | None = None,
    of: str | None = None,
    spec: str | None = None,
    inputs=None,
    stored: bool = False,
    refresh: bool = False,
    anchor: str | None = None,
) -> Teacher:
    if (decay is None) == (spec is None):
        raise UserError(f"a teacher of {WHERE} is an average, `decay=0.999`, or a checkpoint, `spec=...`: give one")
    if decay is not None and not 0 <= decay <= 1:
        raise UserError(f"the decay of a teacher of {WHERE} is {decay}; expected 0 to 1, such as 0.999")
    if spec is None and stored:
        raise UserError(f"a teacher of {WHERE} is `stored` and an average, which changes; give a `spec`")
    if spec is None:
        return Teacher(decay, inputs=dict(inputs or {}), of=of or ".*", refresh=refresh, anchor=anchor)
    for key, given in (("of", of), ("refresh", refresh or None), ("anchor", anchor)):
        if given is not None:
            raise UserError(
                f"a teacher of {WHERE} has `{key}`, `{given}`, and `spec`: all parameters of a checkpoint are its own"
            )
    if stored:
        return Teacher(spec=spec, stored=True)
    loaded = load(spec)
    return Teacher(spec=spec, model=loaded.model, params=loaded.params, inputs=dict(inputs or {}))
