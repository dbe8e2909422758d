"""Image-text retrieval: each picture's captions among all captions, each caption's picture among all pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed, thumbnail  # noqa: F401 (registered as ops)
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.stream import look_up, open_pass, stream
from vlm_jax.evaluators.zeroshot import COMPARED, EMBEDDED, evenly_spaced
from vlm_jax.pretrained.similarity import similarity

NAMED = 5  # best captions shown with a picture
QUERIES, FOUND = 8, 6  # captions shown with their best pictures, and how many of these


def retrieval(
    *,
    uri: str,
    split: str | None = None,
    captions: str | Sequence[str] = ("caption",),
    template: str = "{}",
    ks: Sequence[int] = (1, 5, 10),
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    gallery: int = 24,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None, progress=None) -> Result`.

    Metrics: `image_to_text/recall@k`, `text_to_image/recall@k`, `images`, `texts`, `left_out` (pictures without text).
    Artifacts: the ranks; if there is a gallery, also what some pictures and some captions find, and of some pictures
    the embeddings, with those of their captions, and the similarities.
    A picture may have several captions; any of them is right. (The usual Flickr30k and COCO protocol has five for each
    picture.) Similarities are made and ranked in blocks, never the whole matrix.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with captions, each a text or a list of texts; empty texts do not count.
      template: prompt, `{}` stands for the caption.
      ks: how many candidates may be named.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
      gallery: how many pictures to show with their best captions, evenly spaced over the split.
      memory_share: of the free memory, for embeddings (half for pictures, half for texts); beyond it, a file.
    """
    captions = (captions,) if isinstance(captions, str) else tuple(captions)
    fields = ", ".join(f'"{path}"' for path in captions)
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, mesh: Any = None, progress: Progress | None = None) -> Result:
        del mesh  # the model knows where it runs
        progress = progress or Progress()
        string = f'decode | boxed({fields}, to="captions") | {ops or pretrained.preprocess} | keep("image", "captions")'
        pretrained, hosts, batches = open_pass(
            pretrained, uri=uri, split=split, where=where, ops=string, batch_size=batch_size
        )
        counts = hosts.from_first(progress.begin(examples=batches.num_examples, batch_size=hosts.batch_size))
        counts = {"batches": 0, "images": 0, "left_out": 0} | counts
        images, texts = progress.table("images", limit / 2), progress.table("texts", limit / 2)
        some, left_out = counts["images"], counts["left_out"]
        for batch in stream(batches, hosts, ["captions"], counts["batches"], progress.show):
            rows = zip(batch.mask, batch.columns["captions"], strict=True)
            of_row = [_texts(values) if real else [] for real, values in rows]
            row = np.array([i for i, own in enumerate(of_row) for _ in own], np.int64)
            kept, number = np.unique(row, return_inverse=True)
            some, left_out = some + len(kept), left_out + int(batch.mask.sum()) - len(kept)
            if len(kept):
                embedded = pretrained.embed_image_batch(batch.image)
                prompts = [template.replace("{}", text) for own in of_row for text in own]
                filled = prompts + prompts[:1] * (-len(prompts) % hosts.batch_size)  # few shapes are compiled
                nth = np.concatenate([np.arange(len(own)) for own in of_row])
                embedded_texts = pretrained.embed_texts(filled)[: len(prompts)]
                if hosts.first:
                    texts.append(embedding=embedded_texts, image=len(images) + number, nth=nth)
                    images.append(embedding=embedded[kept], position=batch.position[kept])
            progress.save(batches=batch.done, images=some, left_out=left_out)
        if not some:
            raise UserError(f"{uri} {split or ''}: no picture has a text under {', '.join(captions)}")
        result = Result({}, {})
        if hosts.first:
            look = lambda rows, string: look_up(batches, string, images.read("position")[rows])
            result = _result(images, texts, ks, gallery, look, fields)
        return result._replace(metrics=hosts.from_first(result.metrics | {"left_out": float(left_out)}))

    return evaluate


def _result(images: Table, texts: Table, ks: Sequence[int], gallery: int, look: Callable, fields: str) -> Result:
    scores = lambda i, t: similarity(images.read("embedding", i), texts.read("embedding", t))
    ranks = metrics.retrieval_ranks(scores, len(images), texts.read("image"))
    if images.read("embedding", slice(0, 1)).ndim == 3:  # what a text finds in a picture is another number
        found = lambda i, t: similarity(texts.read("embedding", t), images.read("embedding", i)).T
        ranks |= {"text_to_image": metrics.retrieval_ranks(found, len(images), texts.read("image"))["text_to_image"]}
    numbers = metrics.recall(ranks, ks) | {"images": float(len(images)), "texts": float(len(texts))}
    artifacts = {"ranks": ranks}
    pictures = lambda i: np.stack([r["thumbnail"] for r in look(i, 'decode | thumbnail | keep("thumbnail")')])
    boxes = f'boxed({fields}, to="captions") | keep("captions")'
    captions = lambda i: [_texts(r["captions"][()]) for r in look(i, boxes)]
    if gallery:
        shown = evenly_spaced(len(images), gallery)
        artifacts["gallery"] = _gallery(images, texts, shown, pictures, captions)
        artifacts["found"] = _found(images, texts, pictures, captions)
        artifacts |= _embedded(images, texts, pictures, captions)
    return Result(numbers, artifacts)


def _found(images: Table, texts: Table, pictures: Callable, captions: Callable) -> dict[str, Any]:
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
        "right": best == owner[:, None],
    }


def _embedded(images: Table, texts: Table, pictures: Callable, captions: Callable) -> dict[str, Any]:
    """Some pictures in one space with the first caption of each, and a few, each with the captions of all."""
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


def _gallery(images: Table, texts: Table, shown: np.ndarray, pictures: Callable, captions: Callable) -> dict[str, Any]:
    """Some pictures with their best captions; `truth` is the best of a picture's own, or its first."""
    queries = _rows(images, shown)
    scores = lambda i, t: similarity(queries[i], texts.read("embedding", t))
    best, nearness = metrics.top_k(scores, len(shown), len(texts), NAMED)
    owner, nth = texts.read("image"), texts.read("nth")
    wanted = np.union1d(owner[best], shown)
    named = dict(zip(wanted, captions(wanted), strict=True))
    names = [[named[owner[text]][nth[text]] for text in row] for row in best]
    truth = []
    for i, row, texts_of_row in zip(shown, best, names, strict=True):
        own = np.flatnonzero(owner[row] == i)
        truth.append(texts_of_row[own[0]] if len(own) else named[i][0])
    return {"images": pictures(shown), "truth": truth, "names": names, "scores": nearness}


def _texts(values: list) -> list[str]:
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return [text for text in texts if text.strip()]
