"""The figures of one evaluation, drawn from its artifacts."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.report.figures.calibration import calibration
from vlm_jax.report.figures.classes import confusion_map, confusion_matrix, confusions, gallery
from vlm_jax.report.figures.pairs import retrieval, similarity
from vlm_jax.report.figures.patches import maps
from vlm_jax.report.figures.space import embedding_space
from vlm_jax.report.figures.style import Picture

NUMBERED, MAPPED = 30, 2000  # classes in a confusion matrix with numbers, in one without


class Shown(NamedTuple):
    """A figure of a report.

    Attributes:
      kind: a word, for the file's name.
      heading: the figure's title.
      about: how to read the figure.
      picture: the figure.
    """

    kind: str
    heading: str
    about: str
    picture: Picture


def pictures_of(artifacts: Mapping[str, Any]) -> Iterator[Shown]:
    """Draws all figures for which an evaluation's artifacts (of `report.load_artifacts`) suffice."""

    def given(group, *names):
        """artifacts["group/name"] of each name; None if one is missing or not finite (the model diverged)."""
        keys = [f"{group}/{name}" for name in names]
        if not artifacts.keys() >= set(keys):
            return None
        found = [artifacts[key] for key in keys]
        numbers = (array for array in found if isinstance(array, np.ndarray) and array.dtype.kind == "f")
        return found if all(np.isfinite(array).all() for array in numbers) else None

    if found := given("gallery", "images", "names", "scores", "truth"):
        about = (
            "Pictures at even distances through the split, each with its best names or what was written, and their "
            "scores. A tick marks the right name; where it is missing, it stands below after a cross."
        )
        heading = "What pictures find" if "found/queries" in artifacts else "Best names"
        yield Shown("gallery", heading, about, gallery(*found))
    if found := given("attention", "images", "maps", "titles"):
        about = (
            "Pictures at even distances as the model sees them, and how much its output looks at each patch: weights "
            "of the attention that pools patches, or of the cls token, or else of all blocks, rolled out."
        )
        yield Shown("attention", "Where it looks", about, maps(*found))
    if found := given("found", "queries", "images", "scores", "right"):
        about = "Texts at even distances, each with the pictures nearest to it; a frame and a tick mark the text's own."
        yield Shown("found", "What texts find", about, retrieval(*found))
    if found := given("similarity", "images", "texts", "scores"):
        about = (
            "The cosine of some pictures with their own texts and each other's; the right ones are on the diagonal. A "
            "frame marks each picture's nearest text."
        )
        yield Shown("similarity", "Pictures and texts", about, similarity(*found))
    if artifacts.get("confusions"):
        about = (
            "Left the right class, right what it was taken for, each with the split's first picture of the class. The "
            "most frequent first, among equals the surest."
        )
        pairs = confusions(artifacts["confusions"], *(given("class_pictures", "names", "images") or ()))
        yield Shown("confusions", "Worst confusions", about, pairs)
    found = given("predictions", "label", "predicted") if "classes" in artifacts else None
    if found and np.bincount(found[0]).max() > 1:  # with one picture a class, the pairs above are clearer
        count = len(np.union1d(*found))
        about = (
            f"{'All classes' if count <= NUMBERED else 'The classes of the most frequent mistakes'}: rows are what is "
            "right, columns what was said. The number counts pictures, the shade is its share of the row."
        )
        most = NUMBERED if count <= NUMBERED else 20
        yield Shown("matrix", "Confusion matrix", about, confusion_matrix(*found, artifacts["classes"], most))
        if NUMBERED < count <= MAPPED:
            about = (
                "All classes in their order; dots beside the diagonal are mistakes. The table below has the numbers."
            )
            yield Shown("map", "The whole matrix", about, confusion_map(*found, artifacts["classes"]))
    if found := given("predictions", "confidence", "label", "predicted"):
        confidence, label, predicted = found
        about = (
            "Of pictures named about as surely, the share that is named right. Bars on the diagonal say that the "
            "probability of the best name can be taken at its word."
        )
        yield Shown("calibration", "Calibration", about, calibration(confidence, label == predicted))
    if found := given("space", "image", "text", "names"):
        about = (
            "Some pictures and their own texts, joined by lines, in the plane in which they differ most (principal "
            "components of both together). The gap is the distance between the two means in the whole space."
        )
        yield Shown("space", "The space of both", about, embedding_space(*found))
