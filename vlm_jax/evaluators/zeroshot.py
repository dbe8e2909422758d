"""Zero-shot classification: the class whose name, put into prompts, embeds nearest (arXiv:2103.00020, section 3.1)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import loader
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed, thumbnail  # noqa: F401 (registered as ops)
from vlm_jax.evaluators.result import Result

NAMED = 5  # best names kept for each picture
MIXED_UP = 24  # confusions kept


def class_embeddings(
    embed_texts: Callable[[list[str]], np.ndarray], names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns unit-norm class embeddings, float32 [C, D]: the normalised mean of the names' normalised prompts.

    Args:
      embed_texts: texts -> float [n, D].
      names: C class names.
      templates: prompts; `{}` stands for the name.
    """
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template `{template}` has no `{{}}` for the class name")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    embeddings = np.asarray(embed_texts(prompts), np.float32).reshape(len(names), len(templates), -1)
    return _unit(_unit(embeddings).mean(axis=1))


def zeroshot(
    *,
    uri: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str],
    label: str = "concept",
    templates: str | Sequence[str] = ("{}",),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None) -> Result`.

    Metrics: `top1`, `top5` (left out below six classes), `mean_per_class`, `examples`, `left_out`.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      classes: the names to choose among, see `classes.read`. Pictures with another label are left out and counted.
      label: the record's field with the label: a number of `classes`, or a class name.
      templates: prompts, `{}` stands for the name.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
      gallery: how many pictures to show with their best names, evenly spaced over the split.
    """
    named = class_names.read(classes)
    names, index_of = list(named.values()), class_names.index_of(named)
    templates = [templates] if isinstance(templates, str) else list(templates)

    def evaluate(pretrained: Any, mesh: Any = None) -> Result:
        del mesh  # the model knows where it runs
        text = class_embeddings(pretrained.embed_texts, names, templates)
        string = ["decode", "thumbnail", f'boxed("{label}", to="label")', ops or pretrained.preprocess]
        batches = loader.eval_batches(
            uri=uri,
            split=split,
            where=where,
            batch_size=batch_size,
            tokenizer=pretrained.tokenizer,
            ops=" | ".join([*string, 'keep("image", "label", "thumbnail")']),
        )
        columns, left_out = [], 0
        shown, pictures = EvenlySpaced(gallery), {}
        for batch in batches:
            truth = index_of(batch["label"])
            among = batch["mask"] & (truth >= 0)
            left_out += int(batch["mask"].sum() - among.sum())
            if not among.any():
                continue
            logits = (pretrained.embed_image_batch(batch["image"]) @ text.T)[among]
            truth, thumbnails = truth[among], batch["thumbnail"][among]
            order = np.argsort(-logits, axis=1, kind="stable")[:, :NAMED]
            top, own = (np.take_along_axis(logits, index, axis=1) for index in (order, truth[:, None]))
            columns.append((truth, metrics.truth_ranks(logits, truth), order[:, 0], top[:, 0] - own[:, 0]))
            shown.add(zip(thumbnails, truth, order, top, strict=True))
            for i, picture in zip(truth.tolist(), thumbnails, strict=True):
                pictures.setdefault(i, picture)
        if not columns:
            raise UserError(f"{uri} {split or ''}: no picture's `{label}` is among the classes {classes!r:.60}")
        labels, ranks, predicted, margins = map(np.concatenate, zip(*columns, strict=True))
        mean, per_class = metrics.mean_per_class_accuracy(ranks == 0, labels, len(names))
        numbers = {"top1": float(np.mean(ranks == 0))}
        if len(names) > NAMED:
            numbers["top5"] = float(np.mean(ranks < NAMED))
        numbers |= {"mean_per_class": mean, "examples": float(len(labels)), "left_out": float(left_out)}
        worst = metrics.confusions(predicted, labels, margins)[:MIXED_UP]
        confusions = [(names[true], names[wrong], count) for true, wrong, count in worst]
        artifacts = {"classes": names, "per_class": per_class, "confusions": confusions}
        mixed_up = {names[i]: pictures[i] for pair in worst for i in pair[:2] if i in pictures}
        if mixed_up:
            artifacts["class_pictures"] = {"names": list(mixed_up), "images": np.stack(list(mixed_up.values()))}
        if shown.items():
            artifacts["gallery"] = _gallery(shown.items(), names)
        return Result(numbers, artifacts)

    return evaluate


class EvenlySpaced:
    """Keeps `count` items of a stream of unknown length at even distances: a choice by rule, not by looks."""

    def __init__(self, count: int):
        self._count, self._stride, self._seen, self._kept = count, 1, 0, []

    def add(self, items: Iterable) -> None:
        for item in items:
            if self._count and self._seen % self._stride == 0:
                self._kept.append(item)
                if len(self._kept) > 8 * self._count:
                    self._kept, self._stride = self._kept[::2], 2 * self._stride
            self._seen += 1

    def items(self) -> list:
        """At most `count` items, from the first to the last kept."""
        if len(self._kept) <= self._count:
            return self._kept
        return [self._kept[round(i)] for i in np.linspace(0, len(self._kept) - 1, self._count)]


def _gallery(shown: list[tuple], names: list[str]) -> dict[str, Any]:
    images, truth, order, top = zip(*shown, strict=True)
    return {
        "images": np.stack(images),
        "truth": [names[i] for i in truth],
        "names": [[names[i] for i in row] for row in order],
        "scores": np.stack(top),
    }


def _unit(x: np.ndarray) -> np.ndarray:
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
