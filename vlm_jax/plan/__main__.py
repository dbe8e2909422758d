import json
import os
import sys
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from vlm_jax import command
from vlm_jax.plan import search, train_step
from vlm_jax.plan.chips import slice_of


def main(_: Sequence[str]) -> None:
    settings = command.read_config(_CONFIG)
    devices, chip = slice_of(_TOPOLOGY.value)
    if _SEARCH.value:
        tried = search.search(settings, devices, chip)
        result = search.best(tried)
        print(json.dumps([one.json() for one in tried], indent=1) if _JSON.value else search.text(tried))
        sys.exit(0 if result else 1)
    result = train_step.plan(settings, devices, chip, _CODEGEN.value)
    if _JSON.value:
        print(json.dumps(result.json(), indent=1))
    else:
        print(train_step.text(result) + (f"\n\n{result.table}" if _TABLE.value else ""))
    sys.stdout.flush()
    os._exit(0 if result.fits else 1)  # not waiting for the code that a compiler's thread still makes


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    _CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/ul2.py:20b", lock_config=True)
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Slice, e.g. v5e:16x16")
    _JSON = flags.DEFINE_bool("json", False, "Print JSON")
    _TABLE = flags.DEFINE_bool("table", False, "Print the parameters and their shardings too")
    _CODEGEN = flags.DEFINE_bool("codegen", False, "Have TPU programs' machine code made too: minutes, the same plan")
    _SEARCH = flags.DEFINE_bool("search", False, "Look for the mesh, remat and accumulation that are fastest")
    flags.mark_flags_as_required(["config", "topology"])
    command.run(main)
