"""A plan for TPUs, which reads what XLA has scheduled, against the program that is compiled to its end."""

import json
import sys

import pytest

from tests.support.abstract_devices import compiled_for


@pytest.mark.subprocess
def test_memory_is_that_of_the_program_that_train_runs():
    found = compiled_for("v5e", __file__)
    assert found["codegen"] == found["exact"]
    assert found["schedule"] == pytest.approx(found["exact"], rel=0.05)


def main(chip):
    """Bytes of a device, of a step on 2 x 2 chips."""
    from configs import clip
    from vlm_jax.plan import train_step
    from vlm_jax.plan.schedule import in_all
    from vlm_jax.run.chips import slice_of

    settings = clip.get_config("smoke").to_dict() | {"mesh": dict(data=-1, fsdp=2, tensor=1)}
    devices, chip = slice_of(f"{chip}:2x2")
    step = train_step.traced(settings, devices)
    planned = lambda codegen: sum(train_step.compiled(step, chip, codegen).memory.values())
    found = dict(codegen=planned(True), schedule=planned(False))
    found["exact"] = in_all(step.program.compile_step().memory_analysis())
    print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
