"""The classes of a zero-shot task (label -> name), and its prompts.

`vlm_jax/data/zeroshot` holds names and prompts of the usual data sets; NOTICE in that folder names the sources.
"""

import difflib
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax import config
from vlm_jax.data.source import BadExample, field
from vlm_jax.errors import UserError

PACKAGED = pathlib.Path(__file__).parents[1] / "data" / "zeroshot"
LABELS = ("label", "cls", "concept")  # of TFDS and folders, of webdatasets, of the embedded data set


@functools.cache
def packaged(kind: str) -> dict[str, list[str]]:
    """The package's "classes" or "templates": data set -> names in the order of the labels, or prompts."""
    return json.loads((PACKAGED / f"{kind}.json").read_text(encoding="utf-8"))


def read(classes: str | Sequence[str] | Mapping[int, str]) -> dict[int | str, str]:
    """Returns label -> name.

    Args:
      classes: the name of a data set in `vlm_jax/data/zeroshot/classes.json` ("imagenet", "cifar10", ...);
        "emoji:seen" or "emoji:held_out" (the embedded data set's concepts of groups 3-7); "emoji:subgroups" (the 49
        kinds of concepts, by the field `subgroup`); a .txt file (line i names label i); a .json file (a list in the
        same order, or an object from labels to names); a list or a mapping.
    """
    if isinstance(classes, str) and classes.startswith("emoji:"):
        return _emoji(classes)
    if isinstance(classes, str) and classes in packaged("classes"):
        return dict(enumerate(packaged("classes")[classes]))
    names = _file(classes, "classes", "`emoji:seen`") if isinstance(classes, str) else classes
    if isinstance(names, Mapping):
        named = {int(label) if str(label).isdecimal() else label: name for label, name in names.items()}
    else:
        named = dict(enumerate(names))
    if not named or not all(isinstance(name, str) and name.strip() for name in named.values()):
        raise UserError(f"classes {classes!r:.60} are not a list of names or a mapping from labels to names")
    return named


def read_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns prompts; `{}` stands for the name.

    Args:
      templates: one prompt or several; or a name in `vlm_jax/data/zeroshot/templates.json` ("imagenet80",
        "imagenet7", "cifar10", ...); or a .txt or .json file with a list.
    """
    several = [templates] if isinstance(templates, str) else list(templates)
    if len(several) == 1 and "{}" not in several[0]:
        if several[0] in packaged("templates"):
            return packaged("templates")[several[0]]
        if several[0].endswith((".txt", ".json")) or " " not in several[0]:
            several = _file(several[0], "templates", "a prompt such as `a photo of a {}.`")
    if not isinstance(several, list) or not several:
        raise UserError(f"templates {templates!r:.60} are not a list of prompts")
    for template in several:
        if not isinstance(template, str) or "{}" not in template:
            raise UserError(f"template `{template}` has no `{{}}` for the class name")
    return several


def of_source(source: Any, label: str, about: str) -> dict[int, str]:
    """Returns label -> name from the data set itself: a folder's sub-folders, a TFDS ClassLabel.

    Underscores become spaces. Raises a UserError if there are no names, or only numbers or WordNet ids.
    """
    names = _own_names(source, label)
    if not names or all(re.fullmatch(r"\d+|n\d{8}", name) for name in names):
        what = f"has for its `{label}` no names but `{names[0]}`, ..." if names else f"has no names for its `{label}`"
        raise UserError(f"{about} {what}; give --classes: {_options('classes', '`emoji:seen`')}")
    return dict(enumerate(name.replace("_", " ") for name in names))


def check_count(source: Any, label: str, classes: Any, about: str) -> None:
    """Raises a UserError if the number of packaged classes differs from the data set's own number."""
    own = _own_names(source, label)
    if own and isinstance(classes, str) and len(own) != len(packaged("classes").get(classes, own)):
        raise UserError(
            f"{about} has {len(own)} classes ({own[0]}, ...), `{classes}` has {len(packaged('classes')[classes])}; "
            "give the names of these labels, a .json file {label: name}, or leave --classes out"
        )


def find_label(source: Any, about: str) -> str:
    """Returns the first of LABELS that the source's first record has."""
    record = source[0]
    for label in LABELS:
        try:
            field(record, label)
            return label
        except BadExample:
            continue
    raise UserError(f"{about} has no field {' or '.join(LABELS)}; give --label, one of: {', '.join(record)}")


def index_of(named: Mapping[int | str, str]) -> Callable[[Sequence[int | str]], int | None]:
    """Returns a function from a label to the index of the label's class.

    A label is a number or a name, in a list of one (see `ops.boxed`). The function returns None for an unknown label.
    """
    index = {name: i for i, name in enumerate(named.values())} | {label: i for i, label in enumerate(named)}
    return lambda fields: index.get(fields[0])


def indices(records: Sequence[Sequence[int | str] | None], named: Mapping[int | str, str]) -> np.ndarray:
    """The class indices of many labels, int [N]; -1 for an unknown label and for a record without a label."""
    index = index_of(named)
    found = (None if record is None else index(record) for record in records)
    return np.array([-1 if i is None else i for i in found], np.int64)


def _own_names(source: Any, label: str) -> list[str]:
    features = getattr(source, "features", {})
    if label == "label" and hasattr(source, "classes"):
        return source.classes
    return list(getattr(features[label], "names", ())) if label in features else []


def _emoji(classes: str) -> dict[int | str, str]:
    from vlm_jax.data import emoji

    part = classes.removeprefix("emoji:")
    known = {
        "seen": lambda: emoji.concepts(held_out=False),
        "held_out": lambda: emoji.concepts(held_out=True),
        "subgroups": lambda: {name: name.replace("-", " ") for name in emoji.subgroups()},
    }
    return config.choose(known, part, "the part of the emoji data set")()


def _file(path: str, kind: str, beside: str) -> Sequence[str] | Mapping[str, str]:
    if not pathlib.Path(path).is_file():
        close = difflib.get_close_matches(path, packaged(kind), n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"expected {_options(kind, beside)}"
        raise UserError(f"there is no file of {kind} {path}, and no packaged {kind} of that name; {hint}")
    text = pathlib.Path(path).read_text(encoding="utf-8")
    if path.endswith(".txt"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is neither a .txt file of names nor JSON: {e}") from e


def _options(kind: str, beside: str) -> str:
    return f"a .txt or .json file, {beside}, or one of {', '.join(packaged(kind))}"
