"""Rank overlap: a query and the same query in other words find the same pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained.similarity import similarity


@method(
    family="evaluators",
    system="ParaCLIP",
    paper="arXiv:2402.15120",
    differs="a query and its paraphrase find the same pictures",
)
def rank_overlap(
    *,
    uri: str,
    split: str | None = None,
    queries: Sequence[str] = ("caption", "long_caption"),
    template: str = "{}",
    ks: Sequence[int] = (10,),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers.

    A picture's first text and its second one each rank all pictures. Metrics, means over pictures: `average_overlap@k`
    and `jaccard@k` of the two lists of the k best pictures, see `metrics.overlap`; `examples`, `left_out` (pictures
    without both texts). Equal scores are ordered by the pictures' order.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      queries: the record's fields with the query and with its paraphrase, each a text or a list of texts, of which the
        first counts. Of one field, the first two texts of its list.
      template: prompt; `{}` stands for the text.
      ks: lengths of the lists.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the embeddings; more embeddings go to a file.
    """
    queries = (queries,) if isinstance(queries, str) else tuple(queries)
    if len(queries) not in (1, 2):
        raise UserError(
            f"rank_overlap: queries is {list(queries)}; expected the fields of a query and of its paraphrase"
        )
    if "{}" not in template:
        raise UserError(f"template `{template}` has no `{{}}` for the text")
    if min(ks, default=0) < 1:
        raise UserError(f"ks are {list(ks)}; expected lengths of 1 or more, such as 10")
    limit = memory_limit(memory_share)

    def both(fields: list) -> list[str] | None:
        found = texts(fields)[:2] if len(queries) == 1 else [own[0] for field in fields if (own := texts([field]))]
        return found if len(found) == 2 else None

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=picture_ops(ops or pretrained.preprocess, *queries),
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("pictures")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            said = zip(*batch.spread(batch.about, batch.about[0]), strict=True)
            embed = lambda own: pretrained.embed_texts([template.replace("{}", text) for text in own])[batch.kept]
            first, second = map(embed, said)
            image = pretrained.embed_image_batch(batch.inputs)[batch.kept]
            return {"pictures": dict(image=image, first=first, second=second, position=batch.position)}

        if not data.run(rows, about=both):
            raise UserError(f"{data.about}: no picture has two texts under {', '.join(queries)}")
        return data.result(lambda tables: _result(tables["pictures"], ks), "left_out")

    return evaluate


def _result(pictures: Table, ks: Sequence[int]) -> Result:
    count = len(pictures)
    best = [
        metrics.top_k(
            lambda t, i, name=name: similarity(pictures.read(name, t), pictures.read("image", i)),
            count, count, min(max(ks), count),
        )[0]
        for name in ("first", "second")
    ]  # fmt: skip
    shares = {}
    for k in ks:
        average, jaccard = metrics.overlap(*(found[:, :k] for found in best))
        shares |= {f"average_overlap@{k}": average, f"jaccard@{k}": jaccard}
    numbers = {name: float(np.mean(own)) for name, own in shares.items()} | {"examples": float(count)}
    artifacts = {"overlap": {"position": pictures.read("position"), **shares}}
    return Result(numbers, artifacts, metrics.intervals(shares))
