"""Plans a run before a slice is booked: does it fit, and how fast can it be.

    vlm-jax plan --config=configs/clip.py:L/14 --topology=v5e:16x16 --config.mesh.fsdp=16
    vlm-jax plan --config=configs/clip.py:L/14 --topology=v5e:16x16 --search

Compiles the train step that `vlm_jax.train` would run, for chips that are not there (needs `pip install 'vlm_jax[tpu]'`
and no TPU; for --topology=h100:1x1x8 'vlm_jax[cuda]' and no GPU), and prints what it takes of a chip's memory, its
FLOPs, its collectives, and lower bounds on its time.
`--search` tries meshes, remat and accumulation for the fastest that fits.
"""

import atexit
import os
from collections.abc import Sequence

import jax
from absl import flags

from vlm_jax import command
from vlm_jax.plan import search, train_step
from vlm_jax.plan.chips import slice_of


def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer:
    jax.config.update("jax_platforms", "cpu")
    settings = command.read_config(values)
    devices, chip = slice_of(values.topology)
    if values.search:
        with command.doing("looking for the fastest that fits"):
            tried = search.search(settings, devices, chip)
        best = search.best(tried)
        results = {"best": best and best.json(), "tried": [one.json() for one in tried]}
        return command.Answer(results, search.text(tried), 0 if best else 1)
    with command.doing(f"compiling the train step for {len(devices)} chips"):
        result = train_step.plan(settings, devices, chip, values.codegen)
    status = 0 if result.fits else 1
    atexit.register(os._exit, status)  # not waiting for the code that a compiler's thread still makes
    text = train_step.text(result) + (f"\n\n{result.table}" if values.table else "")
    return command.Answer(result.json(), text, status)


if __name__ == "__main__":
    command.run("plan", main)
