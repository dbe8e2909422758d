"""Composed retrieval: a picture and the words for a change find the changed picture."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.config import choose
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, pictures_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.zeroshot import ties
from vlm_jax.pretrained import unit
from vlm_jax.pretrained.similarity import similarity

ROWS = 1024  # queries compared with the gallery at a time

# Picture and text embedding [n, D] -> the query.
QUERIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sum": lambda image, text: unit(image.astype(np.float64) + text),
    "image": lambda image, text: image.astype(np.float64),
    "text": lambda image, text: text.astype(np.float64),
}


@method(
    family="evaluators",
    paper="arXiv:2108.04024",
    where="section 3",
    differs="a picture and the words for a change find the changed picture",
)
def composed_retrieval(
    *,
    uri: str,
    split: str | None = None,
    text: str = "edit/text",
    images: Sequence[str] = ("image", "edit/image"),
    query: str = "sum",
    ks: Sequence[int] = (1, 5, 10),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers.

    query = (image + text) / |image + text|, of the embeddings of the first picture and of the text: two towers have no
    composer of their own. The gallery is all changed and all first pictures; a query's own first picture is left out,
    as in CIRR. Metrics: `recall@k`, the share of queries with the changed picture among the first k; `examples`,
    `left_out` (pictures without text), `gallery` (candidates of a query), `ties`, which count with their expected value
    over random orders.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      text: the record's field with the words for the change, a text or a list of texts; the first text counts.
      images: the record's fields with the first and with the changed picture.
      query: "sum", or for comparison "image" or "text" alone.
      ks: numbers of candidates that may be named.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the embeddings; more embeddings go to a file.
    """
    compose = choose(QUERIES, query, "the query of composed_retrieval")
    if isinstance(images, str) or len(images) != 2:
        raise UserError(f"composed_retrieval: images is {images!r}; expected two fields, of the first and the changed")
    if min(ks, default=0) < 1:
        raise UserError(f"ks are {list(ks)}; expected ranks of 1 or more, such as 1,5,10")
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        string = pictures_ops(ops or pretrained.preprocess, dict(zip(("first", "second"), images, strict=True)), text)
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=string, batch_size=batch_size, memory=limit,
            inputs=("first", "second"),
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("queries", query=query)

        def rows(batch: Batch) -> Mapping[str, Columns]:
            first, changed = (pretrained.embed_image_batch(pictures)[batch.kept] for pictures in batch.inputs)
            of_text = pretrained.embed_texts(batch.spread(batch.about, batch.about[0]))[batch.kept]
            if first.ndim != 2:
                raise UserError(
                    "composed_retrieval adds a picture's vector to a text's; this model has one for each token"
                )
            columns = {"query": compose(first, of_text), "first": first, "changed": changed}
            return {"queries": columns | {"position": batch.position}}

        if not data.run(rows, about=lambda fields: next(iter(texts(fields)), None)):
            raise UserError(f"{data.about}: no picture has a text under {text}")
        return data.result(lambda tables: _result(tables["queries"], ks), "left_out")

    return evaluate


def _result(queries: Table, ks: Sequence[int]) -> Result:
    count, found = len(queries), []
    gallery = np.concatenate([queries.read(name) for name in ("changed", "first")]).astype(np.float64)
    for start in range(0, count, ROWS):
        rows = np.arange(start, min(start + ROWS, count))
        scores = similarity(queries.read("query", slice(start, start + len(rows))), gallery)
        scores[np.arange(len(rows)), count + rows] = -np.inf  # the own first picture
        found.append(metrics.truth_ranks(scores, rows))
    ranks = metrics.Ranks(*map(np.concatenate, zip(*found, strict=True)))
    shares = {f"recall@{k}": ranks.within(k) for k in ks}
    numbers = {name: float(np.mean(own)) for name, own in shares.items()}
    numbers |= {"examples": float(count), "gallery": float(2 * count - 1), "ties": float(ranks.ties)}
    artifacts = {"ranks": {"position": queries.read("position"), "rank": ranks.above, "ties": ranks.tied}}
    return Result(numbers, artifacts, metrics.intervals(shares), ties(ranks, "queries"))
