"""FLOPs of matrix products and convolutions, counted in a jaxpr: a scan's body times its length.

Two counts of a train step (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix B, tells them apart):

- hardware FLOPs, of all that the step computes: gradients, what remat and kernels compute again, the optimizer's.
- model FLOPs, of what the loss and its gradients need once: MFU is made of them.

A product [m, k] x [k, n] is 2 m k n FLOPs. Its gradients are a product of that size for each of the two operands
that depends on trained parameters: that is how model FLOPs follow from the loss alone.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from vlm_jax import objectives
from vlm_jax.params import optim
from vlm_jax.params.table import map_with_name
from vlm_jax.run.program import Program

# Pallas kernels of `vlm_jax.kernels` by name: products of the size of q k^T, or of x y^T, in one call. Backward
# kernels compute the logits again. Causal attention counts whole, as XLA's does.
KERNELS = {
    "attention_forward": 2,
    "attention_backward": 5,
    "attention_long_forward": 2,
    "attention_long_backward": 5,
    "contrastive_forward": 1,
    "contrastive_backward": 3,
}


def hardware_flops(jaxpr: Any) -> float:
    """FLOPs of one call of a jaxpr (closed) on all devices; what no output needs is left out, as XLA leaves it out.

    The larger branch of a `cond` counts, the body of a `while` whose number of turns is not known once, the body of a
    `shard_map` on each device. What XLA computes on several devices alike counts once.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return _walk(needed, [False] * len(needed.invars))[0]


def model_flops(settings: Mapping[str, Any], program: Program, batch: Mapping[str, Any], steps: Callable) -> float:
    """FLOPs of the loss of a batch and of its gradients, without recomputation, whatever the mesh and the chip.

    Args:
      settings: a config of `vlm_jax.train`, as plain dicts.
      program: its program.
      batch: shapes and dtypes of a global batch.
      steps: duration -> steps, of the run.
    """
    params = program.abstract_state.params
    objective = objectives.build(settings["objective"], program.model)
    _, groups, _ = optim.build(settings["optimizer"], params, total_steps=steps("100%"), steps=steps)

    def loss(params, batch, rng, *state):
        return objective.loss(params, objective.encode(params, batch, rng, *state), batch, *state)[0]

    state = (jax.eval_shape(objective.init, params),) if objective.init else ()
    given = params, batch, jax.eval_shape(lambda: jax.random.key(0)), *state
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)  # of no mesh
    jaxpr = jax.make_jaxpr(loss)(*given).jaxpr
    trained = jax.tree.leaves(map_with_name(lambda name, _: groups[name] != "frozen", params))
    active = trained + [False] * (len(jaxpr.invars) - len(trained))
    needed, kept = partial_eval.dce_jaxpr(jaxpr, [True])
    return _walk(needed, list(itertools.compress(active, kept)))[0]


def _walk(jaxpr: Any, active: Sequence[bool]) -> tuple[float, list[bool]]:
    """FLOPs of a jaxpr with those of the gradients with respect to its active inputs; which outputs are active."""
    depends = dict(zip(jaxpr.invars, active, strict=True))
    of = lambda var: not isinstance(var, Literal) and depends.get(var, False)
    total = 0.0
    for eqn in jaxpr.eqns:
        flops, out = _equation(eqn, [of(var) for var in eqn.invars])
        total += flops
        depends |= zip(eqn.outvars, out, strict=True)
    return total, [of(var) for var in jaxpr.outvars]


def _equation(eqn: Any, active: Sequence[bool]) -> tuple[float, list[bool]]:
    """As `_walk`, of one equation."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [getattr(var.aval, "shape", ()) for var in eqn.invars]
    share = lambda flops: (flops * (1 + sum(active)), [any(active)])
    if name == "dot_general":
        ((contracted, _), _) = params["dimension_numbers"]
        return share(2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted))
    if name == "conv_general_dilated":
        summed = params["dimension_numbers"].rhs_spec[1:]  # in features of a group, and space
        size = 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1][axis] for axis in summed)
        return share(size / math.prod(params["lhs_dilation"]))  # between dilated inputs are zeros
    if name == "pallas_call":
        return _kernel(params, shapes, active), [any(active)] * len(eqn.outvars)
    if name == "scan":
        body = params["jaxpr"].jaxpr
        alike = lambda inner, outer: sum(a.aval.shape == b.aval.shape for a, b in zip(inner, outer, strict=True))
        carry = alike(body.outvars, eqn.outvars)  # of what is stacked, the loop has an axis more than its body
        flops, out = _loop(body, active, alike(body.invars, eqn.invars) - carry, carry)
        return flops * params["length"], out
    if name == "while":
        return _loop(params["body_jaxpr"].jaxpr, active[params["cond_nconsts"] :], params["body_nconsts"])
    if name == "cond":
        branches = [_walk(branch.jaxpr, active[1:]) for branch in params["branches"]]
        flops, out = zip(*branches, strict=True)
        return max(flops), [any(same) for same in zip(*out, strict=True)]
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "call") if key in params), None)
    if inner is not None:  # of jit, checkpoint, custom_jvp, custom_vjp, custom_vmap, shard_map
        flops, out = _walk(getattr(inner, "jaxpr", inner), active)
        devices = math.prod(params["mesh"].shape[axis] for axis in params.get("newly_manual_axes", ()))
        return flops * devices, out
    return 0.0, [any(active) and name != "stop_gradient" and _differentiable(var.aval) for var in eqn.outvars]


def _loop(body: Any, active: Sequence[bool], consts: int, carry: int | None = None) -> tuple[float, list[bool]]:
    """One turn, once it is known what of the carry is active: what is so after any turn. `carry` None: all others."""
    active = list(active)
    state = slice(consts, None if carry is None else consts + carry)
    while True:
        flops, out = _walk(body, active)
        after = [before or now for before, now in zip(active[state], out, strict=False)]
        if after == active[state]:
            return flops, out
        active[state] = after


def _kernel(params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], active: Sequence[bool]) -> float:
    """By the formula of its name, else by its `cost_estimate`, else its body on every step of the grid."""
    name = str(params.get("name"))
    if name in KERNELS:
        rank, count = (3, 3) if name.startswith("attention") else (2, 2)
        places = [i for i, shape in enumerate(shapes) if len(shape) == rank and shape[0] * shape[-2] > 1][:count]
        *batch, queries, width = shapes[places[0]]  # [B, L, H * D], or [N, D]; vectors are [1, N]
        size = 2 * math.prod(batch) * queries * shapes[places[1]][-2] * width
        # two of three, or of two, products of a gradient are of active operands where they all are
        return KERNELS[name] * size * (1 + 2 * sum(active[place] for place in places) / count)
    if params.get("cost_estimate"):
        return float(params["cost_estimate"].flops)
    inner = params["jaxpr"]
    return math.prod(params["grid_mapping"].grid) * _walk(inner, [False] * len(inner.invars))[0]


def _differentiable(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jax.dtypes.issubdtype(aval.dtype, np.inexact)
