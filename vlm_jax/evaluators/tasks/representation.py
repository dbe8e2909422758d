"""The embeddings of pictures and their texts as two sets: gap, alignment, uniformity, rank, neighbours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, field_ops, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import evenly_spaced

SIDES = ("image", "text")
SHOWN = 300  # pairs drawn


@method(
    family="evaluators",
    paper="arXiv:2405.11297",
    differs="the shape of the embeddings: gap between modalities, alignment, uniformity, effective rank, neighbours",
)
def representation(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = "caption",
    join: str | None = None,
    neighbours: int = 10,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of models with embeddings.

    Metrics, each of `metrics.representation`: `gap`; `alignment` of pictures and their texts; `image/uniformity`,
    `text/uniformity`; `image/effective_rank`, `text/effective_rank`; `overlap`, the mutual nearest neighbours of
    pictures and texts; `cka` of the two. Mean cosines: `similarity/pairs`, of pictures and their own texts,
    `similarity/others`, with the other texts, `similarity/image` and `similarity/text`, of different pictures and of
    different texts. `examples`, `left_out` (pictures without text).

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's field with the text, or several; the first text counts.
      join: text between the texts of a list, which becomes one text.
      neighbours: k of `overlap`; at most the number of pictures - 1.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the embeddings.
    """
    if neighbours < 1:
        raise UserError(f"representation: neighbours is {neighbours}; expected 1 or more")
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=picture_ops(ops or pretrained.preprocess, *captions),
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("pairs")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            image = pretrained.embed_image_batch(batch.inputs)[batch.kept]
            if image.ndim != 2:
                raise UserError("representation: this model has a vector for each token; expected one for a picture")
            said = pretrained.embed_texts(batch.spread(batch.about, batch.about[0]))[batch.kept]
            return {"pairs": {"image": image, "text": said, "position": batch.position}}

        def about(fields: list) -> str | None:
            own = texts(fields)
            return (own[0] if join is None else join.join(own)) if own else None

        if data.run(rows, about) < 3 and data.first:
            raise UserError(f"{data.about}: fewer than three pictures have a text under {', '.join(captions)}")
        boxed = f'{field_ops(*captions)} | keep("fields")'
        said = lambda places: [about(row["fields"][()]) for row in data.look_up(boxed, places)]
        return data.result(lambda tables: _result(tables["pairs"], neighbours, said), "left_out")

    return evaluate


def _result(pairs: Table, neighbours: int, said: Callable) -> Result:
    both = {side: pairs.read(side).astype(np.float64) for side in SIDES}
    image, text = both.values()
    n = len(image)
    sums = {side: np.sum(x.sum(axis=0) ** 2) - np.sum(x**2) for side, x in both.items()}  # of different rows
    own = np.sum(image * text, axis=1)
    numbers = {
        "gap": metrics.modality_gap(image, text),
        "alignment": metrics.alignment(image, text),
        **{f"{side}/uniformity": metrics.uniformity(x) for side, x in both.items()},
        **{f"{side}/effective_rank": metrics.effective_rank(x) for side, x in both.items()},
        "overlap": metrics.neighbour_overlap(image, text, min(neighbours, n - 1)),
        "cka": metrics.cka(image, text),
        "similarity/pairs": float(own.mean()),
        "similarity/others": float((image.sum(axis=0) @ text.sum(axis=0) - own.sum()) / (n * (n - 1))),
        **{f"similarity/{side}": float(total / (n * (n - 1))) for side, total in sums.items()},
        "examples": float(n),
    }
    some = evenly_spaced(n, SHOWN)
    names = said(pairs.read("position")[some])
    return Result(
        numbers, {"space": {"image": pairs.read("image")[some], "text": pairs.read("text")[some], "names": names}}
    )
