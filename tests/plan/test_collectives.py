"""Compiled programs read back: what runs how often, what moves to and from HBM, and who talks to whom."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vlm_jax.params import sharding
from vlm_jax.plan import collectives, hlo

# As libtpu 0.0.52 writes a step on 2 x 2 chips, shortened: a loop without a known trip count, a gather that runs beside
# a fusion in parts, a reduce-scatter said as an all-reduce of which each keeps a slice, groups along named axes.
TPU = """HloModule jit_step, is_scheduled=true

%begin (p.1: bf16[1,64,128]) -> (bf16[1,64,128], bf16[1,128,128], u32[]) {
  %p.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}, use_global_device_ids=true, metadata={op_name="jit(step)/mlp/fc1"}
  ROOT %custom-call.1 = (bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p.2: bf16[1,64,128], p.3: bf16[512,128]) -> (bf16[512,128], bf16[1,128,128]) {
  %p.2 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.3 = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.2 = bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  %add.1 = bf16[512,128]{1,0:T(8,128)(2,1)} add(%p.3, %p.3)
  ROOT %tuple.1 = (bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)}) tuple(%add.1, %all-gather.2)
}

%done (p.9: bf16[1,64,128]) -> bf16[1,128,128] {
  %p.9 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.9 = bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p.9), channel_id=7, dimensions={1}
  ROOT %custom-call.9 = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} custom-call(%p.9, %all-gather.9), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p.4: bf16[128,128]) -> bf16[64,128] {
  %p.4 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[128,128]{1,0:T(8,128)(2,1)} all-reduce(%p.4), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %constant.1, %constant.1), dynamic_slice_sizes={64,128}
}

