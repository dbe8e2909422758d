"""Searches the mesh, remat and accumulation with which a train step fits some chips and is fastest.

Fastest means the least bound on time (`Plan.seconds`), not a timing. Of settings with equal bounds the first wins, the
least split. A step is compiled only if the time of its products alone is below the best bound so far.
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
REMAT = ("none", "dots", "full")  # each keeps less than the one before and recomputes more
ACCUMULATE = (1, 2, 4, 8, 16, 32)


class Trial(NamedTuple):
    """One setting.

    Attributes:
      mesh: sizes of fsdp and tensor.
      remat: of all towers whose config has the key; None if no tower has the key.
      accumulate: micro-batches; None if the config has no such key.
      result: the plan of the compiled step; None if the step was not compiled.
      note: why the step was not compiled; "" if it was.
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
        """All fields, JSON-able."""
        return self._asdict() | {"result": self.result and self.result.json()}

    def words(self) -> str:
        """The flags of this setting for `train` and `plan`; the towers' remat in words."""
        flags = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh.items()]
        flags += [] if self.accumulate is None else [f"--config.accumulate={self.accumulate}"]
        return " ".join(flags) + (f", remat `{self.remat}` in all towers" if self.remat else "")


def search(settings: Mapping[str, Any], devices: Sequence[jax.Device], chip: Chip) -> list[Trial]:
    """Tries meshes, and for each mesh remat and accumulation until one fits.

    Remat and accumulation go from the least computation to the least memory.

    Args: as for `train_step.plan`.

    Raises:
      UserError: no mesh is possible; the text gives the reason of the last.
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
                continue  # activations alone exceed the free memory
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
        raise UserError(f"no mesh of {len(devices)} devices is possible; the last error: {tried[-1].note}")
    return tried


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Sizes of fsdp, powers of two, and tensor; the least split first."""
    for tensor in TENSOR:
        for fsdp in (2**power for power in range(devices.bit_length())):
            if devices % (tensor * fsdp) == 0:
                yield dict(fsdp=fsdp, tensor=tensor)


def ladder(settings: Mapping[str, Any]) -> list[tuple[str | None, int | None]]:
    """The pairs (remat, accumulate) that a config can have, the least recomputation first."""
    remats = REMAT if list(_towers(settings["model"])) else (None,)
    counts = ACCUMULATE if "accumulate" in settings else (None,)
    return [(remat, counts[0]) for remat in remats] + [(r, k) for r in remats for k in counts[1:]]


def changed(settings: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """The config with a trial's setting."""
    settings = copy.deepcopy(dict(settings))
    settings["mesh"] = dict(data=-1, **trial.mesh)
    for tower in _towers(settings["model"]):
        tower["remat"] = trial.remat
    if trial.accumulate is not None:
        settings["accumulate"] = trial.accumulate
    return settings


def best(tried: Sequence[Trial]) -> Trial | None:
    """The fitting trial with the least bound, of equal trials the first; None if none fits."""
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
    """The sections of a model with a key `remat`."""
    for value in model.values():
        if isinstance(value, dict) and "remat" in value:
            yield value
