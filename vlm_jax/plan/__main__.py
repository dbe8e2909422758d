"""Plans a run before a slice is booked: whether it fits, and how fast it can be.

    vlm-jax plan --config=configs/clip.py:L/14 --topology=v5e:16x16 --config.mesh.fsdp=16
    vlm-jax plan --config=configs/clip.py:L/14 --topology=v5e:16x16 --search
    vlm-jax plan --config=clip:smoke

Compiles the train step of `vlm_jax.train` for chips that this machine does not have (needs `pip install 'vlm_jax[tpu]'`
and no TPU; for --topology=h100:1x1x8 'vlm_jax[cuda]' and no GPU), and prints the memory of a chip that the step takes,
its FLOPs, its collectives, and lower bounds on its time.
Without --topology the plan is for the devices of this machine; a CPU's speed is not known.
`--search` looks for the fastest mesh, remat and accumulation that fit. If nothing fits, the exit status is 3.
"""

import math
from collections.abc import Sequence

import jax
from absl import flags

from vlm_jax import command
from vlm_jax.errors import UserError
from vlm_jax.plan import search, train_step
from vlm_jax.run.chips import here, slice_of

FITS_NOT = 3  # the exit status


def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer:
    settings = values.config.to_dict()
    if values.topology is None:
        devices, chip = here()
    else:
        jax.config.update("jax_platforms", "cpu")
        devices, chip = slice_of(values.topology)
    if values.search and not math.isfinite(chip.flops):
        raise UserError("--search compares times, which are not known for this machine; give --topology=v5e:16x16, ...")
    if values.search:
        with command.doing("looking for the fastest that fits"):
            tried = search.search(settings, devices, chip)
        best = search.best(tried)
        results = {"best": best and best.json(), "tried": [one.json() for one in tried]}
        return command.Answer(results, search.text(tried), 0 if best else FITS_NOT)
    with command.doing(f"compiling the train step for {len(devices)} chip{'s'[: len(devices) > 1]}"):
        plans = train_step.of_stages(settings, devices, chip, values.codegen)
    text = train_step.text_of_stages(plans)
    if values.table:
        text += f"\n\n{plans[-1][1].table}"
    fits = all(result.fits for _, result in plans)
    hours = train_step.chip_hours(plans)
    results = plans[0][1].json() if len(plans) == 1 else {"stages": [result.json() for _, result in plans]}
    # at once: a compiler's thread may still make machine code
    return command.Answer(results | {"chip_hours": hours}, text, 0 if fits else FITS_NOT, at_once=True)


if __name__ == "__main__":
    command.run("plan", main)
