"""XLA options that overlap FSDP's gathers and reductions with the step's matrix products.

`vlm_jax.plan` shows the effect. Without these options a v5e waits for every reduce-scatter; a v5p and a v6e also wait
for every all-gather.
"""

import jax

# A v5e overlaps compute and communication in one fusion.
V5E = {
    "xla_enable_async_reduce_scatter_fusion": True,  # schedules the start of a reduce-scatter apart from its end
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,  # puts products between start and end
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,  # and elementwise work, e.g. the optimizer's
    "xla_tpu_ars_combiner_threshold_in_bytes": 0,  # combined reduce-scatters cannot be fused
    "xla_tpu_scoped_vmem_limit_kib": 32_768,  # of 128 MiB: a fused reduce-scatter takes 16 MiB, the whole default
}
# From v5p on, SparseCores communicate while the TensorCores compute.
SPARSE_CORE = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,  # over both sides of a torus
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,  # the two exclude each other
}
BY_KIND = {
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": SPARSE_CORE,
    "TPU v5p": SPARSE_CORE,
    "TPU v6 lite": SPARSE_CORE,
    "TPU v6e": SPARSE_CORE,
}


def compiler_options(device: jax.Device) -> dict[str, bool | int]:
    """Returns XLA options for devices of this kind; empty for CPUs, GPUs and TPUs outside the table."""
    return BY_KIND.get(device.device_kind, {})
