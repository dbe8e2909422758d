"""The success of a planted trigger: how many pictures that carry it get the target's name."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.progress import Progress
from vlm_jax.evaluators.result import Result
from vlm_jax.evaluators.tasks.zeroshot import zeroshot


@method(
    family="evaluators",
    system="CleanCLIP",
    paper="arXiv:2303.03323",
    differs="the share of triggered pictures of other classes that get the target's name",
)
def attack_success(
    *,
    uri: str,
    target: str,
    split: str | None = None,
    classes: str | Sequence[str] | Mapping[int, str] | None = None,
    label: str | None = None,
    templates: str | Sequence[str] = ("{}",),
    where: Mapping[str, Sequence] | None = None,
    trigger: str = "trigger(None, 1.0)",
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result`.

    Metrics: `attack_success`, and `triggered_top1`, the share that gets its own name, both of pictures of other classes
    than the target's; `examples`. `zeroshot` says what the model does without the trigger.

    Args:
      uri, split, classes, label, templates, where, batch_size, memory_share: as of `zeroshot`.
      target: the name of the target's class.
      trigger: the op, which stands before the model's `normalize`; its size in pixels of the model's picture.
    """
    given = dict(uri=uri, split=split, classes=classes, label=label, templates=templates, where=where, gallery=0)
    given |= dict(batch_size=batch_size, memory_share=memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        preprocess = pretrained.preprocess or ""
        ops, found = re.subn(r"\b(normalize|to_float)\b", rf"{trigger} | \1", preprocess, count=1)
        if not found:
            raise UserError(f"attack_success plants the trigger before `normalize`; the model's ops: `{preprocess}`")
        result = zeroshot(ops=ops, **given)(pretrained, progress)
        names, seen = result.artifacts["classes"], result.artifacts["predictions"]
        if target not in names:
            raise UserError(f"attack_success: the target `{target}` is none of the classes {', '.join(names[:5])}, ...")
        others = seen["label"] != names.index(target)
        if not others.any():
            raise UserError(f"attack_success: all pictures are of the target's class, `{target}`")
        predicted = seen["predicted"][others]
        shares = {
            "attack_success": predicted == names.index(target),
            "triggered_top1": predicted == seen["label"][others],
        }
        numbers = {name: float(np.mean(share)) for name, share in shares.items()} | {"examples": float(others.sum())}
        intervals = metrics.intervals({name: share.astype(np.float64) for name, share in shares.items()})
        return Result(numbers, {}, intervals, result.notes)

    return evaluate
