"""Image-text retrieval: each picture's captions among all captions, each caption's picture among all pictures."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, field_ops, picture_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.records import texts as texts_of
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.sampling import evenly_spaced
from vlm_jax.evaluators.tasks.zeroshot import ties
from vlm_jax.pretrained.similarity import similarity

NAMED = 5  # best captions shown with a picture
EMBEDDED = 300  # pictures whose embedding is kept
COMPARED = 10  # of these pictures, compared with each other's captions
QUERIES, FOUND = 8, 6  # captions shown with their best pictures, and best pictures of each caption


@method(
    family="evaluators",
    paper="arXiv:2103.00020",
    where="table 13",
    differs="pictures by their captions and captions by their pictures",
)
def retrieval(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = ("caption",),
    template: str = "{}",
    join: str | None = None,
    ks: Sequence[int] = (1, 5, 10),
    strict: bool = False,
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `image_to_text/recall@k`, `text_to_image/recall@k`, `images`, `texts`, `left_out` (pictures without text),
    `identical_texts` (texts that stand with another picture, too), `ties` (queries with a wrong candidate of the right
    one's score, which count with their expected value over random orders).
    Artifacts: the ranks; with a gallery, also the best captions of some pictures, the best pictures of some captions,
    and the embeddings and similarities of some pictures and their captions.
    A picture may have several captions; each counts as right. (The usual Flickr30k and COCO protocol has five for each
    picture.) Short, long and sub-captions, and names in a language, are `captions` of other fields. Similarities are
    computed and ranked in blocks, never as a whole matrix.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with captions, each a text or a list of texts; empty texts do not count.
      template: prompt; `{}` stands for the caption.
      join: text between the texts of a list, which becomes one caption: ", " for names. By default each is a caption.
      ks: numbers of candidates that may be named.
      strict: only a picture's own captions are right. By default identical texts count as one another: a text that also
        stands with another picture is right for both pictures, and both pictures are right for it.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      gallery: number of pictures to show with their best captions, evenly spaced over the split.
      memory_share: share of the free memory for the embeddings (half for pictures, half for texts); more go to a file.
    """
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    if "{}" not in template:
        raise UserError(f"template `{template}` has no `{{}}` for the caption")
    if min(ks, default=0) < 1:
        raise UserError(f"ks are {list(ks)}; expected ranks of 1 or more, such as 1,5,10")
    own_texts = texts_of if join is None else lambda fields: [join.join(own) for f in fields if (own := texts_of([f]))]
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        prepare = ops or pretrained.preprocess
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, ops=picture_ops(prepare, *captions),
            batch_size=batch_size, memory=limit,
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("images", "texts")

        def rows(batch: Batch) -> Mapping[str, Columns]:
            embedded = pretrained.embed_image_batch(batch.inputs)[batch.kept]
            prompts = [template.replace("{}", text) for own in batch.about for text in own]
            filled = prompts + prompts[:1] * (-len(prompts) % data.batch_size)  # so that few shapes are compiled
            of_texts = pretrained.embed_texts(filled)[: len(prompts)]
            number = np.repeat(np.arange(len(batch.about)), list(map(len, batch.about)))
            nth = np.concatenate([np.arange(len(own)) for own in batch.about])
            ids = np.array([_id(text) for own in batch.about for text in own])
            return {
                "texts": {"embedding": of_texts, "image": len(data.tables["images"]) + number, "nth": nth, "id": ids},
                "images": {"embedding": embedded, "position": batch.position},
            }

        def finish(tables: Mapping[str, Table]) -> Result:
            return _result(data, tables["images"], tables["texts"], ks, strict, gallery, captions, own_texts)

        if not data.run(rows, about=lambda fields: own_texts(fields) or None):
            raise UserError(f"{data.about}: no picture has a text under {', '.join(captions)}")
        return data.result(finish, "left_out")

    return evaluate


def _id(text: str) -> np.int64:
    """The same number for the same text, another for another."""
    return np.frombuffer(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), np.int64)[0]


