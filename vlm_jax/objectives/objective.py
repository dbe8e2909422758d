"""What a batch is scored by: two pure functions, so that any objective can be accumulated over micro-batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.errors import UserError

WHERE = "config.objective"


@dataclasses.dataclass(frozen=True)
class Objective:
    """`loss(params, encode(params, batch, rng), batch)` is what a training step differentiates.

    Attributes:
      encode: `encode(params, batch, rng) -> features`, a pytree whose leaves have the batch as leading axis. Row i
        depends on row i of the batch alone; `rng` is a `jax.random.key`, or None for no randomness (evaluation).
      loss: `loss(params, features, batch) -> (scalar, metrics)`. May couple all examples of the batch; cheap beside
        `encode`, as it runs once over the features of the whole batch.
      init: for objectives with memory (queues, teachers, running centres): `init(params) -> state`. Then it is
        `encode(params, batch, rng, state)` and `loss(params, features, batch, state) -> (scalar, metrics, state)`.
        No gradient flows to the state.
    """

    encode: Callable
    loss: Callable
    init: Callable | None = None


def model_inputs(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """(pictures, texts) of a batch, or (texts to be answered, answers): what a model is called with."""
    given = "image" if "image" in batch or "input_ids" not in batch else "input_ids"
    for key in (given, "token_ids"):
        if key not in batch:
            raise UserError(f"{WHERE}: the batch lacks `{key}`, it has: {', '.join(batch)}; see config.data.ops")
    return batch[given], batch["token_ids"]
