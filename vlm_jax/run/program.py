"""The program of a run: init and train step of any model with any objective, jitted and placed on a mesh."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vlm_jax import models, objectives
from vlm_jax.params import optim, sharding
from vlm_jax.params.table import format_table, map_with_name
from vlm_jax.run.compiler_options import compiler_options
from vlm_jax.run.divergence import gradient_norms


@flax.struct.dataclass
class TrainState:
    """The state that a step reads and writes; randomness and data follow from `step`."""

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    objective_state: Any = None


class Program(NamedTuple):
    """The compiled functions of a run.

    `step(state, batch) -> (state, metrics, group norms)`. `init(rng, given) -> TrainState`; `given` overrides initial
    parameters by name.
    """

    model: Any
    init: Callable
    step: Callable
    abstract_state: TrainState  # shapes, dtypes and shardings
    table: str
    mesh: Mesh

    def lower_step(self, example: Mapping[str, np.ndarray], batch_size: int) -> jax.stages.Lowered:
        """Lowers `step` for global batches; `example` [b, ...] gives the examples' shapes and dtypes."""
        batch = sharding.abstract_batch(example, batch_size, self.mesh)
        with jax.set_mesh(self.mesh):  # kernels and models read the mesh: where to run, how batches are split
            return self.step.lower(self.abstract_state, batch)

    def compile_step(self, example: Mapping[str, np.ndarray], batch_size: int) -> jax.stages.Compiled:
        """Lowers and compiles `step`; arguments as for `lower_step`."""
        options = compiler_options(self.mesh.devices.flat[0])
        return self.lower_step(example, batch_size).compile(compiler_options=options)


def build_program(
    example: Mapping[str, np.ndarray],
    mesh: Mesh,
    steps: Callable[[int | str], int],
    *,
    model: Mapping[str, Any],
    objective: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    partition: Sequence,
    accumulate: int,
    ema: float | None,
    seed: int,
) -> Program:
    """Builds the jitted init and train step from config sections; `example` is a batch that gives shapes and dtypes."""
    model = models.build(model)
    objective = objectives.build(objective, model)
    one = {name: jnp.zeros((1, *np.shape(array)[1:]), array.dtype) for name, array in example.items()}
    init_params = lambda rng: model.init(rng, *objectives.model_inputs(one))["params"]
    shapes = jax.eval_shape(init_params, jax.random.key(seed))
    tx, groups, schedule = optim.build(optimizer, shapes, total_steps=steps("100%"), steps=steps)
    trainable = map_with_name(lambda name, _: groups[name] != "frozen", shapes)
    differentiate = partial(objectives.value_and_grad, objective, accumulate=accumulate, trainable=trainable)

    def init_state(rng, given):
        params = map_with_name(lambda name, leaf: given.get(name, leaf), init_params(rng))
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            ema=params if ema else None,
            objective_state=objective.init(params) if objective.init else None,
        )

    def train_step(state, batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, metrics, grads, objective_state = differentiate(state.params, batch, rng, state=state.objective_state)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=optim.ema_update(state.ema, params, ema, state.step) if ema else None,
            objective_state=objective_state,
        )
        return state, metrics, gradient_norms(grads)

    param_shardings = sharding.param_shardings(partition, shapes, mesh)
    abstract = jax.eval_shape(init_state, jax.random.key(seed), {})
    placed = sharding.follow_params(abstract, shapes, param_shardings, mesh)
    return Program(
        model=model,
        init=jax.jit(init_state, out_shardings=placed),
        step=jax.jit(
            train_step,
            donate_argnums=0,
            in_shardings=(placed, sharding.batch_sharding(mesh)),
            out_shardings=(placed, sharding.replicated(mesh), sharding.replicated(mesh)),
        ),
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, placed
        ),
        table=format_table(shapes, groups, param_shardings),
        mesh=mesh,
    )
