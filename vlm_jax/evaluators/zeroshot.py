"""Zero-shot classification: the class whose name, put into prompts, embeds nearest (arXiv:2103.00020, section 3.1), or
for captioners is the likeliest (arXiv:2306.07915, section 4.3)."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed, thumbnail  # noqa: F401 (registered as ops)
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import look_up, open_pass, stream
from vlm_jax.pretrained import attention_maps, class_embeddings
from vlm_jax.pretrained.similarity import similarity

NAMED = 5  # best names kept for each picture
MIXED_UP = 24  # confusions kept
EMBEDDED = 300  # pictures of which the embedding is kept
COMPARED = 10  # of those, each with the names of all
LOOKED_AT = 6  # pictures with a map of the attention, where there is a gallery
PROMPTS = 2048  # embedded between two looks at the clock


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
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result`.

    Metrics: `top1`, `top5` (left out below six classes), `mean_per_class`, `examples`, `left_out`. Artifacts: what was
    named and how surely (the probability that `Pretrained.classify` gives), confusions, a gallery, and of some pictures
    the embeddings, with those of their names, the similarities, and where the image tower looks.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      classes: the names to choose among, see `classes.read`; by default those that the data set itself has. Pictures
        with another label are left out and counted.
      label: the record's field with the label: a number of `classes`, or a class name; by default the first of
        `classes.LABELS` that there is.
      templates: prompts, `{}` stands for the name; or the name of packaged ones, see `classes.read_templates`.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
      gallery: how many pictures to show with their best names, evenly spaced over the split.
      memory_share: of the free memory, for what is kept of each picture (74 bytes); beyond it, a file.
    """
    about = f"data set `{uri}`, split `{split}`" if split else f"data set `{uri}`"
    if label is None or classes is None:
        source = open_source(uri, split)
        label = label or class_names.find_label(source, about)
    named = class_names.of_source(source, label, about) if classes is None else class_names.read(classes)
    names, index_of = list(named.values()), class_names.index_of(named)
    templates = class_names.read_templates(templates)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        progress = progress or Progress()
        string = f'decode | boxed("{label}", to="label") | {ops or pretrained.preprocess} | keep("image", "label")'
        pretrained, hosts, batches = open_pass(
            pretrained, uri=uri, split=split, where=where, ops=string, batch_size=batch_size
        )
        class_names.check_count(batches.examples.source, label, classes, about)
        prompts_sha256 = hashlib.sha256(json.dumps([list(named.items()), templates]).encode()).hexdigest()
        counts = progress.begin(
            examples=batches.num_examples, batch_size=hosts.batch_size, classes_and_templates=prompts_sha256
        )
        counts = {"classes": 0, "batches": 0, "examples": 0, "left_out": 0} | hosts.from_first(counts)
        table, examples = progress.table("classes", limit / 2), progress.table("examples", limit / 2)
        embeddings, chosen = progress.table("embeddings", limit / 2), evenly_spaced(batches.num_examples, EMBEDDED)
        by_pairs = getattr(pretrained, "compares_pairs", False)
        step = max(PROMPTS // len(templates), 1)
        for start in range(counts["classes"], 0 if by_pairs else len(names), step):
            embedded = class_embeddings(pretrained.embed_texts, names[start : start + step], templates)
            if hosts.first:
                table.append(embedding=embedded)
            progress.save(classes=start + len(embedded))
        scale = 1.0 if by_pairs else math.exp(float(pretrained.params["logit_scale"]))
        text = table.read("embedding") if hosts.first and not by_pairs else None
        if text is not None and text.ndim == 2:
            text = text.astype(np.float64)  # once

        some, left_out = counts["examples"], counts["left_out"]
        for batch in stream(batches, hosts, ["label"], counts["batches"], progress.show):
            truth = index_of(batch.columns["label"])
            among = batch.mask & (truth >= 0)
            some, left_out = some + int(among.sum()), left_out + int(batch.mask.sum() - among.sum())
            if among.any():
                if by_pairs:
                    logits = pretrained.class_logits(batch.image, names, templates)[among]
                else:
                    embedded = pretrained.embed_image_batch(batch.image)[among]
                    logits = similarity(embedded, text) if hosts.first else None
                if hosts.first:
                    position, labels = batch.position[among], truth[among]
                    examples.append(position=position, **_row(logits, labels, scale))
                    if not by_pairs:
                        few = np.isin(position, chosen)
                        embeddings.append(position=position[few], truth=labels[few], embedding=embedded[few])
            progress.save(batches=batch.done, examples=some, left_out=left_out)
        if not some:
            raise UserError(f"{about}: no picture's `{label}` is among the classes {', '.join(names):.60}")
        result = Result({}, {})
        if hosts.first:
            pictures = lambda positions: np.stack(
                [row["thumbnail"] for row in look_up(batches, 'decode | thumbnail | keep("thumbnail")', positions)]
            )
            result = _result(examples, names, pictures, gallery)
            if len(embeddings):
                result.artifacts.update(_embedded(embeddings, names, text, pictures if gallery else None))
        rows = evenly_spaced(some, min(gallery, LOOKED_AT))
        shown = [examples.read(column)[rows].tolist() for column in ("position", "truth")] if hosts.first else None
        if maps := _maps(pretrained, ops or pretrained.preprocess, batches, names, *hosts.from_first(shown)):
            result.artifacts["attention"] = maps
        numbers = result.metrics | {"left_out": float(left_out)}
        return result._replace(metrics=hosts.from_first(numbers))

    return evaluate


def _row(logits: np.ndarray, truth: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """What is kept of each picture: its class, that class's rank, the best names, their scores, the class's own score,
    and the probability of the best."""
    best, scores = metrics.top_k(lambda i, c: logits[i, c], *logits.shape, NAMED)
    ranks = metrics.truth_ranks(logits, truth)
    own = np.take_along_axis(logits, truth[:, None], axis=1)[:, 0]
    below = scale * (logits - scores[:, :1]).astype(np.float64)
    confidence = (1 / np.exp(below).sum(axis=1)).astype(np.float32)
    best = best.astype(np.int32)
    return {"truth": truth, "rank": ranks, "best": best, "scores": scores, "own": own, "confidence": confidence}


def _result(examples: Table, names: list[str], pictures: Callable, gallery: int) -> Result:
    labels, ranks, best, scores = map(examples.read, ("truth", "rank", "best", "scores"))
    mean, per_class = metrics.mean_per_class_accuracy(ranks == 0, labels, len(names))
    numbers = {"top1": float(np.mean(ranks == 0))}
    if len(names) > NAMED:
        numbers["top5"] = float(np.mean(ranks < NAMED))
    numbers |= {"mean_per_class": mean, "examples": float(len(labels))}

    position = examples.read("position")
    margins = scores[:, 0] - examples.read("own")
    worst = metrics.confusions(best[:, 0], labels, margins)[:MIXED_UP]
    confusions = [(names[true], names[wrong], count) for true, wrong, count in worst]
    predictions = {"position": position, "label": labels, "predicted": best[:, 0], "rank_of_label": ranks}
    predictions["confidence"] = examples.read("confidence")
    artifacts = {"classes": names, "per_class": per_class, "confusions": confusions, "predictions": predictions}
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
    return Result(numbers, artifacts)


def _embedded(embeddings: Table, names: list[str], text: np.ndarray, pictures: Callable | None) -> dict[str, Any]:
    """Some pictures in one space with their names, and a few of different classes, each with the names of all."""
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


def _maps(
    pretrained: Any, string: str, batches: Any, names: list[str], positions: list[int], labels: list[int]
) -> dict[str, Any] | None:
    """Where the image tower looks in some pictures; on several hosts each has to call this."""
    if not positions or not attention_maps.has_patches(pretrained) or "pack_patches" in string:
        return None
    look = lambda ops: np.stack([r["image"] for r in look_up(batches, f'decode | {ops} | keep("image")', positions)])
    drawn = attention_maps.whole_patches(pretrained, look(attention_maps.before_normalize(string)))
    maps = attention_maps.attention_batch(pretrained, look(string))
    return {"images": drawn, "maps": maps, "titles": [names[i] for i in labels]}


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """At most `count` of range(length), from the first to the last: a choice by rule, not by looks."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
