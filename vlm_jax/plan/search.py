"""Looks for the mesh, remat and accumulation with which a train step fits some chips and is fastest.

Fastest by the bound on its time (`Plan.seconds`), which is no timing: of settings with one bound the first counts,
with the fewest parts. A step is compiled only if the time that its products alone take is less than the best found.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from vlm_jax import command, config
from vlm_jax.errors import UserError
from vlm_jax.plan import train_step
from vlm_jax.run.chips import Chip

TENSOR = (1, 2, 4)
REMAT = ("none", "dots", "full")  # each keeps less than the one before and computes more again
ACCUMULATE = (1, 2, 4, 8, 16, 32)


class Trial(NamedTuple):
    """One setting.

    Attributes:
      mesh: sizes of fsdp and tensor.
      remat: of all towers whose config has the key; None where none has.
      accumulate: micro-batches; None where the config has no such key.
      result: what the compiled step takes; None if it was not compiled.
      note: why it was not, "" if it was.
    """

    mesh: dict[str, int]
    remat: str | None
    accumulate: int | None
    result: Any = None
    note: str = ""

    @property
    def fits(self) -> bool:
        return self.result is not None and self.result.fits

    def json(self) -> dict[str, Any]:
        """All of it."""
        return self._asdict() | {"result": self.result and self.result.json()}

    def words(self) -> str:
        """What `train` and `plan` are given for it; the remat of each tower in words."""
        flags = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        flags += [] if self.accumulate is None else [f"--config.accumulate={self.accumulate}"]
        return " ".join(flags) + (f", remat `{self.remat}` in all towers" if self.remat else "")


def search(settings: Mapping[str, Any], devices: Sequence[jax.Device], chip: Chip) -> list[Trial]:
    """Tries meshes, and for each remat and accumulation from what computes least to what holds least, until one fits.

    Args: those of `train_step.plan`.

    Raises:
      UserError: no mesh is possible, for the reason of the last.
    """
    settings = config.plain(settings)
    tried, fastest = [], float("inf")
    products = {}  # by remat and accumulate: seconds of the products alone, nearly the same on all meshes
    progress = command.bar(list(meshes(len(devices))), unit="mesh", desc="plan")
    for mesh in progress:
        temporaries = {}  # by remat, of one micro-batch
        for remat, accumulate in ladder(settings):
            trial = Trial(mesh, remat, accumulate)
            progress.set_postfix_str(trial.words())
            if products.get(trial[1:3], 0) >= fastest:
                break
            rows = (accumulate or 1) * len(devices) // mesh["tensor"]
            if accumulate not in (None, 1) and settings["batch_size"] % rows:
                continue  # micro-batches would not be split evenly
            room = temporaries.get(remat)
            if room and room[0] / (accumulate or 1) > room[1]:
                continue  # activations alone are more than there is room for
            try:
                step = train_step.traced(changed(settings, trial), devices)
            except UserError as error:
                tried.append(trial._replace(note=str(error)))
                break
            products[trial[1:3]] = step.flops / chip.flops
            if products[trial[1:3]] >= fastest:
                break
            result = train_step.compiled(step, chip)
            tried.append(trial._replace(result=result))
            if result.fits:
                fastest = min(fastest, result.seconds)
                break
            held = sum(result.memory.values()) - result.memory["temporaries"]
            if accumulate in (None, 1):
                temporaries[remat] = result.memory["temporaries"], chip.hbm - held
    if not any(trial.result for trial in tried):
        raise UserError(f"no mesh of {len(devices)} devices is possible; the last: {tried[-1].note}")
    return tried


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of fsdp, powers of two, and tensor; the least split first."""
    for tensor in TENSOR:
        for fsdp in (2**power for power in range(devices.bit_length())):
            if devices % (tensor * fsdp) == 0:
                yield dict(fsdp=fsdp, tensor=tensor)


def ladder(settings: Mapping[str, Any]) -> list[tuple[str | None, int | None]]:
    """(remat, accumulate) that a config can have: first those that compute least again."""
    remats = REMAT if list(_towers(settings["model"])) else (None,)
    counts = ACCUMULATE if "accumulate" in settings else (None,)
    return [(remat, counts[0]) for remat in remats] + [(r, k) for r in remats for k in counts[1:]]


def changed(settings: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """The config with what is tried."""
    settings = copy.deepcopy(dict(settings))
    settings["mesh"] = dict(data=-1, **trial.mesh)
    for tower in _towers(settings["model"]):
        tower["remat"] = trial.remat
    if trial.accumulate is not None:
        settings["accumulate"] = trial.accumulate
    return settings


def best(tried: Sequence[Trial]) -> Trial | None:
    """The first of those with the least bound that fit; None if none does."""
    return min((trial for trial in tried if trial.fits), key=lambda trial: trial.result.seconds, default=None)


def text(tried: Sequence[Trial]) -> str:
    """The settings tried, a line each, and the best."""
    lines = [f"{'fsdp':>5}{'tensor':>7} {'remat':6}{'accumulate':>10}{'GiB':>8}{'ms':>9}{'MFU':>7}"]
    for trial in tried:
        line = f"{trial.mesh['fsdp']:5}{trial.mesh['tensor']:7} {trial.remat or '':6}{trial.accumulate or '':>10}"
        if trial.result is None:
            lines.append(f"{line}  {trial.note}")
            continue
        line += f"{sum(trial.result.memory.values()) / 2**30:8.1f}"
        known = f"{trial.result.seconds * 1e3:9.2f}{trial.result.mfu:7.1%}" if trial.result.compiled else ""
        lines.append(line + known + ("" if trial.fits else "  does not fit"))
    found = best(tried)
    if found is None:
        return "\n".join([*lines, "", "none fits: take more chips, or a smaller batch"])
    return "\n".join([*lines, "", f"best: {found.words()}"])


def _towers(model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections of a model that say what their blocks keep."""
    for value in model.values():
        if isinstance(value, dict) and "remat" in value:
            yield value
