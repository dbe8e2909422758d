"""Minimal pairs: two pictures and two captions that differ in one thing, matched both ways."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics, scores
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, pictures_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result


@method(
    family="evaluators",
    paper="arXiv:2204.03162",
    where="section 3.1",
    differs="two pictures and two captions that differ in one thing, matched both ways",
)
def minimal_pairs(
    *,
    uri: str,
    split: str | None = None,
    captions: Sequence[str] = ("minimal_pair/caption", "minimal_pair/text"),
    images: Sequence[str] = ("image", "minimal_pair/image"),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers and captioners.

    Metrics, of Winoground: `text`, the share of pairs whose two pictures both fit their own caption better than the
    other caption; `image`, the share whose two captions both fit their own picture better than the other picture;
    `group`, the share with both. Equal scores are wrong, as in the paper. `ties`: pairs with equal scores. `examples`,
    `left_out` (pairs without two texts). By chance, `text` and `image` are 0.25 and `group` is 1/6. Two towers score a
    pair by the cosine, captioners by the log-likelihood, summed over tokens. `where` selects pairs of one kind.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with the first and with the second caption.
      images: the record's fields with the first and with the second picture.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pairs at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the scores; more scores go to a file.
    """
    for name, fields in (("captions", captions), ("images", images)):
        if isinstance(fields, str) or len(fields) != 2:
            raise UserError(f"minimal_pairs: {name} is {fields!r}; expected two fields, of the first and of the second")
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        string = pictures_ops(
            ops or pretrained.preprocess, dict(zip(("first", "second"), images, strict=True)), *captions
        )
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=string, batch_size=batch_size, memory=limit,
            inputs=("first", "second"),
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("pairs")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            said = [batch.spread(own, own[0]) for own in zip(*batch.about, strict=True)]
            score = np.array([scores.of_columns(pretrained, pictures, said) for pictures in batch.inputs])
            return {"pairs": {"score": np.moveaxis(score[:, :, batch.kept], 2, 0), "position": batch.position}}

        def about(fields: list) -> list[str] | None:
            own = [texts([value])[:1] for value in fields]
            return [text for (text,) in own] if all(own) else None

        if not data.run(rows, about):
            raise UserError(f"{data.about}: no picture has texts under {' and '.join(captions)}")
        return data.result(lambda tables: _result(tables["pairs"]), "left_out")

    return evaluate


def _result(pairs: Table) -> Result:
    score = pairs.read("score")  # [N, picture, caption]
    (aa, ab), (ba, bb) = np.moveaxis(score, 0, 2)
    text, image = (aa > ab) & (bb > ba), (aa > ba) & (bb > ab)
    shares = {"text": text, "image": image, "group": text & image}
    ties = int(np.sum((aa == ab) | (bb == ba) | (aa == ba) | (bb == ab)))
    numbers = {name: float(right.mean()) for name, right in shares.items()}
    numbers |= {"examples": float(len(score)), "ties": float(ties)}
    notes = [f"{ties:,} of {len(score):,} pairs have equal scores, which are wrong"] if ties else []
    artifacts = {"pairs": {"position": pairs.read("position"), "score": score}}
    return Result(numbers, artifacts, metrics.intervals(shares), notes)
