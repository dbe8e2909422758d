"""CoCa: a contrastive and a captioning loss from one forward pass (Yu et al. 2022, arXiv:2205.01917, section 3.2)."""

from collections.abc import Mapping
from typing import Any

from vlm_jax.catalogue import method
from vlm_jax.models.token_loss import token_loss
from vlm_jax.objectives.contrastive import contrastive
from vlm_jax.objectives.generative.losses import caption_loss, of_captions
from vlm_jax.objectives.objective import Objective, model_inputs


@method(
    family="objectives",
    paper="arXiv:2205.01917",
    where="section 3.2",
    differs="a contrastive and a captioning loss of one forward pass",
    needs={"model.name": "coca"},
)
def coca(
    *,
    model: Any,
    contrastive_loss: Mapping[str, Any] | None = None,
    contrastive_weight: float = 1.0,
    caption_weight: float = 2.0,
    mean: str = "token",
    pad_id: int = 0,
    chunk: int = 8,
) -> Objective:
    """Returns the objective of a `CoCa`; the texts of a batch must begin with the start token.

    Args:
      model: linen module, `models.CoCa`.
      contrastive_loss: arguments of `contrastive`, e.g. dict(targets="concept"); None uses the defaults.
      contrastive_weight, caption_weight: weights of the two losses in the sum.
      mean, pad_id, chunk: as for `captioning`.

    Metrics: the metrics of `contrastive` and of `captioning`, `contrastive_loss` and `caption_loss`.
    """
    pairs = contrastive(model=model, **(contrastive_loss or {}))

    def encode(params, batch, rng):
        images, token_ids = model_inputs(batch)
        apply = lambda *args, **options: model.apply({"params": params}, *args, **options)
        train = dict(train=rng is not None, rngs=None if rng is None else {"dropout": rng})
        embeddings = apply(images, token_ids, **train)
        hidden = apply(embeddings.image_tokens, embeddings.text_tokens[:, :-1], **train, method="describe")
        targets = token_ids[:, 1:]
        losses = token_loss(lambda hidden: apply(hidden, method="logits"), hidden, targets, chunk=chunk)
        pair = {"image": embeddings.image, "text": embeddings.text}
        return {"pair": pair, "caption": of_captions(losses, targets != pad_id)}

    def loss(params, features, batch):
        of_pairs, metrics = pairs.loss(params, features["pair"], batch)
        of_texts, more = caption_loss(features["caption"], mean)
        value = contrastive_weight * of_pairs + caption_weight * of_texts
        return value, metrics | more | {"contrastive_loss": of_pairs, "caption_loss": of_texts, "loss": value}

    return Objective(encode, loss)
