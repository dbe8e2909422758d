"""Image-to-image retrieval: pictures of the same label, in another style or split."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.labels import plain
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.zeroshot import ties
from vlm_jax.pretrained import unit
from vlm_jax.pretrained.similarity import similarity

ROWS = 1024  # queries compared with the gallery at a time


@method(
    family="evaluators",
    paper="arXiv:1511.06452",
    where="section 5",
    differs="pictures of the same label, in another style or split, by a picture",
)
def image_retrieval(
    *,
    uri: str,
    split: str | None = None,
    label: str = "concept",
    gallery_uri: str | None = None,
    gallery_split: str | None = None,
    where: Mapping[str, Sequence] | None = None,
    gallery_where: Mapping[str, Sequence] | None = None,
    layer: int | None = None,
    ks: Sequence[int] = (1, 5, 10),
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `recall@k`, the share of queries with a picture of their label among the first k of the gallery, by cosine
    of the embeddings; `examples`, `left_out` (pictures without label or without its like in the gallery),
    `gallery` (its pictures), `ties`, which count with their expected value over random orders. A query that stands in
    the gallery itself is left out of the gallery. Labels are compared by name where the data set has names.

    Args:
      uri: the data set of the queries, as for `sources.open_source`.
      split: its split.
      label: the record's field with the label, a text or a number.
      gallery_uri: the data set to search; defaults to `uri`.
      gallery_split: its split; defaults to `split` if the data set is the same.
      where: field -> values; other pictures are no queries: `{"style": ["noto"]}`.
      gallery_where: the same for the gallery.
      layer: the image is the mean of a block's tokens, see `Pretrained.image_feature_batch`; None: its embedding, or
        for a captioner the mean of the image tower's tokens.
      ks: numbers of candidates that may be named.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the embeddings; more embeddings go to a file.
    """
    if min(ks, default=0) < 1:
        raise UserError(f"ks are {list(ks)}; expected ranks of 1 or more, such as 1,5,10")
    of_gallery = (gallery_uri or uri, gallery_split or (split if gallery_uri in (None, uri) else None))
    limit = memory_limit(memory_share) / 2

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        progress = progress or Progress()
        shared = dict(ops=picture_ops(ops or pretrained.preprocess, label), batch_size=batch_size, memory=limit)
        searched = Pass(
            pretrained, progress, name="gallery_", uri=of_gallery[0], split=of_gallery[1], where=gallery_where, **shared
        )
        data = Pass(pretrained, progress, uri=uri, split=split, where=where, **shared)
        pretrained = data.pretrained
        names = [_names(one, label) for one in (data, searched)]
        number = {name: i for i, name in enumerate(dict.fromkeys(name for name in names[1] if name is not None))}
        own, there = ([number.get(name) for name in several] for several in names)
        itself = np.full(data.num_examples, -1)  # place of a query in the gallery
        if (uri, split) == of_gallery:
            at = {record: place for place, record in enumerate(searched.records().tolist())}
            itself = np.array([at.get(record, -1) for record in data.records().tolist()])
            alike = Counter(there)
            own = [i if alike[i] > (place >= 0) else None for i, place in zip(own, itself, strict=True)]
        searched.begin("gallery")
        data.begin("queries")

        def embed(batch: Batch) -> np.ndarray:
            if layer is None and not getattr(pretrained, "is_captioner", False):
                embedded = pretrained.embed_image_batch(batch.inputs)[batch.kept]
                if embedded.ndim != 2:
                    raise UserError("this model has a vector for each token; give layer, whose tokens are averaged")
                return embedded
            chosen = {} if layer is None else {"layer": layer}
            return unit(pretrained.image_feature_batch(batch.inputs, **chosen)[batch.kept])

        def rows(table: str) -> Callable[[Batch], Mapping[str, Columns]]:
            made = lambda batch: {"embedding": embed(batch), "label": np.array(batch.about), "position": batch.position}
            return lambda batch: {table: made(batch)}

        in_gallery = searched.run(rows("gallery"), about=lambda i: there[i], columns=["position"])
        if not (in_gallery and data.run(rows("queries"), about=lambda i: own[i], columns=["position"])):
            raise UserError(f"{data.about}: no picture's `{label}` is that of a picture of {searched.about}")
        finish = lambda tables: _result(tables["queries"], searched.tables["gallery"], itself, ks)
        return data.result(finish, "left_out")

    return evaluate


def _names(data: Pass, label: str) -> list[str | None]:
    """The labels of a pass's examples as names are compared."""
    data.check_field(label)
    names = data.source.label_names(label) or {}
    values = [record[0] if record else None for record in data.fields(label)]
    return [plain(str(names.get(v, v))) if isinstance(v, str | int | np.integer) and v != "" else None for v in values]


def _result(queries: Table, gallery: Table, itself: np.ndarray, ks: Sequence[int]) -> Result:
    label, position, known = queries.read("label"), queries.read("position"), gallery.read("label")
    place, images, found = gallery.read("position"), gallery.read("embedding").astype(np.float64), []
    for start in range(0, len(label), ROWS):
        rows = slice(start, min(start + ROWS, len(label)))
        scores = similarity(queries.read("embedding", rows), images)
        right = label[rows, None] == known
        other = itself[position[rows], None] != place
        best = np.max(scores, axis=1, where=right & other, initial=-np.inf)[:, None]
        wrong, equal = ~right & other, scores == best
        found.append(((scores > best) & wrong, equal & wrong, equal & right & other))
    ranks = metrics.Ranks(*(np.concatenate([part.sum(1) for part in parts]) for parts in zip(*found, strict=True)))
    shares = {f"recall@{k}": ranks.within(k) for k in ks}
    numbers = {name: float(np.mean(share)) for name, share in shares.items()}
    numbers |= {"examples": float(len(label)), "gallery": float(len(known)), "ties": float(ranks.ties)}
    artifacts = {"ranks": {"position": position, "rank": ranks.above, "ties": ranks.tied}}
    return Result(numbers, artifacts, metrics.intervals(shares), ties(ranks, "queries"))
