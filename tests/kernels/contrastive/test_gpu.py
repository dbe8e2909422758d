"""The Triton kernels, interpreted and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.support.abstract_devices import cuda_module
from tests.support.contrastive_suite import KernelSuite
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive


class TestGpuInterpreted(KernelSuite):
    implementation = "gpu_interpret"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.12 on
@pytest.mark.parametrize(
    "run",
    [
        lambda *xy, **how: sum(lse.sum() for lse in contrastive.pairwise_logsumexp(*xy, 10.0, **how)),
        lambda *xy, **how: contrastive.pairwise_sigmoid_loss(*xy, 10.0, -2.0, **how),
    ],
    ids=["softmax", "sigmoid"],
)
@pytest.mark.parametrize("n, m, width, dtype", [(100, 200, 1152, "bfloat16"), (64, 30, 100, "float32")])
def test_lowers_for_cuda(run, n, m, width, dtype):
    arrays = [jax.ShapeDtypeStruct((size, width), dtype) for size in (n, m)]
    module = cuda_module(jax.value_and_grad(functools.partial(run, implementation="gpu"), (0, 1)), *arrays)
    assert module.count("__gpu$xla.gpu.triton") in (3, 4)  # the sigmoid has nothing of columns in the forward pass


def test_float64_is_named():
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((8, 4), jnp.float64)
        with pytest.raises(UserError, match="`gpu` cannot do dtype float64"):
            contrastive.explain(x, x, implementation="gpu")
