"""`scenes:`: example i is a function of (options, split, i), for any i."""

from __future__ import annotations

import dataclasses
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from vlm_jax import catalogue
from vlm_jax.data.emoji.splits import STYLE_SPLITS, TRAIN_STYLES
from vlm_jax.data.scenes import edits, foils, texts
from vlm_jax.data.scenes.scene import SPLITS, Options, Scene, draw_scene
from vlm_jax.data.source import Source
from vlm_jax.errors import UserError

VERSION = 1  # of the scenes: another number, other pictures
EXAMPLES = {"train": 1_000_000}  # by split; 10,000 elsewhere


def _number(text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(text)
    return int(text)


def _size(text: str) -> dict[str, int]:
    width, height = (text, text) if "x" not in text else text.split("x")
    return dict(width=_number(width, 32, 512), height=_number(height, 32, 512))


def _objects(text: str) -> dict[str, tuple[int, int]]:
    fewest, most = (text, text) if "-" not in text else text.split("-")
    most = _number(most, 1, 6)
    return dict(objects=(_number(fewest, 1, most), most))


def _background(text: str) -> dict[str, str]:
    if text not in ("plain", "textured", "any"):
        raise ValueError(text)
    return dict(background=text)


STYLES = (*TRAIN_STYLES, *STYLE_SPLITS)
# Name -> (text -> fields of Options, or `examples`; raises ValueError), and what it expects.
OPTIONS: dict[str, tuple[Callable[[str], dict[str, Any]], str]] = {
    "size": (_size, "64 (a square) or 96x64 (width x height), each side 32 to 512"),
    "objects": (_objects, "1-4, within 1-6"),
    "background": (_background, "plain, textured or any"),
    "styles": (lambda text: dict(styles=tuple(text.split(","))), f"some of {', '.join(STYLES)}"),
    "examples": (lambda text: dict(examples=_number(text, 1, 2**62)), "the number of examples"),
    "seed": (lambda text: dict(seed=_number(text, 0, 2**62)), "a whole number"),
}


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """Returns COCO's uncompressed run lengths of bool [h, w]: columns first, beginning with False; int32."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat != np.concatenate(([False], flat[:-1])))
    return np.diff(np.concatenate(([0], edges, [mask.size]))).astype(np.int32)


def mask_of(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns bool [height, width] of run lengths."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def objects(scene: Scene) -> dict[str, Any]:
    """Returns a column each: name, concept, attributes, box (x0, y0, x1, y1) int32 [objects, 4], mask (run lengths)."""
    looks = [scene.looks[o.group] for o in scene.objects]
    return {
        "name": [look.thing.name for look in looks],
        "concept": np.array([look.thing.concept for look in looks], np.int32),
        "attributes": [list(look.attributes) for look in looks],
        "box": np.array(scene.boxes, np.int32),
        "mask": [run_lengths(mask) for mask in scene.masks],
    }


def relations(scene: Scene) -> dict[str, Any]:
    """Returns a column each: subject, relation, object; subject and object are indices into `objects`."""
    rows = scene.relations
    of = lambda i: np.array([row[i] for row in rows], np.int32)
    return {"subject": of(0), "relation": [name for _, name, _ in rows], "object": of(2)}


def counts(scene: Scene) -> dict[str, int]:
    """Returns name -> number of objects."""
    return {look.thing.name: n for look, n in zip(scene.looks, scene.counts, strict=True)}


def concept(scene: Scene) -> int:
    """Returns a number below 0, equal for scenes of equal things; the emoji's concepts are not below 0."""
    shown = sorted(f"{n} {texts.described(look)}" for look, n in zip(scene.looks, scene.counts, strict=True))
    return -1 - (zlib.crc32("; ".join(shown).encode()) >> 1)


def regions(scene: Scene) -> dict[str, Any]:
    """Returns phrases that mean one object each: `text`, `object` (its index), `box`."""
    single = texts.singles(scene)
    described = [texts.described(scene.looks[scene.objects[i].group]) for i in single]
    boxes = np.array([scene.boxes[i] for i in single], np.int32).reshape(-1, 4)
    return {"text": [f"the {words}" for words in described], "object": np.array(single, np.int32), "box": boxes}


FIELDS: dict[str, Callable[[Scene], Any]] = {
    "image": lambda scene: scene.image,
    "style": lambda scene: scene.style,
    "concept": concept,
    "objects": objects,
    "relations": relations,
    "counts": counts,
    "caption": texts.caption,
    "sub_captions": texts.sub_captions,
    "long_caption": texts.long_caption,
    "names": texts.names,
    "tags": texts.tags,
    "regions": regions,
    "foils": foils.foils,
    "questions": foils.questions,
    "edit": edits.edit,
    "minimal_pair": edits.minimal_pair,
    "unseen": lambda scene: scene.unseen,
}


@dataclasses.dataclass(frozen=True)
class Scenes(Source):
    """`scenes:[?size=64&objects=1-4&background=any&styles=...&examples=...&seed=0]`, with a split of SPLITS.

    Attributes:
      options: of every scene.
      split: "train", "unseen_style", "unseen_concepts" or "unseen_pairs".
      examples: the number of examples; any index below it costs the same.
      fields: what a record has.
    """

    options: Options
    split: str
    examples: int
    fields: tuple[str, ...] = tuple(FIELDS)

    @classmethod
    def open(cls, path: str, split: str | None) -> Self:
        """Opens the source of a URI without its scheme; raises UserError for options that it does not have."""
        uri, split = f"scenes:{path}", split or "train"
        if split not in SPLITS:
            raise UserError(f"data source `{uri}` has no split `{split}`; it has {', '.join(SPLITS)}")
        before, _, query = path.partition("?")
        if before:
            raise UserError(f"data source `{uri}`: options stand behind a question mark, `scenes:?size=64`")
        parsed: dict[str, Any] = {"examples": EXAMPLES.get(split, 10_000)}
        for name, text in urllib.parse.parse_qsl(query, keep_blank_values=True):
            if name not in OPTIONS:
                raise UserError(catalogue.unknown(f"data source `{uri}` has no option `{name}`", name, OPTIONS))
            parse, expected = OPTIONS[name]
            try:
                parsed |= parse(text)
            except ValueError:
                raise UserError(f"data source `{uri}`: `{name}={text}`; expected {expected}") from None
        examples, options = parsed.pop("examples"), Options(**parsed)
        _check_styles(uri, options.styles, split)
        return cls(options, split, examples)

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.examples:
            raise IndexError(f"{self.key(i)} is beyond {self.examples} examples")
        scene = draw_scene(self.options, self.split, int(i))
        return {name: FIELDS[name](scene) for name in self.fields}

    def key(self, i: int) -> str:
        return f"scenes:{self.split}[{i}]"

    def fingerprint(self) -> str:
        return f"{VERSION}/{self.split}/{self.examples}/{self.options}"

    def narrow(self, paths: frozenset[str]) -> Self:
        wanted = {path.split("/")[0] for path in paths}
        return dataclasses.replace(self, fields=tuple(name for name in FIELDS if name in wanted))


def _check_styles(uri: str, styles: tuple[str, ...], split: str) -> None:
    for style in styles:
        if style not in STYLES:
            raise UserError(
                catalogue.unknown(f"data source `{uri}` has no style `{style}`", style, dict.fromkeys(STYLES))
            )
        if split in ("train", "unseen_pairs") and style not in TRAIN_STYLES:
            raise UserError(f"data source `{uri}`: the split `{split}` has no style `{style}`, which is kept for tests")
        if split == "unseen_style" and style in TRAIN_STYLES:
            raise UserError(f"data source `{uri}`: the style `{style}` is a training style, not an unseen one")
