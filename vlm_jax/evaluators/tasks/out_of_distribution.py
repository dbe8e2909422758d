"""Pictures of none of the classes: how well a model's scores tell them from those of the classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import classes as class_names
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import Classes
from vlm_jax.evaluators.naming import namer
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result


@method(
    family="evaluators",
    paper="arXiv:2211.13445",
    claim="robustness: cosines without the model's scale know unknown concepts better than its probabilities",
    differs="pictures of none of the classes, told from those of the classes by the scores of the names",
)
def out_of_distribution(
    *,
    uri: str,
    classes: str | Sequence[str] | Mapping[int, str],
    split: str | None = None,
    other_uri: str | None = None,
    other_split: str | None = None,
    label: str = "label",
    templates: str | Sequence[str] = ("{}",),
    train_split: str | None = None,
    where: Mapping[str, Sequence] | None = None,
    other_where: Mapping[str, Sequence] | None = None,
    train_where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `SCORE/auroc`, the probability that a picture of the classes has the higher score, and `SCORE/fpr95`, the
    share of the others above the threshold that 95 % of the pictures of the classes pass; the scores are those of
    `metrics.belonging`, and with `train_split` `mahalanobis`. `examples`, `other_examples`.

    Args:
      uri: the data set of the classes, as for `sources.open_source`.
      classes: the names, see `classes.read`.
      split: its split.
      other_uri: the data set of the others; defaults to `uri`.
      other_split: its split; defaults to `split` if the data set is the same.
      label: the field with the label of training pictures.
      templates: prompts, `{}` stands for the name.
      train_split: pictures of `uri` with labels, for `mahalanobis` alone.
      where, other_where, train_where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the scores and embeddings.
    """
    named = Classes(class_names.read(classes))
    templates = class_names.read_templates(templates)
    other_split = other_split or (split if other_uri in (None, uri) else None)
    if (other_uri or uri, other_split, other_where) == (uri, split, where):
        raise UserError("out_of_distribution: the others are the same pictures; give other_uri, other_split or where")
    limit = memory_limit(memory_share) / 2

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        progress, string = progress or Progress(), ops or pretrained.preprocess
        shared = dict(batch_size=batch_size, memory=limit)
        known = Pass(pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(string), **shared)
        other = Pass(
            pretrained, progress, name="other_", uri=other_uri or uri, split=other_split, where=other_where,
            ops=picture_ops(string), **shared,
        )  # fmt: skip
        train = train_split and Pass(
            pretrained, progress, name="train_", uri=uri, split=train_split, where=train_where,
            ops=picture_ops(string, label), **shared,
        )  # fmt: skip
        pretrained = known.pretrained
        known.begin("known")
        other.begin("other")
        score, scale = namer(pretrained, named.names, templates)

        def rows(table: str) -> Callable[[Batch], Mapping[str, Columns]]:
            def made(batch: Batch) -> Mapping[str, Columns]:
                found = metrics.belonging(score(batch.inputs)[batch.kept], scale)
                embedded = {"embedding": pretrained.embed_image_batch(batch.inputs)[batch.kept]} if train else {}
                return {table: found | embedded}

            return made

        if train:
            train.begin("train")
            look = train.look(named, label)
            embed = lambda batch: pretrained.embed_image_batch(batch.inputs)[batch.kept]
            learn = lambda batch: {"train": {"embedding": embed(batch), "label": np.array(batch.about)}}
            train.check_any(train.run(learn, about=lambda fields: look(fields[0])), label, named, look)
        for data, table in ((known, "known"), (other, "other")):
            if not data.run(rows(table), about=lambda fields: True):
                raise UserError(f"{data.about}: there is no picture")
        return known.result(lambda tables: _result(tables["known"], other.tables["other"], train))

    return evaluate


def _result(known: Table, other: Table, train: Pass | None) -> Result:
    numbers = {"examples": float(len(known)), "other_examples": float(len(other))}
    scores = {name: (known.read(name), other.read(name)) for name in metrics.BELONGING}
    if train:
        about = [train.tables["train"].read(name) for name in ("embedding", "label")]
        scores["mahalanobis"] = tuple(metrics.mahalanobis(one.read("embedding"), *about) for one in (known, other))
    for name, pair in scores.items():
        numbers |= {f"{name}/{key}": value for key, value in metrics.detection(*pair)._asdict().items()}
    return Result(
        numbers, {"scores": {f"{name}_{i}": one for name, pair in scores.items() for i, one in enumerate(pair)}}
    )
