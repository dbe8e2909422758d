"""An objective: two pure functions, so that gradients of any objective can be accumulated over micro-batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.errors import UserError

WHERE = "config.objective"


@dataclasses.dataclass(frozen=True)
class Objective:
    """A training step differentiates `loss(params, encode(params, batch, rng), batch)`.

    Attributes:
      encode: `encode(params, batch, rng) -> features`, a pytree; the batch is the leading axis of all leaves. Row i
        depends on row i of the batch alone. `rng` is a `jax.random.key`, or None for no randomness (evaluation).
      loss: `loss(params, features, batch) -> (scalar, metrics)`. `loss` may couple all examples of the batch. `loss`
        runs once over the features of the whole batch and must be cheap compared with `encode`.
      init: for objectives with memory (queues, teachers, running centres): `init(params) -> state`. The calls are then
        `encode(params, batch, rng, state)` and `loss(params, features, batch, state) -> (scalar, metrics, state)`.
        No gradient flows to the state.
    """

    encode: Callable
    loss: Callable
    init: Callable | None = None


def model_inputs(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns a model's inputs from a batch: (pictures, texts), or (input texts, target texts)."""
    given = "image" if "image" in batch or "input_ids" not in batch else "input_ids"
    for key in (given, "token_ids"):
        if key not in batch:
            raise UserError(f"{WHERE}: the batch lacks `{key}`, it has: {', '.join(batch)}; see config.data.ops")
    return batch[given], batch["token_ids"]
