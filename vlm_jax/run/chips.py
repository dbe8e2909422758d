"""Accelerators that programs are compiled for without being there: what they can do, and slices of them."""

import collections
import os
from collections.abc import Sequence
from typing import NamedTuple

from vlm_jax import config
from vlm_jax.errors import UserError


class Chip(NamedTuple):
    """What an accelerator can do at most.

    Attributes:
      hbm: bytes of memory.
      bandwidth: bytes a second of it.
      flops: a second, dense bf16 products.
      links: bytes a second that it sends to other chips, all its links together.
    """

    hbm: int
    bandwidth: float
    flops: float
    links: float

    def shared(self, devices: int) -> "Chip":
        """The share of each of the devices that a chip is to JAX."""
        return Chip(self.hbm // devices, *(value / devices for value in self[1:]))


def _chip(gib: int, gb: float, tflops: float, links: float) -> Chip:
    return Chip(gib * 2**30, gb * 1e9, tflops * 1e12, links * 1e9)


# Of a chip: GiB, GB/s, TFLOP/s in bf16, GB/s sent: half of what is published as bidirectional.
CHIPS = {
    "v4": _chip(32, 1200, 275, 300),  # cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023 (arXiv:2304.01433)
    "v5e": _chip(16, 819, 197, 200),  # cloud.google.com/tpu/docs/v6e, which compares the two
    "v5p": _chip(95, 2765, 459, 600),  # cloud.google.com/tpu/docs/v5p
    "v6e": _chip(32, 1640, 918, 400),  # cloud.google.com/tpu/docs/v6e
    "tpu7x": _chip(192, 7380, 2307, 600),  # cloud.google.com/tpu/docs/tpu7x; two devices to JAX
    "h100": _chip(80, 3350, 989, 450),  # nvidia.com/en-us/data-center/h100, SXM; links: NVLink
}
# What jax.Device.device_kind says.
KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e", "TPU7x": "tpu7x",
}  # fmt: skip
# XLA compiles for a GPU that is not there from this description of it (GpuTargetConfigProto); numbers of an H100 SXM.
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
    """(devices, what each can do) of a slice that is not there, "v5e:16x16", "v5p:4x8x8", "h100:1x1x8", ...

    A v4 or v5p is one device to JAX, as on their hosts; a tpu7x is two.

    Raises:
      UserError: no such slice, no libtpu, or, for GPUs, no CUDA plugin.
    """
    name, _, shape = topology.partition(":")
    chip = config.choose(CHIPS, name, "--topology's chip")
    # without them libtpu looks for a TPU and asks the cloud who it is, and the CUDA plugin for a driver
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
    except Exception as error:  # of several kinds, none of jax's own
        reason = str(error).strip().splitlines()[0]
        needs = "libtpu" if extra == "tpu" else "jax's CUDA plugin"
        raise UserError(
            f"--topology={topology}: {reason}; expected e.g. v5e:16x16 or h100:1x1x8, and {needs}: "
            f"pip install 'vlm_jax[{extra}]'"
        ) from error
    return devices, chip.shared(_devices_of_a_chip(devices))


def chip_of(devices: Sequence) -> Chip | None:
    """What each of some devices that are there can do; None if it is not known, as of CPUs."""
    kind = devices[0].device_kind
    name = KINDS.get(kind, "h100" if "H100" in kind else None)
    return CHIPS[name].shared(_devices_of_a_chip(devices)) if name else None


def _devices_of_a_chip(devices: Sequence) -> int:
    places = collections.Counter(tuple(device.coords) for device in devices if hasattr(device, "coords"))
    return max(places.values(), default=1)
