"""Programs for devices that are not there: traced, lowered and compiled on a CPU."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.support.paths import ROOT


def ambient(kind, platform):
    """A context in which the ambient mesh is of one such device."""
    device = AbstractDevice(kind, 1, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))


def on_tpu():
    return ambient("TPU v5 lite", "tpu")


def on_gpu():
    return ambient("NVIDIA H100 80GB HBM3", "gpu")


def cuda_module(fn, *args):
    """The StableHLO text of a function with Triton kernels, lowered for CUDA."""
    triton = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    with on_gpu():
        return jax.export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=[triton])(*args).mlir_module()


CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ENV = dict(
    JAX_PLATFORMS="cpu",
    JAX_ENABLE_COMPILATION_CACHE="0",  # what is asked of a compiled program is lost in the cache
    XLA_FLAGS="",  # libtpu reads them, too, and does not know those of the tests
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    PYTHONPATH=str(ROOT),
)
WAIT = 600  # seconds for other processes to leave libtpu


def compiled_for(chip, script):
    """What `script CHIP` prints after FOUND, a JSON object, in a process of its own: libtpu lets one in at a time."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e '.[tpu]' to compile for TPUs")
    deadline = time.time() + WAIT
    while True:
        run = subprocess.run([sys.executable, script, chip], env=os.environ | ENV, capture_output=True, text=True)
        if "lockfile" not in run.stderr or time.time() > deadline:
            break
        time.sleep(5)
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, run.stderr[-2000:]
    return json.loads(lines[-1][6:])
