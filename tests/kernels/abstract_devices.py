"""Programs for devices that are not there: traced and lowered on a CPU."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


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
