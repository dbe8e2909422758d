"""What XLA is told beyond its defaults, so that FSDP's gathers and reductions run beside the step's products.

`vlm_jax.plan` shows what comes of it; without these options a v5e waits for every reduce-scatter, a v5p and a v6e for
every all-gather, too.
"""

import jax

# A v5e computes and communicates in one fusion.
V5E = {
    "xla_enable_async_reduce_scatter_fusion": True,  # schedules the start of a reduce-scatter apart from its end
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,  # and puts products between them
    "xla_tpu_enable_async_collective_fusion_fuse_kloop_fusions": True,  # and elementwise work, as the optimizer's
    "xla_tpu_ars_combiner_threshold_in_bytes": 0,  # several reduce-scatters made one cannot be fused
    "xla_tpu_scoped_vmem_limit_kib": 32_768,  # of 128 MiB: one that is fused takes 16 MiB, which is all by default
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
    """Options of XLA for programs on devices of this kind; none for CPUs, GPUs and TPUs that are not in the table."""
    return BY_KIND.get(device.device_kind, {})
