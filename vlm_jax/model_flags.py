"""Flags that the commands on models share: what is loaded, on what data, and how their values are read."""

import ast
from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags

from vlm_jax.errors import UserError

# Those that become arguments of `vlm_jax.load`.
MODEL = ("preprocess", "tokenizer", "tokenize", "activation", "image_size", "resample", "dtype")


def given(values: flags.FlagValues, names: Sequence[str]) -> dict[str, Any]:
    """The flags among `names` that have a value, as Python values."""
    found = {}
    for name in names:
        value = values[name].value
        if value is not None:
            read, expected = READ.get(name, (lambda value: value, ""))
            try:
                found[name] = read(value)
            except (ValueError, SyntaxError):
                spelled = ",".join(value) if isinstance(value, list) else value
                raise UserError(f"--{name}={spelled:.60} cannot be read; expected {expected}") from None
    return found


def definers(values: flags.FlagValues) -> tuple:
    """Functions (name, help) that define a text, a repeatable text and a list, None by default."""
    kinds = (flags.DEFINE_string, flags.DEFINE_multi_string, flags.DEFINE_list)
    return tuple(partial(define, default=None, flag_values=values) for define in kinds)


def define_model_flags(values: flags.FlagValues) -> None:
    """Defines `model`, `MODEL`, and those of any data set: `data`, `split`, `where`, `label`, `classes`, ..."""
    text, several, listed = definers(values)
    text("model", help="What vlm_jax.load reads: a workdir, a folder, a file, hf:org/name")
    text("data", help="Data set: tfds:, wds:, jsonl:, csv:, folder:")
    text("split", help="The data set's split")
    several("where", help="Which records count: field=value,value; repeatable")
    flags.DEFINE_integer("batch_size", 256, "Pictures at a time over all devices", flag_values=values)
    text("classes", help="imagenet, emoji:seen, emoji:subgroups, a file, a list; by default the data set's own")
    several("templates", help="imagenet80, a file, a prompt with {}; repeatable")
    text("label", help="The field with the label")
    text("preprocess", help="Where the model's files do not tell: op string, or openai, siglip, ...")
    text("tokenizer", help="Where the model's files do not tell: clip, json:/path, ...")
    text("tokenize", help="Where the model's files do not tell: e.g. tokenize(77)")
    text("activation", help="Of bare CLIP weights: quick_gelu or gelu")
    listed("image_size", help="Another size than the model's: 384 or 384,288; needs --resample")
    text("resample", help="How learned positions get to it: linear, bicubic, bicubic_sharp")
    text("dtype", help="Compute dtype (float32)")


def _where(conditions: Sequence[str]) -> dict[str, list]:
    """["style=noto,twemoji", "group=3"] -> {"style": ["noto", "twemoji"], "group": [3]}."""
    where = {}
    for condition in conditions:
        name, values = condition.split("=", 1)
        where[name] = [int(value) if value.lstrip("-").isdecimal() else value for value in values.split(",")]
    return where


def _options(conditions: Sequence[str]) -> dict[str, Any]:
    """["shots=4", "kinds=['order']", "solver=lbfgs"] -> {"shots": 4, "kinds": ["order"], "solver": "lbfgs"}."""
    options = {}
    for name, value in (condition.split("=", 1) for condition in conditions):
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


READ = {
    "where": (_where, "field=value,value such as style=noto"),
    "train_where": (_where, "field=value,value such as style=noto"),
    "train_split": (lambda text: text or None, "a split, or nothing where the data set has none"),
    "option": (_options, "name=value such as shots=4"),
    "classes": (
        lambda text: ast.literal_eval(text) if text.startswith(("[", "{")) else text,
        "a name, a file, a list ['cat', 'dog'] or labels and names {7: 'cat', 3: 'dog'}",
    ),
    "ks": (lambda values: [int(value) for value in values], "whole numbers such as 1,5,10"),
    "image_size": (lambda sides: [int(side) for side in (sides * 2)[:2]], "pixels, 384 or height,width"),
    "mesh": (lambda parts: {axis: int(size) for axis, size in (part.split("=") for part in parts)}, "data=8,fsdp=1"),
}
