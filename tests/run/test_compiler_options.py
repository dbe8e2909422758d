"""Options of the compiler go to the chips that they are for, and to no others."""

from types import SimpleNamespace

import jax
import pytest

from vlm_jax.run.compiler_options import compiler_options


@pytest.mark.parametrize(
    ("kind", "has"),
    [
        ("TPU v5 lite", "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter"),
        ("TPU v6 lite", "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter"),
        ("TPU v4", None),
        ("NVIDIA H100 80GB HBM3", None),
    ],
)
def test_by_kind(kind, has):
    options = compiler_options(SimpleNamespace(device_kind=kind))
    assert (has in options) if has else options == {}


def test_none_for_a_cpu():
    assert compiler_options(jax.devices()[0]) == {}
