"""Accelerators: peak numbers of chips, and device lists of slices for compiling without the hardware."""

import collections
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax import config
from vlm_jax.errors import UserError


class Chip(NamedTuple):
    """Peak numbers of an accelerator.

    Attributes:
      hbm: bytes of memory.
      bandwidth: bytes a second of the memory.
      flops: FLOPs a second, dense bf16 products.
      links: bytes a second that the chip sends to other chips over all its links.
    """

    hbm: int
    bandwidth: float
    flops: float
    links: float

    def shared(self, devices: int) -> "Chip":
        """Returns the numbers of one JAX device if JAX sees the chip as several `devices`."""
        return Chip(self.hbm // devices, *(value / devices for value in self[1:]))


def _chip(gib: int, gb: float, tflops: float, links: float) -> Chip:
    return Chip(gib * 2**30, gb * 1e9, tflops * 1e12, links * 1e9)


# GiB, GB/s, TFLOP/s in bf16, GB/s sent (half of the published bidirectional number).
CHIPS = {
    "v4": _chip(32, 1200, 275, 300),  # cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023 (arXiv:2304.01433)
    "v5e": _chip(16, 819, 197, 200),  # cloud.google.com/tpu/docs/v6e, which compares the two
    "v5p": _chip(95, 2765, 459, 600),  # cloud.google.com/tpu/docs/v5p
    "v6e": _chip(32, 1640, 918, 400),  # cloud.google.com/tpu/docs/v6e
    "tpu7x": _chip(192, 7380, 2307, 600),  # cloud.google.com/tpu/docs/tpu7x; two devices to JAX
    "h100": _chip(80, 3350, 989, 450),  # nvidia.com/en-us/data-center/h100, SXM; links: NVLink
}
# jax.Device.device_kind -> chip.
KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# From this description (GpuTargetConfigProto) XLA compiles for a GPU without the hardware; numbers of an H100 SXM.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def slice_of(topology: str) -> tuple[list, Chip]:
    """Returns (devices, chip numbers of one device) of a slice, without the hardware.

    Slices are "v5e:16x16", "v5p:4x8x8", "h100:1x1x8", ... JAX sees a v4 or v5p as one device, as on their hosts, and a
    tpu7x as two.

    Raises:
      UserError: no such slice, no libtpu, or, for GPUs, no CUDA plugin.
    """
    name, _, shape = topology.partition(":")
    chip = config.choose(CHIPS, name, "--topology's chip")
    # without these, libtpu looks for a TPU and asks the cloud's metadata server, and the CUDA plugin looks for a driver
    defaults = dict(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
    )
    for variable, value in defaults.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    if name == "h100":
        options, extra = dict(platform="cuda", topology_name="", topology=shape, target_config=H100), "cuda"
    else:
        options, extra = dict(platform="tpu", topology_name=topology), "tpu"
        if name == "v4":
            options["chip_config_name"] = "megacore"
    try:
        devices = topologies.get_topology_desc(**options).devices
    except Exception as error:  # several kinds, no class of jax's own
        reason = str(error).strip().splitlines()[0]
        needs = "libtpu" if extra == "tpu" else "jax's CUDA plugin"
        raise UserError(
            f"--topology={topology}: {reason}; expected e.g. v5e:16x16 or h100:1x1x8, and {needs}: "
            f"pip install 'vlm_jax[{extra}]'"
        ) from error
    return devices, chip.shared(_devices_of_a_chip(devices))


def here() -> tuple[list, Chip]:
    """Returns (devices, chip numbers of one device) of this machine; numbers that are unknown are NaN.

    CPU devices share the machine's memory.
    """
    import jax

    devices = jax.devices()
    if (chip := chip_of(devices)) is None:
        own = (devices[0].memory_stats() or {}).get("bytes_limit")
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(devices)
        chip = Chip(own or host, math.nan, math.nan, math.nan)
    return devices, chip


def chip_of(devices: Sequence) -> Chip | None:
    """Returns the chip numbers of one of the devices; None if unknown, e.g. for CPUs."""
    kind = devices[0].device_kind
    name = KINDS.get(kind, "h100" if "H100" in kind else None)
    return CHIPS[name].shared(_devices_of_a_chip(devices)) if name else None


def _devices_of_a_chip(devices: Sequence) -> int:
    places = collections.Counter(tuple(device.coords) for device in devices if hasattr(device, "coords"))
    return max(places.values(), default=1)
