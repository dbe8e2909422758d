"""What every device holds whole though it is split: a good program has none of it, bad ones are found out."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import clip
from vlm_jax.params import sharding
from vlm_jax.plan import hlo, train_step
from vlm_jax.plan.replicated import replicated
from vlm_jax.run.chips import Chip

LAYERS, WIDTH, BATCH = 4, 64, 24
PARAMS = {"blocks/fc1/kernel": (LAYERS, WIDTH, WIDTH), "head/kernel": (WIDTH, 8)}
PICTURES = (BATCH, 8, 8, 1)  # as wide as a layer


@pytest.fixture(scope="module")
def found():
    """What is found in the program of a gradient step that uses params and pictures as they come out of two functions;
    the second takes gathered pictures, too."""

    def run(used=lambda params: params, seen=lambda images: images):
        mesh = sharding.make_mesh(data=2, fsdp=4)
        place = lambda *spec: NamedSharding(mesh, P(*spec))
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in PARAMS.items()}
        where = {name: place(*(None,) * (len(shape) - 2), "fsdp") for name, shape in PARAMS.items()}
        rows = place(("data", "fsdp"))

        def loss(params, images):
            blocks, head = used(params).values()
            x = jax.lax.with_sharding_constraint(seen(images).reshape(BATCH, WIDTH), rows)
            layer = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None)
            return jnp.sum((jax.lax.scan(layer, x, blocks)[0] @ head) ** 2)

        step = jax.jit(jax.grad(loss), in_shardings=(where, rows), out_shardings=where)
        text = step.lower(params, jax.ShapeDtypeStruct(PICTURES, jnp.float32)).compile().as_text()
        return replicated(hlo.parse(text), mesh.shape, PARAMS, PICTURES)

    return run


def anywhere(tree):
    """Whole on every device, and really there."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P())), tree)


def test_layers_in_their_loop_are_fine(found):
    assert found() == []


def test_all_parameters(found):
    lines = found(used=anywhere)
    assert any("parameters" in line and "all-gather" in line for line in lines)
    assert not any("pictures" in line for line in lines)


def test_the_whole_batch(found):
    (line,) = found(seen=lambda images: anywhere(images) * 2 + anywhere(images).sum())
    assert line.startswith("a device has all 24 pictures, [24, 8, 8, 1]")


def test_a_train_step():
    settings = clip.get_config("smoke")
    settings.mesh.fsdp = 4
    chip = Chip(hbm=2**30, bandwidth=1e9, flops=1e11, links=1e8)
    planned = train_step.plan(settings, jax.devices(), chip)
    assert planned.replicated == [] and "nothing that is split is whole on a device" in train_step.text(planned)
    bad = planned._replace(replicated=["a device has all 64 pictures"])
    assert "REPLICATED: a device has all 64 pictures" in train_step.text(bad) and bad.json()["replicated"]
