"""The concepts and their words: emojibase's base emoji, in reading order.

A concept is one emoji of emojibase-data without skin tone, outside the groups "component" and "flags". Its id is its
rank in emojibase's order, so ids are stable as long as the pinned version is.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "ja", "ko", "zh")
LEFT_OUT_GROUPS = ("component", "flags")


@dataclasses.dataclass(frozen=True)
class Concept:
    """One emoji.

    Attributes:
      id: rank in emojibase's order, from 0.
      hexcode: code points, upper-case hex joined by "-", without the variation selector FE0F.
      group: emojibase's group number (3 animals & nature, 4 food & drink, 5 travel & places, 6 activities, 7 objects).
      subgroup: emojibase's name of the subgroup, such as "animal-mammal".
      names: language -> CLDR short name.
      keywords: language -> CLDR keywords.
      slugs: squeezed English names that packs may use, best first: label, Unicode name, shortcodes.
    """

    id: int
    hexcode: str
    group: int
    subgroup: str
    names: dict[str, str]
    keywords: dict[str, list[str]]
    slugs: tuple[str, ...]


def squeeze(name: str) -> str:
    """Returns the letters and digits of a name, as lower-case ASCII: "Men’s room" -> "mensroom"."""
    text = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode().replace("&", "and")
    return re.sub("[^a-z0-9]", "", text)


def strip_fe0f(hexcode: str) -> str:
    """Returns a hexcode without variation selectors: "2764-fe0f" -> "2764"."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def read_concepts(emojibase: dict[str, object]) -> list[Concept]:
    """Returns the concepts, from files of the emojibase-data package (path in the package -> parsed JSON)."""
    groups = emojibase["meta/groups.json"]
    left_out = {int(number) for number, name in groups["groups"].items() if name in LEFT_OUT_GROUPS}
    by_language = {
        language: {row["hexcode"]: row for row in emojibase[f"{language}/data.json"]} for language in LANGUAGES
    }
    rows = [row for row in emojibase["en/data.json"] if row.get("group") is not None and row["group"] not in left_out]
    rows.sort(key=lambda row: row["order"])

    def slugs(row) -> tuple[str, ...]:
        hexcode = row["hexcode"]
        names = [row["label"], emojibase["meta/unicode-names.json"].get(hexcode, "")]
        for dialect in ("cldr", "emojibase"):
            codes = emojibase[f"en/shortcodes/{dialect}.json"].get(hexcode, [])
            names += [codes] if isinstance(codes, str) else codes
        return tuple(dict.fromkeys(slug for slug in map(squeeze, names) if slug))

    return [
        Concept(
            id=i,
            hexcode=strip_fe0f(row["hexcode"]),
            group=row["group"],
            subgroup=groups["subgroups"][str(row["subgroup"])],
            names={language: words[row["hexcode"]]["label"] for language, words in by_language.items()},
            keywords={language: words[row["hexcode"]].get("tags", []) for language, words in by_language.items()},
            slugs=slugs(row),
        )
        for i, row in enumerate(rows)
    ]


FILES = (
    "meta/groups.json",
    "meta/unicode-names.json",
    "en/shortcodes/cldr.json",
    "en/shortcodes/emojibase.json",
    *(f"{language}/data.json" for language in LANGUAGES),
)
