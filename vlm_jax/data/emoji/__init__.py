"""The embedded data set: 1,644 emoji as seven vendors draw them, named in nine languages.

    vlm_jax.data.emoji.PREPARED       the prepared files, for tfds.builder_from_directory
    vlm_jax.data.emoji.concepts()     concept id -> name
    vlm_jax.data.emoji.builder.Emoji  the TFDS builder, from npm tarballs; build.py is its command

Records: `image` (64 x 64 on white), `style`, `concept` (id), `group`, `subgroup`, `name` and `keywords` (each by
language: en, de, fr, es, it, pt, ja, ko, zh). Names and keywords are Unicode CLDR's, through emojibase.

Splits, by the rules of splits.py:

    train            5,945   twemoji, fluent-emoji, fluent-emoji-flat, emojione, fxemoji
    unseen_style     1,503   noto
    near_style       1,044   noto-v1, noto's ancestor: a few pictures nearly equal noto's
    unseen_concepts    779   all seven styles of the 129 held-out concepts, which stand in no other split

fluent-emoji and fluent-emoji-flat are the same drawings with and without shading, and always in the same split. No
training picture has the pixels of a test picture. NOTICE lists the licences and what was left out.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

PREPARED = Path(__file__).parent / "prepared"


@functools.cache
def concept_table() -> tuple[dict, ...]:
    """Returns every concept, by id: dict(id, hexcode, group, subgroup, held_out, names: language -> name)."""
    return tuple(json.loads((PREPARED / "concepts.json").read_text(encoding="utf-8")))


def concepts(held_out: bool = False, groups=(3, 4, 5, 6, 7), language: str = "en") -> dict[int, str]:
    """Returns concept id -> name, for the held-out concepts or for all others.

    Args:
      held_out: whether to return the held-out concepts, all of which are in groups 3-7.
      groups: emojibase groups (3 animals & nature, 4 food & drink, 5 travel & places, 6 activities, 7 objects).
      language: the names'; one of en, de, fr, es, it, pt, ja, ko, zh.
    """
    return {
        row["id"]: row["names"][language]
        for row in concept_table()
        if row["held_out"] == held_out and row["group"] in groups
    }


def subgroups(groups=(3, 4, 5, 6, 7)) -> list[str]:
    """Returns the subgroups of the concepts in `groups`, in Unicode's order: "animal-mammal", "food-fruit", ..."""
    return list(dict.fromkeys(row["subgroup"] for row in concept_table() if row["group"] in groups))
