"""Zero-shot classification: the class whose name in prompts fits a picture best.

Two towers choose the nearest embedding (arXiv:2103.00020, section 3.1), captioners the likeliest text
(arXiv:2306.07915, section 4.3).
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.data.sources import open_source
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.attacks import Attack
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import evenly_spaced
from vlm_jax.pretrained import attention_maps, class_embeddings
from vlm_jax.pretrained.similarity import similarity

NAMED = 5  # best names kept for each picture
MIXED_UP = 24  # confusions kept
EMBEDDED = 300  # pictures whose embedding is kept
COMPARED = 10  # of these pictures, compared with each other's names
LOOKED_AT = 6  # pictures with a map of the attention, if there is a gallery
PROMPTS = 2048  # embedded between two saves of the progress


@method(
    family="evaluators",
    paper="arXiv:2103.00020",
    where="section 3.1",
    differs="class names in prompts; the nearest one, or a captioner's likeliest",
)
def zeroshot(
    *,
    uri: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str | None = None,
    templates: str | Sequence[str] = ("{}",),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
    memory_share: float = 0.25,
    attack: Mapping[str, float] | None = None,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `top1`, `top5` (left out below six classes), `mean_per_class`, `examples`, `left_out`, and `ties`, pictures
    whose class has the score of another; where scores are equal, a share is its expected value over their random
    orders. Notes: classes without pictures, labels that are no class, names of several labels. Artifacts: the
    predictions with their confidence (the probability that `Pretrained.classify` gives), confusions, a gallery; and of
    some pictures the embeddings, their names' embeddings, the similarities and maps of the image tower's attention.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      classes: the names to choose among, see `classes.read`; defaults to the data set's own names. Pictures with
        another label are left out and counted.
      label: the record's field with the label; `labels.Classes` says which class it means. Defaults to the first field
        of `classes.LABELS` that the data set has.
      templates: prompts, `{}` stands for the name; or the name of packaged prompts, see `classes.read_templates`.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      gallery: number of pictures to show with their best names, evenly spaced over the split.
      memory_share: share of the free memory for the rows of the pictures (74 bytes each); more rows go to a file.
      attack: changes each picture to mislead the model first, {"radius": 1.0, "steps": 10}, see `attacks.Attack`: the
        metrics are then the robust accuracy (arXiv:2212.07016).
    """
    about = f"data set `{uri}`, split `{split}`" if split else f"data set `{uri}`"
    if label is None or classes is None:
        source = open_source(uri, split)
        label = label or class_names.find_label(source, about)
    named = Classes(class_names.of_source(source, label, about) if classes is None else class_names.read(classes))
    names = named.names
    templates = class_names.read_templates(templates)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        prepare = ops or pretrained.preprocess
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(prepare, label),
            batch_size=batch_size, memory=limit,
        )  # fmt: skip
        pretrained = data.pretrained
        look = data.look(named, label)
        asked = [list(named.named.items()), templates, *([] if attack is None else [sorted(attack.items())])]
        prompts_sha256 = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        data.begin("examples", "embeddings", "classes", classes_and_templates=prompts_sha256)
        head = getattr(pretrained, "head", None) is not None
        by_pairs = head or getattr(pretrained, "compares_pairs", False)
        scale = 1.0 if by_pairs else math.exp(float(pretrained.params["logit_scale"]))
        text = None if by_pairs else _text_embeddings(data, names, templates)
        worst = None if attack is None else Attack(pretrained, text, dict(attack))
        chosen = evenly_spaced(data.num_examples, EMBEDDED)

        def rows(batch: Batch) -> Mapping[str, Columns]:
            position, labels = batch.position, np.array(batch.about)
            if by_pairs:
                logits = pretrained.class_logits(batch.inputs, names, None if head else templates)[batch.kept]
                return {"examples": {"position": position, **_ranked(logits, labels, scale)}}
            inputs = worst(batch.inputs, batch.spread(batch.about, -1)) if worst else batch.inputs
            embedded = pretrained.embed_image_batch(inputs)[batch.kept]
            if not data.first:  # only the first host has the classes' embeddings
                return {}
            few = np.isin(position, chosen)
            return {
                "examples": {"position": position, **_ranked(similarity(embedded, text), labels, scale)},
                "embeddings": {"position": position[few], "truth": labels[few], "embedding": embedded[few]},
            }

        def finish(tables: Mapping[str, Table]) -> Result:
            result = _result(tables["examples"], named, data.thumbnails, gallery, lambda: data.left_out(label, look))
            if len(tables["embeddings"]):
                pictures = data.thumbnails if gallery else None
                result.artifacts.update(_embedded(tables["embeddings"], names, text, pictures))
            return result

        data.check_any(data.run(rows, about=lambda fields: look(fields[0])), label, named, look)
        result = data.result(finish, "left_out")
        if maps := _maps(data, prepare, names, gallery):
            result.artifacts["attention"] = maps
        return result

    return evaluate


