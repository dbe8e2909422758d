"""The Mosaic kernels, interpreted, and compiled ahead of time for three generations of chips.

The latter needs the [tpu] extra (libtpu), no TPU. libtpu lets one process in at a time, so each chip is a process of
its own that waits for its turn.
"""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.support.abstract_devices import CHIPS, compiled_for
from vlm_jax.errors import UserError
from vlm_jax.kernels import contrastive
from vlm_jax.kernels.contrastive import tpu

if __name__ != "__main__":
    from tests.support.contrastive_suite import KernelSuite

    class TestTpuInterpreted(KernelSuite):
        """Blocks of 128 x 256, chunks of 128 columns, slabs of two blocks; of twice that in bf16."""

        implementation = "tpu_interpret"

        @pytest.fixture(autouse=True)
        def small_blocks(self, monkeypatch):
            for name, value in dict(ROWS=256, COLUMNS=512, CHUNK=128, SLAB_BYTES=4 * 128 * 512).items():
                monkeypatch.setattr(tpu, name, value)


def struct(dtype=jnp.float32, width=4):
    return jax.ShapeDtypeStruct((8, width), dtype)


@pytest.mark.parametrize("name", ["tpu", "tpu_interpret"])
@pytest.mark.parametrize("x, message", [(struct(jnp.float16), "dtype float16"), (struct(width=8192), "width 8192")])
def test_what_the_kernel_lacks_is_named(name, x, message):
    with pytest.raises(UserError, match=f"`{name}` cannot do .*{message}"):
        contrastive.explain(x, x, implementation=name)


def test_the_default_on_a_tpu(monkeypatch):
    monkeypatch.setattr(contrastive, "_platform", lambda mesh: "tpu")
    assert contrastive.explain(struct(), struct()) == ("tpu", "the platform is tpu")
    choice = contrastive.explain(struct(jnp.float16), struct(jnp.float16))
    assert choice.implementation == "reference" and "`tpu` cannot do dtype float16" in choice.reason


CASES = {
    # N, M, D, dtype, penalty, mesh; all with gradients
    "So400m": (4096, 4096, 1152, "bfloat16", "softmax", {}),
    "fp32": (512, 512, 640, "float32", "softmax", {}),
    "sigmoid": (1024, 1024, 768, "bfloat16", "sigmoid", {}),
    "odd": (37, 200, 100, "float32", "sigmoid", {}),
    "tiny": (1, 1, 16, "bfloat16", "softmax", {}),
    "wide": (256, 256, 4096, "float32", "softmax", {}),
    "slabs": (1024, 16384, 512, "bfloat16", "softmax", {}),
    "ring": (1024, 1024, 512, "bfloat16", "softmax", dict(data=2, tensor=2)),
    "not split": (512, 512, 512, "bfloat16", "sigmoid", dict(tensor=4)),
}


def compile_all(chip):
    """{case: bytes of temporaries for each of embeddings, or the error}; in a process of its own."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    topology, found = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]), {}
    for name, (n, m, width, dtype, penalty, axes) in CASES.items():
        axes = axes or dict(x=1)
        devices = np.array(topology.devices[: np.prod(list(axes.values()))]).reshape(*axes.values())
        mesh = Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
        split = NamedSharding(mesh, PartitionSpec("data" if "data" in axes else None))
        x, y = (jax.ShapeDtypeStruct((size, width), dtype, sharding=split) for size in (n, m))

        def loss(x, y, penalty=penalty):
            if penalty == "sigmoid":
                return contrastive.pairwise_sigmoid_loss(x, y, 10.0, -10.0)
            return sum(lse.mean() for lse in contrastive.pairwise_logsumexp(x, y, 10.0))

        try:
            with jax.set_mesh(mesh):  # its devices are why the default is the kernel
                compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, y).compile()
            calls = compiled.as_text().count('custom_call_target="tpu_custom_call"')
            assert calls == (4 if "data" in axes else 2), f"{calls} kernels"  # of a ring: for each direction of travel
            temporary, embeddings = compiled.memory_analysis().temp_size_in_bytes, (n + m) * width
            assert temporary < 24 * embeddings + 2**20, f"{temporary} bytes of temporaries for {embeddings} numbers"
            found[name] = temporary / embeddings
        except Exception as error:
            found[name] = str(error)[:300]
    print("FOUND " + json.dumps(found))


@pytest.mark.subprocess
@pytest.mark.parametrize("chip", CHIPS)
def test_every_shape_compiles(chip):
    found = compiled_for(chip, __file__)
    assert {name: error for name, error in found.items() if isinstance(error, str)} == {}


if __name__ == "__main__":
    compile_all(sys.argv[1])