def _result(
    data: Pass, images: Table, texts: Table, ks: Sequence[int], strict: bool, gallery: int, fields: Sequence[str],
    own_texts: Callable,
) -> Result:  # fmt: skip
    owner, ids = texts.read("image"), texts.read("id")
    pairs = metrics.Pairs(len(images), owner, None if strict else ids)
    scores = lambda i, t: similarity(images.read("embedding", i), texts.read("embedding", t))
    ranks = metrics.retrieval_ranks(scores, pairs)
    if images.read("embedding", slice(0, 1)).ndim == 3:  # token-wise similarity differs between the directions
        found = lambda i, t: similarity(texts.read("embedding", t), images.read("embedding", i)).T
        ranks |= {"text_to_image": metrics.retrieval_ranks(found, pairs)["text_to_image"]}
    shared = _shared(owner, ids)
    numbers = metrics.recall(ranks, ks) | {"images": float(len(images)), "texts": float(len(texts))}
    numbers |= {"identical_texts": float(shared.sum()), "ties": float(sum(rank.ties for rank in ranks.values()))}
    units = {"image_to_text": None, "text_to_image": owner}  # the captions of a picture are drawn together
    intervals = {
        f"{name}/recall@{k}": metrics.interval(rank.within(k), units=units[name])
        for name, rank in ranks.items()
        for k in ks
    }
    notes = [*ties(ranks["image_to_text"], "pictures"), *ties(ranks["text_to_image"], "texts")]
    if shared.any():
        how = "only the picture's own text is right (strict)" if strict else "identical texts count as one another"
        notes.append(f"{shared.sum():,} of {len(texts):,} texts stand with several pictures; {how}")
    artifacts = {
        "ranks": {name: rank.above for name, rank in ranks.items()},
        "ties": {name: rank.tied for name, rank in ranks.items()},
    }
    position = images.read("position")
    pictures = lambda rows: data.thumbnails(position[rows])
    boxed = f'{field_ops(*fields)} | keep("fields")'
    captions = lambda rows: [own_texts(row["fields"][()]) for row in data.look_up(boxed, position[rows])]
    if gallery:
        shown = evenly_spaced(len(images), gallery)
        artifacts["gallery"] = _gallery(images, texts, pairs, shown, pictures, captions)
        artifacts["found"] = _found(images, texts, pairs, pictures, captions)
        artifacts |= _embedded(images, texts, pictures, captions)
    return Result(numbers, artifacts, intervals, notes)


def _found(images: Table, texts: Table, pairs: metrics.Pairs, pictures: Callable, captions: Callable) -> dict[str, Any]:
    """Some captions with their best pictures."""
    asked = evenly_spaced(len(texts), QUERIES)
    queries, owner, nth = _rows(texts, asked), texts.read("image")[asked], texts.read("nth")[asked]
    scores = lambda t, i: similarity(queries[t], images.read("embedding", i))
    best, nearness = metrics.top_k(scores, len(asked), len(images), FOUND)
    shown, index = np.unique(best, return_inverse=True)
    return {
        "queries": [own[n] for own, n in zip(captions(owner), nth, strict=True)],
        "images": pictures(shown)[index.reshape(best.shape)],
        "scores": nearness,
        "right": pairs.match(best, asked[:, None]),
    }


def _embedded(images: Table, texts: Table, pictures: Callable, captions: Callable) -> dict[str, Any]:
    """Some pictures and their first captions in one space; and a few pictures compared with each other's captions."""
    some = evenly_spaced(len(images), EMBEDDED)
    first = np.unique(texts.read("image"), return_index=True)[1][some]
    image, text, names = _rows(images, some), _rows(texts, first), [own[0] for own in captions(some)]
    few = evenly_spaced(len(some), COMPARED)
    compared = {"images": pictures(some[few]), "texts": [names[i] for i in few]}
    compared["scores"] = similarity(image[few], text[few])
    space = {"space": {"image": image, "text": text, "names": names}} if image.ndim == 2 else {}
    return {**space, "similarity": compared}


def _rows(table: Table, index: np.ndarray) -> np.ndarray:
    return np.concatenate([table.read("embedding", slice(i, i + 1)) for i in index])


def _gallery(
    images: Table, texts: Table, pairs: metrics.Pairs, shown: np.ndarray, pictures: Callable, captions: Callable
) -> dict[str, Any]:
    """Some pictures with their best captions; `truth`: the first right caption among the best, else the own first."""
    queries = _rows(images, shown)
    scores = lambda i, t: similarity(queries[i], texts.read("embedding", t))
    best, nearness = metrics.top_k(scores, len(shown), len(texts), NAMED)
    owner, nth = texts.read("image"), texts.read("nth")
    wanted = np.union1d(owner[best], shown)
    named = dict(zip(wanted, captions(wanted), strict=True))
    right, names, truth = pairs.match(shown[:, None], best), [], []
    for i, row, right_of_row in zip(shown, best, right, strict=True):
        found = [named[owner[text]][nth[text]] for text in row]
        own = np.flatnonzero(right_of_row)
        truth.append(found[own[0]] if len(own) else named[i][0])
        same = lambda name, is_right, own=truth[-1]: name == own and not is_right
        names.append([f"{n} (another's)" if same(n, r) else n for n, r in zip(found, right_of_row, strict=True)])
    return {"images": pictures(shown), "truth": truth, "names": names, "scores": nearness, "right": right}


def _shared(owner: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Whether a text stands with several pictures, bool [M]."""
    _, group = np.unique(ids, return_inverse=True)
    pictures = np.bincount(np.unique(np.stack([group, owner]), axis=1)[0])
    return pictures[group] > 1
