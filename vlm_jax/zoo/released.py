"""A recognised checkpoint: the description that loading, conversion and `convert --inspect` share."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from vlm_jax.errors import UserError
from vlm_jax.zoo import key_map
from vlm_jax.zoo.readers.tensors import Tensor
from vlm_jax.zoo.shapes import check_sizes, param_shapes

ANY = "any"  # as a pool: the caller reads parameters alone, for which pools do not matter
SIDES = ("image", "text", "encoder", "decoder")  # parts of a model section


@dataclasses.dataclass(frozen=True)
class Told:
    """What the user says of a file that does not tell it; see `vlm_jax.load`.

    `activation`, `pool` and `heads` are one value, or a dict of a value for "image" and for "text".
    """

    activation: Any = None
    pool: Any = None
    heads: Any = None
    weights: str | None = None

    def of(self, field: str, side: str) -> Any:
        """Returns the value of a field for a side, or None."""
        value = getattr(self, field)
        if isinstance(value, Mapping):
            if unknown := value.keys() - {"image", "text"}:
                raise UserError(f"{field}= has the key {min(map(str, unknown))!r:.40}; expected image or text")
            return value.get(side)
        return value

    def with_pool(self, side: str, pool: str) -> "Told":
        """Returns a copy whose pool of a side is `pool`, unless the user says another."""
        if self.of("pool", side) is not None:
            return self
        other = next(name for name in ("image", "text") if name != side)
        return dataclasses.replace(self, pool={side: pool, other: self.of("pool", other)})

    def ask_pool(self, side: str, choices: Sequence[str], why: str) -> str:
        """Returns the pool of a tower whose tensors fit all `choices`; raises a UserError that asks for it."""
        given = self.of("pool", side)
        if given is None:
            raise UserError(f"{why}; pass pool={' or pool='.join(map(repr, choices))}")
        if given == ANY:
            return choices[0]
        if given not in choices:
            raise UserError(f"pool= of the {side} tower is {given!r:.40}; expected one of: {', '.join(choices)}")
        return given


NOTHING = Told()


@dataclasses.dataclass(frozen=True)
class Released:
    """A recognised checkpoint, whose tensors are not read yet.

    Attributes:
      format: name of the format.
      path: the file of the tensors.
      tensors: name -> `tensors.Tensor`.
      model: config section of our model, for `models.build`.
      entries: the key table.
      ignored: patterns of tensors that no parameter uses.
      preprocess, tokenizer, tokenize: as in a training config; None where the files do not tell.
      hints: for each of these that is None, advice on the argument of `load`.
      licence: from the model card, or None.
      run: the config of a workdir of `vlm_jax.train`, or None.
    """

    format: str
    path: Path
    tensors: Mapping[str, Tensor]
    model: dict[str, Any]
    entries: Sequence[key_map.Entry]
    ignored: Sequence[str] = ()
    preprocess: str | None = None
    tokenizer: str | None = None
    tokenize: str | None = None
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    licence: str | None = None
    run: dict[str, Any] | None = None

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Parameter name -> shape of the model."""
        check_sizes(self.model)
        table = next(
            (self.tensors.get(entry.theirs) for entry in self.entries if entry.ours == "image/pos_embed"), None
        )
        rows = math.prod(table.shape[:-1]) if table is not None else None
        return param_shapes(self.model, rows)

    def with_image_size(self, size: tuple[int, int]) -> "Released":
        """Returns a copy for pictures of (height, width), if the checkpoint has no size of its own.

        Raises:
          UserError: the checkpoint has a size, no image tower, or positions for another number of patches.
        """
        image = self.model.get("image")
        own = image and image.get("image_size")
        if own or not image:
            raise UserError(f"{self.path} has {f'the image_size {own}' if image else 'no image tower'}")
        rows = self.shapes.get("image/pos_embed")
        patches = (size[0] // image["patch"]) * (size[1] // image["patch"])
        if rows is not None and rows.shape[1] - image.get("cls_position", False) != patches:
            raise UserError(f"{self.path} has {rows.shape[1]} positions; image_size {size} gives {patches} patches")
        return dataclasses.replace(self, model={**self.model, "image": {**image, "image_size": size}})

    def match(self) -> dict[str, list[key_map.Entry]]:
        """Returns parameter name -> entries; raises a UserError if parameters or tensors are left over."""
        try:
            shapes = self.shapes
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self.path} ({self.format}): no model can have its settings: {error}") from error
        return key_map.match(self.entries, shapes, self.tensors, self.ignored, f"{self.path} ({self.format})")


def scanned(section: dict) -> dict:
    """Sets the blocks to one scan, which compiles in a fraction of the time."""
    for side in SIDES:
        if section.get(side) and section[side].get("depth", 1) > 1:
            section[side]["scan"] = True
    return section


def of_texts(section: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the section of the text tower or the decoder, or None."""
    return section.get("text") or section.get("decoder")
