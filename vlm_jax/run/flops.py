"""FLOPs of matrix products and convolutions, counted in a jaxpr: a scan's body times its length.

A train step has two counts (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B):

- hardware FLOPs, of everything that the step computes: gradients, recomputation by remat and kernels, the optimizer.
- model FLOPs, of everything that the loss and its gradients need once. MFU uses model FLOPs.

A product [m, k] x [k, n] is 2 m k n FLOPs. Its gradients are one product of that size for each of the two operands that
depends on trained parameters. Model FLOPs therefore follow from the loss alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from vlm_jax import objectives
from vlm_jax.run.program import Program

# Pallas kernels of `vlm_jax.kernels`: name -> number of products of the size of q k^T, or of x y^T, in one call.
# Backward kernels recompute the logits. Causal attention counts as full attention, as in XLA.
KERNELS = {
    "attention_forward": 2,
    "attention_backward": 5,
    "attention_long_forward": 2,
    "attention_long_backward": 5,
    "contrastive_forward": 1,
    "contrastive_backward": 3,
}


def hardware_flops(jaxpr: Any) -> float:
    """Returns the FLOPs of one call of a closed jaxpr on all devices, without dead code.

    The larger branch of a `cond` counts. The body of a `while` counts once, because the number of iterations is
    unknown. The body of a `shard_map` counts once for each device. Work that XLA replicates over devices counts once.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _walk(needed, [False] * len(needed.invars))[0]


def model_flops(program: Program) -> float:
    """Returns the FLOPs of a batch's loss and gradients without recomputation, for any mesh and chip."""

    def loss(params, batch, rng, state, frozen):
        return objectives.value(
            program.objective, program.model, params, batch, rng, state=state, frozen=frozen, train=True
        )[0]

    state, rng = program.abstract_state, jax.eval_shape(lambda: jax.random.key(0))
    given = state.params, program.abstract_batch, rng, state.objective_state, program.abstract_frozen
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)  # of no mesh
    jaxpr = jax.make_jaxpr(loss)(*given).jaxpr
    trained = jax.tree.leaves(program.trainable)
    active = trained + [False] * (len(jaxpr.invars) - len(trained))
    needed, kept = partial_eval.dce_jaxpr(jaxpr, [True])
    return _walk(needed, list(itertools.compress(active, kept)))[0]


def _walk(jaxpr: Any, active: Sequence[bool]) -> tuple[float, list[bool]]:
    """Returns (FLOPs of a jaxpr and of the gradients of its active inputs, which outputs are active)."""
    depends = dict(zip(jaxpr.invars, active, strict=True))
    of = lambda var: not isinstance(var, Literal) and depends.get(var, False)
    total = 0.0
    for eqn in jaxpr.eqns:
        flops, out = _equation(eqn, [of(var) for var in eqn.invars])
        total += flops
        depends |= zip(eqn.outvars, out, strict=True)
    return total, [of(var) for var in jaxpr.outvars]


def _equation(eqn: Any, active: Sequence[bool]) -> tuple[float, list[bool]]:
    """Like `_walk`, for one equation."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    share = lambda flops: (flops * (1 + sum(active)), [any(active)])
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        return share(2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted))
    if name == "conv_general_dilated":
        summed = params["dimension_numbers"].rhs_spec[1:]  # input features of a group, and space
        size = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1][axis] for axis in summed)
        return share(size / math.prod(params["lhs_dilation"]))  # dilation puts zeros between inputs
    if name == "pallas_call":
        return _kernel(params, shapes, active), [any(active)] * len(eqn.outvars)
    if name == "scan":
        body = params["jaxpr"].jaxpr
        alike = lambda inner, outer: sum(a.aval.shape == b.aval.shape for a, b in zip(inner, outer, strict=True))
        carry = alike(body.outvars, eqn.outvars)  # stacked arrays have one axis more in the loop than in its body
        flops, out = _loop(body, active, alike(body.invars, eqn.invars) - carry, carry)
        return flops * params["length"], out
    if name == "while":
        return _loop(params["body_jaxpr"].jaxpr, active[params["cond_nconsts"] :], params["body_nconsts"])
    if name == "cond":
        branches = [_walk(branch.jaxpr, active[1:]) for branch in params["branches"]]
        flops, out = zip(*branches, strict=True)
        return max(flops), [any(same) for same in zip(*out, strict=True)]
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "call") if key in params), None)
    if inner is not None:  # jit, checkpoint, custom_jvp, custom_vjp, custom_vmap, shard_map
        flops, out = _walk(getattr(inner, "jaxpr", inner), active)
        devices = math.prod(params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", ()))
        return flops * devices, out
    return 0.0, [any(active) and name != "stop_gradient" and _differentiable(var.aval) for var in eqn.outvars]


def _loop(body: Any, active: Sequence[bool], consts: int, carry: int | None = None) -> tuple[float, list[bool]]:
    """Like `_walk`, for one iteration; a carry is active if it is active after any iteration.

    `carry` None: every input after the `consts` is a carry.
    """
    active = list(active)
    state = slice(consts, None if carry is None else consts + carry)
    while True:
        flops, out = _walk(body, active)
        after = [before or now for before, now in zip(active[state], out, strict=False)]
        if after == active[state]:
            return flops, out
        active[state] = after


def _kernel(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], active: Sequence[bool]) -> float:
    """Returns a kernel's FLOPs: by `KERNELS`, else by its `cost_estimate`, else its body times the grid's steps."""
    name = str(params.get("name"))
    if name in KERNELS:
        rank, count = (3, 3) if name.startswith("attention") else (2, 2)
        places = [i for i, shape in enumerate(shapes) if len(shape) == rank and shape[0] * shape[-2] > 1][:count]
        *batch, queries, width = shapes[places[0]]  # [B, L, H * D], or [N, D]; vectors are [1, N]
        size = 2 * math.prod(batch) * queries * shapes[places[1]][-2] * width
        # gradients cost twice the forward products if all operands are active, else the active operands' share of it
        return KERNELS[name] * size * (1 + 2 * sum(active[place] for place in places) / count)
    if params.get("cost_estimate"):
        return float(params["cost_estimate"].flops)
    inner = params["jaxpr"]
    return math.prod(params["grid_mapping"].grid) * _walk(inner, [False] * len(inner.invars))[0]


def _differentiable(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jax.dtypes.issubdtype(aval.dtype, np.inexact)
