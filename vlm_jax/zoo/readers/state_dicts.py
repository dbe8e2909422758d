"""State dicts as training programs save them: weights below roots and wrappers, averages of them beside."""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vlm_jax.errors import UserError

log = logging.getLogger(__name__)
ROOTS = ("state_dict", "model_state_dict", "model", "module", "online_model", "net", "network", "clip", "clip_model")
AVERAGES = (
    "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict", "ema_weights", "swa_state_dict",
    "model_ema", "ema_model", "ema", "shadow",
)  # fmt: skip
# Modules around modules: DataParallel, torch.compile, FSDP, activation checkpoints, DeepSpeed.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
COUNTERS = {"n_averaged", "num_updates", "decay", "initted", "step"}  # of averages
OTHERS = {"optimizer", "optimizer_state_dict", "optimizer_states", "optimizers", "callbacks", "scaler", "scheduler"}


def root(keys: Collection[str], weights: str | None) -> str | None:
    """Returns the key of the weights among a checkpoint's dicts of tensors; None if they are not under a known one."""
    order = AVERAGES + ROOTS if weights == "ema" else ROOTS
    return next((key for key in order if key in keys), None)


def check(weights: str | None, path: Path | None = None) -> None:
    """Raises a UserError unless `weights` is "ema" or None; with `path`, which holds no averages, also for "ema"."""
    if weights not in (None, "ema"):
        raise UserError(f"weights is {weights!r:.40}; expected 'ema' (averaged weights) or None (the trained ones)")
    if weights and path is not None:
        raise UserError(f"{path} holds no averaged weights; leave out weights=")


def select(
    tensors: Mapping[str, Any], path: Path, weights: str | None = None, beside: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the tensors of a state dict under the model's own names.

    Wrappers (`module.`, `_orig_mod.`, ...) are dropped wherever they stand in a name; roots (`model.`, ...) are dropped
    if most names begin with them.

    Args:
      tensors: name -> anything with a shape.
      path: of the file, for messages.
      weights: "ema" selects the averaged weights, None the trained ones.
      beside: names of the averages that the file holds elsewhere.

    Raises:
      UserError: the file lacks the selected weights, or two tensors have one name.
    """
    check(weights)
    pairs = [(bare(name), name) for name in tensors]
    counters = {old for name, old in pairs if name.rpartition(".")[2] in COUNTERS and _is_scalar(tensors[old])}
    averages = [head for head in AVERAGES if _below(head, pairs)]
    averaged = [*beside, *averages]
    if averaged or "n_averaged" in {name for name, _ in pairs}:
        pairs = [pair for pair in pairs if pair[1] not in counters]
    elif weights == "ema":
        raise UserError(f"{path} holds no averaged weights (under a name such as `{'`, `'.join(AVERAGES[:6])}`)")
    if averages and weights == "ema":
        pairs = _without(averages[0], [pair for pair in pairs if pair[0].startswith(f"{averages[0]}.")])
    elif averages:
        heads = {name.partition(".")[0] for name, _ in pairs}
        if heads <= {*AVERAGES} | OTHERS:
            raise UserError(f"{path} holds averaged weights alone (`{averages[0]}`): pass weights='ema' to read them")
        pairs = [pair for pair in pairs if pair[0].partition(".")[0] not in averages]
    if averaged and weights is None:
        log.warning("%s holds averaged weights, too (%s); weights='ema' reads them", path, ", ".join(averaged))
    while head := next((head for head in ROOTS if 2 * _below(head, pairs) > len(pairs)), None):
        pairs = _without(head, pairs)
    found: dict[str, Any] = {}
    for name, old in pairs:
        if name in found:
            raise UserError(f"{path} holds two tensors under the name `{name}`, one of them as `{old}`")
        found[name] = tensors[old]
    return found


def bare(name: str) -> str:
    """Returns the name without wrappers."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(parts) if parts else name


def _below(head: str, pairs: list[tuple[str, str]]) -> int:
    return sum(name.startswith(f"{head}.") for name, _ in pairs)


def _without(head: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.removeprefix(f"{head}."), old) for name, old in pairs]


def _is_scalar(tensor: Any) -> bool:
    return math.prod(tensor.shape) == 1