def _text_embeddings(data: Pass, names: list[str], templates: list[str]) -> np.ndarray | None:
    """The classes' embeddings, float64 [C, D] or float32 [C, T, D]; None on all hosts but the first."""
    step = max(PROMPTS // len(templates), 1)
    for start in range(data.counts.get("classes", 0), len(names), step):
        embedded = class_embeddings(data.pretrained.embed_texts, names[start : start + step], templates)
        data.append({"classes": {"embedding": embedded}}, classes=start + len(embedded))
    if not data.first:
        return None
    text = data.tables["classes"].read("embedding")
    return text.astype(np.float64) if text.ndim == 2 else text  # cast once, not with every batch


def _ranked(logits: np.ndarray, truth: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """The row of each picture: its class, the class's rank, the best names and their scores, the class's score, and
    the probability of the best name."""
    best, scores = metrics.top_k(lambda i, c: logits[i, c], *logits.shape, NAMED)
    rank, tied, _ = metrics.truth_ranks(logits, truth)
    own = np.take_along_axis(logits, truth[:, None], axis=1)[:, 0]
    below = scale * (logits - scores[:, :1]).astype(np.float64)
    confidence = (1 / np.exp(below).sum(axis=1)).astype(np.float32)
    best = best.astype(np.int32)
    ranks = {"rank": rank, "tied": tied}
    return {"truth": truth, **ranks, "best": best, "scores": scores, "own": own, "confidence": confidence}


def _result(
    examples: Table, classes: Classes, pictures: Callable, gallery: int, left_out: Callable[[], Counter]
) -> Result:  # fmt: skip
    names, labels, best, scores = classes.names, *map(examples.read, ("truth", "best", "scores"))
    ranks = metrics.Ranks(examples.read("rank"), examples.read("tied"), ~np.isnan(examples.read("own")))
    numbers, per_class, intervals = named_right(ranks, labels, len(names))

    position = examples.read("position")
    margins = scores[:, 0] - examples.read("own")
    worst = metrics.confusions(best[:, 0], labels, margins)[:MIXED_UP]
    confusions = [(names[true], names[wrong], count) for true, wrong, count in worst]
    predictions = {"position": position, "label": labels, "predicted": best[:, 0], "rank_of_label": ranks.above}
    predictions |= {"ties_of_label": ranks.tied, "confidence": examples.read("confidence")}
    artifacts = {"classes": names, "per_class": per_class, "confusions": confusions, "predictions": predictions}
    artifacts["classes_without_picture"] = classes.without_picture(labels)
    first = dict(zip(*np.unique(labels, return_index=True), strict=True))
    if mixed_up := {names[i]: first[i] for pair in worst for i in pair[:2] if i in first}:
        artifacts["class_pictures"] = {"names": list(mixed_up), "images": pictures(position[list(mixed_up.values())])}
    if gallery:
        shown = evenly_spaced(len(labels), gallery)
        artifacts["gallery"] = {
            "images": pictures(position[shown]),
            "truth": [names[i] for i in labels[shown]],
            "names": [[names[i] for i in row] for row in best[shown]],
            "scores": scores[shown],
        }
    return Result(numbers, artifacts, intervals, [*classes.notes(labels, left_out), *ties(ranks, "pictures")])


def named_right(
    ranks: metrics.Ranks, labels: np.ndarray, classes: int
) -> tuple[dict[str, float], np.ndarray, dict[str, tuple[float, float]]]:
    """Returns the metrics of pictures that are named, the accuracy of each class, and the intervals of the shares."""
    right = ranks.within(1)
    mean, per_class = metrics.mean_per_class_accuracy(right, labels, classes)
    shares = {"top1": right} | ({"top5": ranks.within(NAMED)} if classes > NAMED else {})
    numbers = {name: float(np.mean(share)) for name, share in shares.items()}
    numbers |= {"mean_per_class": mean, "examples": float(len(labels)), "ties": float(ranks.ties)}
    intervals = metrics.intervals(shares)
    intervals["mean_per_class"] = metrics.interval(right, weights=metrics.class_weights(labels))
    return numbers, per_class, intervals


def ties(ranks: metrics.Ranks, queries: str) -> list[str]:
    """Returns what a result says about equal scores."""
    if not ranks.ties:
        return []
    return [
        f"{ranks.ties:,} of {len(ranks.tied):,} {queries} have a wrong candidate with the score of the right one; each "
        "counts with its expected value over random orders"
    ]


def _embedded(embeddings: Table, names: list[str], text: np.ndarray, pictures: Callable | None) -> dict[str, Any]:
    """Some pictures and their names in one space; and a few, of different classes, compared with each other's names."""
    position, labels, image = map(embeddings.read, ("position", "truth", "embedding"))
    found = {}
    if image.ndim == 2:  # one vector for each, no tokens
        found["space"] = {"image": image, "text": text[labels].astype(np.float32), "names": [names[i] for i in labels]}
    if pictures is None:
        return found
    few = evenly_spaced(len(labels), COMPARED)
    few = few[np.sort(np.unique(labels[few], return_index=True)[1])]
    compared = {"images": pictures(position[few]), "texts": [names[i] for i in labels[few]]}
    return found | {"similarity": compared | {"scores": similarity(image[few], text[labels[few]])}}


def _maps(data: Pass, ops: str, names: list[str], gallery: int) -> dict[str, Any] | None:
    """Maps of the image tower's attention on some pictures; every host has to call this function."""
    examples, shown = data.tables["examples"], None
    if data.first:
        rows = evenly_spaced(len(examples), min(gallery, LOOKED_AT))
        shown = [examples.read(column)[rows].tolist() for column in ("position", "truth")]
    positions, labels = data.from_first(shown)
    if not positions or not attention_maps.has_patches(data.pretrained) or "pack_patches" in ops:
        return None
    look = lambda ops: np.stack([row["image"] for row in data.look_up(picture_ops(ops), positions)])
    drawn = attention_maps.whole_patches(data.pretrained, look(attention_maps.before_normalize(ops)))
    maps = attention_maps.attention_batch(data.pretrained, look(ops))
    return {"images": drawn, "maps": maps, "titles": [names[i] for i in labels]}
