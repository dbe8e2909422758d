"""Every test runs on eight simulated CPU devices. Compiling is most of the suite's time, so XLA optimizes little."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

jax.config.update("jax_num_cpu_devices", 8)
