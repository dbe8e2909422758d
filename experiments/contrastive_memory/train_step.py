"""Memory per chip of a CLIP B/32 training step at a batch of 32,768 on v5e:8x8, compiled ahead of time.

    python experiments/contrastive_memory/train_step.py       # needs libtpu, no TPU

The config is configs/clip.py:B/32 as it stands: bfloat16, scan over layers, remat="dots"; the batch is split over
data x fsdp = 8 x 8, parameters and optimizer over fsdp, and the contrastive loss goes around the ring.
"""

import os
import re
import sys
import time
from pathlib import Path

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from jax.experimental import topologies

from configs import clip
from vlm_jax import config, program, sharding


def main():
    settings = config.plain(clip.get_config("B/32"))
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8")
    mesh = sharding.make_mesh(data=8, fsdp=8, devices=topology.devices)
    example = {"image": np.zeros((1, 224, 224, 3), np.float32), "token_ids": np.zeros((1, 77), np.int32)}
    sections = {key: settings[key] for key in ("model", "objective", "optimizer", "accumulate")}
    built = program.build_program(
        example, mesh, lambda length: 1000 if isinstance(length, str) else length, **sections,
        partition=sharding.RULES, ema=None, seed=0,
    )  # fmt: skip
    start = time.perf_counter()
    compiled = built.compile_step(example, settings["batch_size"])
    memory, text = compiled.memory_analysis(), compiled.as_text()
    for name in ("argument", "output", "alias", "temp"):
        print(f"{name:9} {getattr(memory, f'{name}_size_in_bytes') / 1e6:9,.1f} MB per chip")
    asynchronous, waiting = (len(re.findall(rf" collective-permute{kind}\(", text)) for kind in ("-start", ""))
    print(f"collective-permutes: {asynchronous} asynchronous, {waiting} waited for")
    print(f"compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
