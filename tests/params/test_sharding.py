import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.run.program import build_program


def test_one_size_may_be_the_rest():
    assert dict(sharding.make_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(3)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        sharding.make_mesh(-1, -1)


def test_batches_are_spread_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 2)
    batch = sharding.to_global({"image": np.arange(8.0)}, mesh, 8)
    assert batch["image"].addressable_shards[0].data.shape == (2,)
    with pytest.raises(UserError, match=r"config.batch_size 6 cannot be split over 4 devices"):
        sharding.check_batch_size(6, mesh)


def test_row_sets_are_spread_each_by_its_own_size():
    mesh, sizes = sharding.make_mesh(2, 2, 2), {"batch": 8, "texts": 4}
    batch = {name: {"x": np.arange(2.0 * size).reshape(size, 2)} for name, size in sizes.items()}
    placed = sharding.to_global(batch, mesh, sizes)
    abstract = sharding.abstract_batch(batch, sizes, mesh)
    for name, size in sizes.items():
        np.testing.assert_array_equal(placed[name]["x"], batch[name]["x"])
        assert placed[name]["x"].addressable_shards[0].data.shape == (size // 4, 2)
        assert abstract[name]["x"].shape == (size, 2) and abstract[name]["x"].sharding == placed[name]["x"].sharding
    rows = sharding.rows_of_process(mesh, sizes)
    assert {name: own.tolist() for name, own in rows.items()} == {"batch": list(range(8)), "texts": list(range(4))}
    sharding.check_batch_size(sizes, mesh)
    with pytest.raises(UserError, match=r"^config.batch_size 10: the row set `texts` of 2 cannot be split over 4 dev"):
        sharding.check_batch_size({"batch": 8, "texts": 2}, mesh)


def test_specs_name_the_last_dimensions():
    mesh = sharding.make_mesh(1, 4, 2)
    params = {"blocks": {"mlp": {"fc1": {"kernel": jnp.zeros((3, 8, 16)), "bias": jnp.zeros((3, 16))}}}}
    shardings = sharding.param_shardings(sharding.RULES, params, mesh)["blocks"]["mlp"]["fc1"]
    assert shardings["kernel"].spec == P(None, "fsdp", "tensor")
    assert shardings["bias"].spec == P(None, "tensor")


def test_state_that_mirrors_parameters_follows_them():
    mesh = sharding.make_mesh(1, 8, 1)
    params = {"a": {"kernel": jnp.zeros((8, 2))}, "kernel": jnp.zeros((16,))}
    shardings = sharding.param_shardings(((r"a/kernel", ("fsdp", None)), (r".*", ())), params, mesh)
    state = {"mu": params, "count": jnp.zeros(()), "factored": {"a": {"kernel": jnp.zeros((8,))}}}
    followed = sharding.follow_params(state, params, shardings, mesh)
    assert followed["mu"]["a"]["kernel"].spec == P("fsdp", None)
    assert followed["mu"]["kernel"].spec == P(None)
    assert followed["factored"]["a"]["kernel"].spec == P()
    assert jax.tree.structure(followed) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"b", ()),), "no rule matches `a`"),
        (((r"b", ()), (r".*", ())), "`b` matches no parameter"),
        (((r"a", ("rows", None)),), "the mesh axis `rows`; the axes are data, fsdp, tensor"),
        (((r"a", (None, "fsdp")),), r"splits `a` \(8, 3\) over fsdp = 8, which does not divide 3"),
        (((r"a", (None, None, "fsdp")),), "more axes than dimensions"),
    ],
)
def test_what_does_not_fit_is_named(rules, message):
    with pytest.raises(UserError, match=message):
        sharding.param_shardings(rules, {"a": jnp.zeros((8, 3))}, sharding.make_mesh(1, 8, 1))


def test_activations_stay_split_over_the_batch():
    """A token table that is split over its width does not make XLA gather the batch."""
    sizes = dict(width=32, depth=2, heads=4, mlp_dim=48, relative_buckets=8, scan=True, remat="full")
    section = dict(name="encoder_decoder", encoder=sizes, decoder=dict(sizes, vocab_size=64, length=12))
    example = {name: np.zeros((1, 12), np.int32) for name in ("input_ids", "token_ids")}
    mesh = sharding.make_mesh(fsdp=8)
    program = build_program(
        example, 56, mesh, lambda length: 10, model=section, objective=dict(name="denoising"),
        optimizer=dict(name="sgd", lr=0.1), partition=sharding.RULES, accumulate=1, ema=None, seed=0,
    )  # fmt: skip
    shapes = set(re.findall(r"f32\[([\d,]+)\]", program.compile_step().as_text()))
    assert "7,12,32" in shapes
    # of all texts a device has but the columns that it looks up
    assert {shape for shape in shapes if shape.startswith("56,12")} <= {"56,12,4"}


def test_looking_up_leaves_the_table_where_it_is():
    """The same tokens and gradients as of a plain look-up; no device has the table, or its gradient, whole."""
    mesh = sharding.make_mesh(2, 4, 1)
    table = jax.random.normal(jax.random.key(0), (96, 32))
    ids = jax.random.randint(jax.random.key(1), (16, 6), 0, 96)
    columns = jax.sharding.NamedSharding(mesh, P(None, "fsdp"))

    def loss(embed):
        return jax.value_and_grad(lambda table: jnp.sum(embed(table, ids) ** 2 * jnp.arange(1, 33)))

    plain = loss(lambda table, ids: table[ids])(table)
    look_up = loss(lambda table, ids: sharding.look_up(lambda ids: table[ids], ids))
    with jax.set_mesh(mesh):
        step = jax.jit(look_up, in_shardings=columns, out_shardings=(None, columns)).lower(table).compile()
        looked_up = step(jax.device_put(table, columns))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), plain, looked_up)
    assert "[96,8]" in step.as_text() and "[96,32]" not in step.as_text()
    jax.tree.map(np.testing.assert_array_equal, plain, look_up(table))  # without a mesh