%body (arg.1: (s32[], bf16[512,128], bf16[24,64,128])) -> (s32[], bf16[512,128], bf16[24,64,128]) {
  %arg.1 = (s32[]{:T(128)}, bf16[512,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[24,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %x.1 = bf16[512,128]{1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=1
  %w.1 = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.1), index=2
  %zero.1 = s32[]{:T(128)} constant(0)
  %slice.1 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%w.1, %i.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,128}
  %begin.1 = (bf16[1,64,128]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%slice.1), kind=kCustom, calls=%begin
  %fusion.1 = (bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[1,128,128]{2,1,0:T(8,128)(2,1)S(1)}) fusion(%slice.1, %x.1), kind=kLoop, calls=%async_collective_fusion.1
  %y.1 = bf16[512,128]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=0
  %end.1 = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} fusion(%begin.1), kind=kCustom, calls=%done
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[24,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%i.1, %y.1, %w.1)
}

%condition (arg.2: (s32[], bf16[512,128], bf16[24,64,128])) -> pred[] {
  %arg.2 = (s32[]{:T(128)}, bf16[512,128]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[24,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %constant.2 = s32[]{:T(128)} constant(24)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %constant.2), direction=LT
}

ENTRY %main (x: bf16[512,128], w: bf16[24,64,128], g: bf16[128,128]) -> bf16[64,128] {
  %x = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %g = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(2)
  %constant.3 = s32[]{:T(128)} constant(0)
  %tuple.3 = (s32[]{:T(128)}, bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[24,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%constant.3, %x, %w)
  %collective-permute-start.1 = (bf16[128,128]{1,0:T(8,128)(2,1)}, bf16[128,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) collective-permute-start(%g), channel_id=3, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %while.1 = (s32[]{:T(128)}, bf16[512,128]{1,0:T(8,128)(2,1)}, bf16[24,64,128]{2,1,0:T(8,128)(2,1)}) while(%tuple.3), condition=%condition, body=%body
  %collective-permute-done.1 = bf16[128,128]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start.1)
  %all-reduce.2 = (f32[128]{0:T(128)}, f32[]{:T(128)}) all-reduce(%b, %c), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%add
  %b = f32[128]{0:T(128)} constant({...})
  %c = f32[]{:T(128)} constant(1)
  ROOT %fusion.2 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/grad"}
}
"""  # noqa: E501


def test_a_tpu_program():
    program = hlo.parse(TPU)
    found = collectives.collectives(program, dict(data=2, fsdp=2))
    seen = {one.kind: (one.axes, one.asynchronous, one.count, one.bytes, one.largest, one.where) for one in found}
    part, whole = 64 * 128 * 2, 128 * 128 * 2
    assert seen == {
        "all-gather": (("fsdp",), True, 24, 24 * part, whole, "jit(step)/mlp/fc1"),
        "reduce-scatter": (("fsdp",), False, 1, whole // 2, whole, "jit(step)/grad"),
        "collective-permute": (("data",), True, 1, whole, whole, ""),
        "all-reduce": (("data", "fsdp"), False, 1, 2 * 516 * 3 // 4, 516, ""),
    }
    assert found[0].kind == "all-gather"
    # a turn: a slice of w into VMEM and its three indices, x read and written; at the end what is kept of g
    assert hlo.hbm_bytes(program) == 24 * (part + 12 + 2 * 512 * 128 * 2) + part


def test_what_nothing_runs_beside_is_waited_for():
    permutes = lambda text: next(
        one.asynchronous
        for one in collectives.collectives(hlo.parse(text), dict(data=2, fsdp=2))
        if one.kind == "collective-permute"
    )
    lines = TPU.splitlines()
    start = next(line for line in lines if line.startswith("  %collective-permute-start"))
    end = next(i for i, line in enumerate(lines) if line.startswith("  %collective-permute-done"))
    late = [line for line in lines[:end] if line != start] + [start, *lines[end:]]
    assert permutes(TPU) and not permutes("\n".join(late))
    assert not permutes(TPU.replace("{3,1}}", '{3,1}}, backend_config={"is_sync":true}'))  # a GPU's


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "tensor")),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ("tensor",)),
        ("replica_groups=mesh['a'=8] {'a'}", ("data", "fsdp", "tensor")),
        ("source_target_pairs={{0,1},{1,0}}", ("tensor",)),
    ],
)
def test_axes_of_groups(text, axes):
    mesh = dict(data=2, fsdp=2, tensor=2)
    assert collectives.axes_of(collectives.groups_of(text, mesh), mesh) == axes


@functools.cache
def compiled(layers):
    """A scan of layers whose weights are sharded over fsdp, rows over data x fsdp; the loss's gradient."""
    mesh = sharding.make_mesh(data=2, fsdp=4)
    place = lambda *spec: NamedSharding(mesh, P(*spec))

    def loss(w, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    weights, rows = place(None, "fsdp"), place(("data", "fsdp"))
    step = jax.jit(jax.grad(loss), in_shardings=(weights, rows), out_shardings=weights)
    return step.lower(jnp.ones((layers, 64, 64)), jnp.ones((16, 64))).compile()


def test_a_compiled_step():
    """Weights are gathered in each turn of the forward and of the backward loop; gradients are reduced over all."""
    program = hlo.parse(compiled(6).as_text())
    found = collectives.collectives(program, dict(data=2, fsdp=4, tensor=1))
    gathers = [one for one in found if one.kind == "all-gather" and one.axes == ("fsdp",)]
    assert sum(one.count for one in gathers) % 6 == 0
    assert all(one.bytes == one.count * 3 * 16 * 64 * 4 for one in gathers if one.largest == 64 * 64 * 4)
    reduced = {axis for one in found if "reduce" in one.kind for axis in one.axes}
    assert reduced == {"data", "fsdp"} and not any(one.asynchronous for one in found)


def test_bytes_are_those_of_the_turns():
    """Without a loop about what XLA counts; with one, more with each turn."""
    fn = lambda x, y: jnp.tanh(x @ y) + jnp.sum(x)
    binary = jax.jit(fn).lower(*[jnp.ones((256, 256))] * 2).compile()
    own = hlo.hbm_bytes(hlo.parse(binary.as_text()))
    assert own == pytest.approx(binary.cost_analysis()["bytes accessed"], rel=0.1)
    few, many = (hlo.hbm_bytes(hlo.parse(compiled(n).as_text())) for n in (6, 18))
    assert 2.5 < many / few < 3.2


def test_loops_known_to_xla():
    binary = (
        jax.jit(lambda x: jax.lax.fori_loop(3, 10, lambda _, x: jnp.sin(x @ x), x)).lower(jnp.ones((8, 8))).compile()
    )
    counts = {times for _, step, times in hlo.parse(binary.as_text()).steps() if step.opcode == "parameter"}
    assert counts == {1, 7}


def test_work_that_could_hide_it():
    """An elementwise fusion beside a gather counts if it moves what the gather sends; a product always does."""
    gathers = lambda text: next(
        one.asynchronous
        for one in collectives.collectives(hlo.parse(text), dict(data=2, fsdp=2))
        if one.kind == "all-gather"
    )
    small = TPU.replace("bf16[512,128]", "bf16[8,128]")
    product = small.replace("add(%p.3, %p.3)", "dot(%p.3, %p.3)")
    assert gathers(TPU) and not gathers(small) and gathers(product)


def test_slices_that_the_text_only_calls():
    text = """HloModule m

%slicing (p.1: bf16[64,128]) -> bf16[8,128] {
  %p.1 = bf16[64,128]{1,0} parameter(0)
  ROOT %slice.1 = bf16[8,128]{1,0} slice(%p.1), slice={[0:8], [0:128]}
}

ENTRY %main (x: bf16[64,128]) -> bf16[8,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %slice-start = ((bf16[64,128]{1,0}), bf16[8,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%slicing
  ROOT %slice-done = bf16[8,128]{1,0:S(1)} async-done(%slice-start)
}
"""
    assert hlo.hbm_bytes(hlo.parse(text)) == 8 * 128 * 2
