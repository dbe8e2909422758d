"""Image-text retrieval: each picture's captions among all captions, each caption's picture among all pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.data import loader
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.ops import boxed  # noqa: F401 (registered as an op)
from vlm_jax.evaluators.result import Result


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
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, mesh=None) -> Result`.

    Metrics: `image_to_text/recall@k`, `text_to_image/recall@k`, `images`, `texts`. A picture may have several captions;
    any of them is right. (The usual Flickr30k and COCO protocol has five for each picture.)

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      captions: the record's fields with captions, each a text or a list of texts; empty texts do not count.
      template: prompt, `{}` stands for the caption.
      ks: how many candidates may be named.
      where: field -> values that a record must have to take part.
      ops: op string from record to `image`; the model's own preprocessing by default.
      batch_size: pictures at a time; the numbers do not depend on it.
    """
    captions = (captions,) if isinstance(captions, str) else tuple(captions)

    def evaluate(pretrained: Any, mesh: Any = None) -> Result:
        del mesh  # the model knows where it runs
        fields = ", ".join(f'"{path}"' for path in captions)
        string = f'decode | boxed({fields}, to="captions") | {ops or pretrained.preprocess} | keep("image", "captions")'
        batches = loader.eval_batches(
            uri=uri, split=split, where=where, batch_size=batch_size, ops=string, tokenizer=pretrained.tokenizer
        )
        images, texts, image_of_text, without = [], [], [], 0
        for batch in batches:
            embedded = np.asarray(pretrained.embed_image_batch(batch["image"]))
            for real, embedding, values in zip(batch["mask"], embedded, batch["captions"], strict=True):
                own = _texts(values) if real else []
                without += bool(real and not own)
                if own:
                    image_of_text += [len(images)] * len(own)
                    images.append(embedding)
                    texts += own
        if not images:
            raise UserError(f"{uri} {split or ''}: no picture has a text under {', '.join(captions)}")
        embedded = np.asarray(pretrained.embed_texts([template.replace("{}", text) for text in texts]))
        recall = metrics.retrieval_recall(np.stack(images) @ embedded.T, np.array(image_of_text), ks)
        counts = {"images": float(len(images)), "texts": float(len(texts)), "left_out": float(without)}
        return Result(recall | counts, {})

    return evaluate


def _texts(values: list) -> list[str]:
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    return [text for text in texts if text.strip()]
