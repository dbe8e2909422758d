"""The implementations that run on any platform pass the suite; what `explain` answers; mistakes are named."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.support.abstract_devices import cuda_module, on_tpu
from tests.support.attention_suite import AttentionSuite, case, outputs
from vlm_jax import kernels
from vlm_jax.errors import UserError


class TestReference(AttentionSuite):
    implementation = "reference"


class TestXla(AttentionSuite):
    implementation = "xla"


class TestTpuInterpreted(AttentionSuite):
    implementation = "tpu_interpret"
    check_vma = False


class TestGpuInterpreted(AttentionSuite):
    implementation = "gpu_interpret"
    check_vma = False


def struct(shape=(2, 5, 3, 8), dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_explain():
    x = struct()
    assert kernels.explain(x, x, x) == ("xla", "the default platform is cpu")
    assert kernels.explain(x, x, x, implementation="reference") == ("reference", "asked for by name")
    exact = struct(dtype="float64")
    assert kernels.explain(exact, exact, exact).implementation == "reference"


@pytest.mark.parametrize(
    ("implementation", "x", "bias", "message"),
    [
        ("cudnn", struct(), None, r"`cudnn` cannot do dtype float32"),
        ("cudnn", struct((2, 5, 3, 8), jnp.bfloat16), struct((1, 1, 5, 5)), "a bias or mask with odd lengths"),
        ("cudnn", struct((2, 4, 3, 256), jnp.bfloat16), None, "head_dim 256"),
        ("tpu", struct(dtype=jnp.float16), None, "`tpu` cannot do dtype float16"),
    ],
)
def test_what_an_implementation_cannot_do_raises(implementation, x, bias, message):
    with pytest.raises(UserError, match=message):
        kernels.explain(x, x, x, bias=bias, implementation=implementation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="magic"), "`magic`; expected one of: reference, xla"),
        (dict(k=jnp.zeros((2, 7, 3, 4))), "equal batch, heads and head_dim"),
        (dict(q=jnp.zeros((5, 3, 8))), r"\[batch, length, heads, head_dim\]"),
        (dict(bias=jnp.zeros((3, 5, 7))), "bias must broadcast"),
        (dict(mask=jnp.ones((2, 1, 1, 5), bool)), "mask must broadcast"),
        (dict(mask=jnp.ones((2, 1, 1, 7))), "mask must be bool"),
    ],
)
def test_mistakes_are_named(change, message):
    q, k = jnp.zeros((2, 5, 3, 8)), jnp.zeros((2, 7, 3, 8))
    with pytest.raises(UserError, match=message):
        kernels.attention(**(dict(q=q, k=k, v=k) | change))


def test_the_mesh_s_platform_decides():
    """Traced on a CPU under a mesh of TPUs and lowered for them, the default is the Pallas kernels."""
    x = struct((2, 5, 2, 64), jnp.bfloat16)
    grad = jax.grad(lambda q, k, v: kernels.attention(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
    with on_tpu():
        assert kernels.explain(x, x, x) == ("tpu", "the mesh's platform is tpu")
        half = struct(dtype=jnp.float16)
        assert kernels.explain(half, half, half).reason.endswith(
            "tpu, but `tpu` cannot do dtype float16 (float32 and bfloat16 only)"
        )
        lowered = jax.jit(grad).trace(x, x, x).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_device_s_heads_count(tensor):
    """UL2 20B's attention, 16 heads of 256 with a bias by head: too much for one device, not for each of four."""
    x, bias = struct((16, 512, 16, 256), jnp.bfloat16), struct((1, 16, 512, 512))
    device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
    axes = ("data", "fsdp", "tensor"), (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.sharding.AbstractMesh((1, 1, tensor), *axes, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = kernels.explain(x, x, x, bias=bias)
    assert choice.implementation == ("tpu" if tensor == 4 else "xla")
    assert tensor == 4 or "a bias with 512 queries on 512 keys of 16 heads" in choice.reason


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.12 on
@pytest.mark.parametrize("name", ["length_64_196", "bias_and_mask", "dim_72"])
def test_the_gpu_kernels_lower_for_cuda(name):
    arrays, options, _ = case(name, "bfloat16")
    attend = lambda q, k, v, bias: kernels.attention(q, k, v, bias=bias, **options, implementation="gpu")
    module = cuda_module(partial(outputs, attend), arrays)
    assert module.count("__gpu$xla.gpu.triton") == (4 if arrays[3] is not None else 3)
