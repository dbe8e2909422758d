"""The TFDS builder: from pinned npm tarballs to ArrayRecord, without TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from vlm_jax.data.emoji import names, packs, render, splits


@dataclasses.dataclass(frozen=True)
class Picture:
    """One style's drawing of one concept."""

    style: str
    icon: str
    concept: names.Concept
    pixels: np.ndarray
    alpha: np.ndarray


@dataclasses.dataclass(frozen=True)
class Collected:
    """The contents of the tarballs.

    Attributes:
      concepts: all concepts, by id.
      held_out: hexcodes of the held-out concepts.
      pictures: the pictures kept, by concept, then in the order of the packs.
      left_out: the pictures left out, with the reason.
      unmatched: style -> icons that show no concept (skin tones, flags, retired names).
    """

    concepts: list[names.Concept]
    held_out: set[str]
    pictures: list[Picture]
    left_out: list[tuple[Picture, str]]
    unmatched: dict[str, int]


@functools.cache
def collect(directory: Path, words: packs.Tarball, pack_tarballs: tuple[packs.Tarball, ...]) -> Collected:
    """Reads, matches and renders all pictures (two minutes); cached, because builder and command both call this."""
    concepts = names.read_concepts(packs.read_json(directory, words, names.FILES))
    held_out = splits.held_out(c.hexcode for c in concepts if c.group in splits.HELD_OUT_GROUPS)
    pictures, unmatched = [], {}
    for tarball in pack_tarballs:
        pack = packs.read_json(directory, tarball, ("icons.json", "chars.json"))
        found = packs.match(pack, concepts, packs.CORRECTIONS.get(tarball.style, {}))
        unmatched[tarball.style] = len(set(pack["icons.json"]["icons"]) - set(found.values()))
        for concept, icon in sorted(found.items()):
            svg = packs.svg(pack, icon)
            drawn = render.render(svg), render.transparency(svg)
            pictures.append(Picture(tarball.style, icon, concepts[concept], *drawn))
    reasons = render.left_out([(p.style, p.concept.id, p.pixels) for p in pictures], tuple(splits.STYLE_SPLITS))
    pictures.sort(key=lambda picture: picture.concept.id)
    key = lambda picture: (picture.style, picture.concept.id)
    return Collected(
        concepts=concepts,
        held_out=held_out,
        pictures=[p for p in pictures if key(p) not in reasons],
        left_out=[(p, reasons[key(p)]) for p in pictures if key(p) in reasons],
        unmatched=unmatched,
    )


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Emoji of seven vendors with CLDR names and keywords in nine languages."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The tarballs of `npm pack`; `python -m vlm_jax.data.emoji.build` fetches them."

    def __init__(self, *, words: packs.Tarball = packs.WORDS, pack_tarballs=packs.PACKS, **kwargs):
        self._tarballs = words, tuple(pack_tarballs)
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description="Emoji of seven vendors at 64 px on white, with CLDR names and keywords in nine languages.",
            homepage="https://icon-sets.iconify.design/?category=Emoji",
            license="Apache-2.0, CC-BY-4.0 and MIT, by style; see NOTICE",
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(render.SIDE, render.SIDE, 3)),
                    "style": text(),
                    "concept": np.int32,
                    "group": np.int32,
                    "subgroup": text(),
                    "name": {language: text() for language in names.LANGUAGES},
                    "keywords": {language: tfds.features.Sequence(text()) for language in names.LANGUAGES},
                }
            ),
        )

    def _split_generators(self, dl_manager):
        collected = collect(Path(dl_manager.manual_dir), *self._tarballs)
        return {split: self._generate_examples(collected, split) for split in splits.SPLITS}

    def _generate_examples(self, collected: Collected, split: str):
        for i, picture in enumerate(collected.pictures):
            concept = picture.concept
            if splits.split_of(picture.style, concept.hexcode in collected.held_out) != split:
                continue
            yield (
                i,
                {
                    "image": render.encode(picture.pixels),
                    "style": picture.style,
                    "concept": concept.id,
                    "group": concept.group,
                    "subgroup": concept.subgroup,
                    "name": concept.names,
                    "keywords": concept.keywords,
                },
            )
