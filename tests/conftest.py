"""Every test runs on eight simulated CPU devices. Compiling is most of the suite's time, so XLA optimizes little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

if jax.__version_info__ < (0, 11):  # without fusion emitters it compiles in a third of the time
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_num_cpu_devices", 8)
