"""Compiles ViT train steps with attention kernels for 16 v5e chips; prints the copies around the kernels.

    python -m experiments.kernel_schedules.train_step B/16 | So400m/14 | B/16-heads | one

Needs the [tpu] extra (libtpu), no TPU. Each tower has two blocks. `B/16-heads` divides the heads over 4 chips. `one` is
a single chip without scan: its copies are the block's own.
"""

import os
import re
import sys

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlm_jax.models.vit import ViT

B16 = dict(width=768, heads=12, patch=16)
SO400M = dict(width=1152, heads=16, mlp_dim=4304, patch=14, pool="map")
SCAN = dict(scan=True, remat="full")
CASES = {
    # name: mesh (data, fsdp, tensor), batch, image size, model
    "one": ((1, 1, 1), 8, 224, B16),
    "B/16": ((16, 1, 1), 128, 224, B16 | SCAN),
    "B/16-heads": ((4, 1, 4), 128, 224, B16),
    "So400m/14": ((16, 1, 1), 128, 378, SO400M | SCAN),
}


def compile_step(shape, batch, size, model):
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    devices = np.array(topology.devices[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    on = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    vit = ViT(depth=2, dtype="bfloat16", **model)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32, sharding=on(("data", "fsdp")))
    params = jax.eval_shape(lambda rng: vit.init(rng, jnp.zeros((1, size, size, 3)))["params"], jax.random.key(0))

    def place(path, leaf):
        name, spec = "/".join(key.key for key in path), ()
        if shape[2] > 1 and re.search("attn/(query|key|value)", name):
            spec = ("tensor",) if name.endswith("bias") else (None, "tensor")
        elif shape[2] > 1 and name.endswith("attn/out/kernel"):
            spec = ("tensor",)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on(*spec))

    def step(params, images):
        loss = lambda params: jnp.var(vit.apply({"params": params}, images).pooled.astype(jnp.float32))
        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), value

    with jax.set_mesh(mesh):
        params = jax.tree_util.tree_map_with_path(place, params)
        return jax.jit(step, donate_argnums=0).lower(params, images).compile()


def main():
    compiled = compile_step(*CASES[sys.argv[1]])
    text = compiled.as_text()
    print("attention kernels:", text.count('custom_call_target="tpu_custom_call"'))
    print("temporary bytes per chip:", compiled.memory_analysis().temp_size_in_bytes)
    for line in text.splitlines():
        found = re.search(r"= (\S+) (copy|transpose)\(", line)
        if found and "s32[]" not in found[1]:
            where = re.search(r'op_name="([^"]*)"', line)
            print(f"{found[2]} {found[1]} {where[1] if where else ''}")


if __name__ == "__main__":
    main()
