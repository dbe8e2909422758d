"""The split of a picture: by rule, so that the splits mean something and never change.

A concept of groups 3-7 is held out if the sha256 of its hexcode is among the smallest 15 %.

`unseen_concepts`  every style's pictures of the held-out concepts
`unseen_style`     the noto pictures of all other concepts
`near_style`       the noto-v1 pictures of all other concepts: noto's own ancestor, too close to train on
`train`            the remaining styles' pictures of all other concepts
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

HELD_OUT_GROUPS = (3, 4, 5, 6, 7)
HELD_OUT_SHARE = 0.15
TRAIN_STYLES = ("twemoji", "fluent-emoji", "fluent-emoji-flat", "emojione", "fxemoji")
STYLE_SPLITS = {"noto": "unseen_style", "noto-v1": "near_style"}
SPLITS = ("train", "unseen_style", "unseen_concepts", "near_style")


def held_out(hexcodes: Iterable[str]) -> set[str]:
    """Returns the held-out hexcodes among `hexcodes`, those of groups 3-7."""
    ranked = sorted(hexcodes, key=lambda hexcode: hashlib.sha256(hexcode.encode()).hexdigest())
    return set(ranked[: round(HELD_OUT_SHARE * len(ranked))])


def split_of(style: str, concept_held_out: bool) -> str:
    """Returns the split of a picture, from its style and whether its concept is held out."""
    return "unseen_concepts" if concept_held_out else STYLE_SPLITS.get(style, "train")
