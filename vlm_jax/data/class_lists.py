"""Lists of class names (label -> name) and of prompts: packaged, or in files.

`vlm_jax/data/zeroshot` holds names and prompts of the usual data sets; NOTICE in that folder names the sources.
"""

import functools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_jax import config
from vlm_jax.data.source import is_number
from vlm_jax.errors import UserError, near

PACKAGED = pathlib.Path(__file__).parent / "zeroshot"


@functools.cache
def packaged(kind: str) -> dict[str, list[str]]:
    """The package's "classes", "templates" or "wordnet_ids": data set -> names in the labels' order, or prompts."""
    return json.loads((PACKAGED / f"{kind}.json").read_text(encoding="utf-8"))


def read(classes: str | Sequence[str] | Mapping[int, str]) -> dict[int | str, str]:
    """Returns label -> name.

    Args:
      classes: the name of a data set in `vlm_jax/data/zeroshot/classes.json` ("imagenet", "cifar10", ...);
        "emoji:seen" or "emoji:held_out" (the embedded data set's concepts of groups 3-7); "emoji:subgroups" (the 49
        kinds of concepts, by the field `subgroup`); a .txt file (the first line names label 0); a .json file (a list in
        the same order, an object from labels to names, or one from names to numbers); a list or a mapping.

    Raises:
      UserError: the file cannot be read, a name is missing, or a label has two names.
    """
    if isinstance(classes, str) and classes.startswith("emoji:"):
        return _emoji(classes)
    if isinstance(classes, str) and classes in packaged("classes"):
        return dict(enumerate(packaged("classes")[classes]))
    names = _file(classes, "classes", "`emoji:seen`") if isinstance(classes, str) else classes
    if not isinstance(names, Mapping | Sequence) or isinstance(names, str):
        raise UserError(f"classes {classes!r:.60} are not a list of names or a mapping from labels to names")
    pairs = list(names.items() if isinstance(names, Mapping) else enumerate(names))
    if pairs and all(isinstance(label, str) and type(name) is int for label, name in pairs):
        pairs = [(number, name) for name, number in pairs]
    pairs = [(int(label) if is_number(str(label)) else label, name) for label, name in pairs]
    if not pairs or not all(isinstance(name, str) and name.strip() for _, name in pairs):
        raise UserError(f"classes {classes!r:.60} are not a list of names or a mapping from labels to names")
    named: dict[int | str, str] = {}
    for label, name in pairs:
        if named.setdefault(label, name) != name:
            raise UserError(f"classes {classes!r:.60}: the label {label} has two names, `{named[label]}` and `{name}`")
    return named


def read_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns prompts; `{}` stands for the name.

    Args:
      templates: one prompt or several; or a name in `vlm_jax/data/zeroshot/templates.json` ("imagenet80",
        "imagenet7", "cifar10", ...); or a .txt or .json file with a list.
    """
    several = [templates] if isinstance(templates, str) else list(templates)
    if len(several) == 1 and isinstance(several[0], str) and "{}" not in several[0]:
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


def _emoji(classes: str) -> dict[int | str, str]:
    from vlm_jax.data import emoji

    part = classes.removeprefix("emoji:")
    known = {
        "seen": lambda: emoji.concepts(held_out=False),
        "held_out": lambda: emoji.concepts(held_out=True),
        "subgroups": lambda: {name: name.replace("-", " ") for name in emoji.subgroups()},
    }
    return config.choose(known, part, "the part of the emoji data set")()


def _file(path: str, kind: str, beside: str) -> Any:
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        hint = near(path, packaged(kind), f"expected {options(kind, beside)}")
        raise UserError(f"there is no file of {kind} {path}, and no packaged {kind} of that name; {hint}")
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        return _lines(path, text, kind) if path.endswith(".txt") else json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from None
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{path} is neither a .txt file of names nor JSON: {e}") from None
    except RecursionError:
        raise UserError(f"{path} is no list of {kind}: its JSON is nested too deeply") from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def _lines(path: str, text: str, kind: str) -> list[str]:
    """The lines of a .txt file; an empty line among classes would shift the labels after it, and is an error."""
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if kind == "classes" and "" in lines[:-1]:
        where = f"{path}: line {lines.index('') + 1} is empty"
        raise UserError(f"{where}, and line 1 names label 0, line 2 label 1, and so on; fill it or delete it")
    return [line for line in lines if line]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    if twice := [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]:
        raise ValueError(f"the key `{twice[0]}` is there twice")
    return dict(pairs)


def options(kind: str, beside: str) -> str:
    """Returns what a list of `kind` may be, for a message."""
    return f"a .txt or .json file, {beside}, or one of {', '.join(packaged(kind))}"
