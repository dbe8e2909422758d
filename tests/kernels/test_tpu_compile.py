"""The TPU kernels compiled ahead of time for three generations of chips. Needs the [tpu] extra (libtpu), no TPU.

    pip install -e '.[test,tpu]' && pytest tests/kernels/test_tpu_compile.py

libtpu lets one process in at a time, so each chip is a process of its own that waits for its turn.
"""

import json
import sys

import pytest

from tests.support.abstract_devices import CHIPS, compiled_for

SHAPES = {
    # queries, keys, heads, head_dim, and what else; all with gradients
    "B/16": (196, 196, 12, 64, {}),
    "B/16 cls": (197, 197, 12, 64, {}),
    "Ti/16": (197, 197, 3, 64, {}),
    "B/32 fp32": (50, 50, 12, 64, dict(dtype="float32")),
    "L/14": (257, 257, 16, 64, {}),
    "L/14 at 336": (577, 577, 16, 64, {}),
    "So400m/14": (729, 729, 16, 72, {}),
    "H/14": (257, 257, 16, 80, {}),
    "g/14": (257, 257, 16, 88, {}),
    "G/14": (257, 257, 16, 104, {}),
    "wide": (1024, 1024, 16, 128, dict(dtype="float32")),
    "G/14 at 448": (1024, 1024, 16, 104, {}),
    "1024 x 256": (1024, 1024, 4, 256, {}),
    "CLIP text": (77, 77, 8, 64, dict(causal=True, mask=True)),
    "SigLIP text": (64, 64, 12, 64, dict(mask=True)),
    "text 32": (64, 64, 8, 32, dict(causal=True)),
    "T5": (256, 256, 12, 64, dict(bias=True, mask=True)),
    "MAP": (1, 729, 16, 72, {}),
    "cross": (64, 196, 12, 64, {}),
    "cached": (1, 77, 8, 64, dict(mask=True)),
    "long": (2048, 2048, 8, 128, {}),
    "longest": (8192, 8192, 2, 64, dict(causal=True, mask=True)),
}


def compile_all(chip):
    """{shape: temporary bytes, or the error} for forward and backward, batch 2; in a process of its own."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from vlm_jax.kernels import attention

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    one = NamedSharding(mesh, PartitionSpec())
    found = {}
    for name, (lq, lk, heads, dim, options) in SHAPES.items():
        options = dict(options)
        array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
        dtype = options.pop("dtype", "bfloat16")
        args = [array(2, length, heads, dim, dtype=dtype) for length in (lq, lk, lk)]
        bias = array(1, heads, lq, lk, dtype="float32") if options.pop("bias", False) else None
        mask = array(2, 1, 1, lk, dtype="bool") if options.pop("mask", False) else None

        def score(q, k, v, bias, mask, options=options):
            return attention(q, k, v, bias=bias, mask=mask, **options).astype(jnp.float32).sum()

        wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        try:
            with jax.set_mesh(mesh):  # its devices are why the default is the kernel
                compiled = jax.jit(jax.value_and_grad(score, wanted)).lower(*args, bias, mask).compile()
            text = compiled.as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == 2
            logits = [f"[2,{heads},{a},{b}]" for a, b in ((lq, lk), (lk, lq)) if dim not in (a, b)]
            assert not any(shape in text for shape in logits), "an array of logits is in memory"
            found[name] = compiled.memory_analysis().temp_size_in_bytes
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
