"""The program of a run: init and train step of any model with any objective, jitted and placed on a mesh."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vlm_jax import models, objectives
from vlm_jax.data import mixture, naflex
from vlm_jax.errors import UserError
from vlm_jax.models import vocabulary
from vlm_jax.params import optim, sharding
from vlm_jax.params.table import format_table, map_with_name
from vlm_jax.run.compiler_options import compiler_options
from vlm_jax.run.divergence import gradient_norms


@flax.struct.dataclass
class TrainState:
    """The state that a step reads and writes; randomness and data follow from `step`.

    `objective_state` holds the memory of terms and the teachers that follow the run, see `objectives.make`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    objective_state: Any = None


class Program(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      model, objective: built.
      init: `init(rng, given) -> TrainState`; `given` overrides initial parameters of the model by name.
      step: `step(state, batch, frozen) -> (state, metrics, group norms)`.
      abstract_state, abstract_batch, abstract_frozen: shapes, dtypes and shardings.
      trainable: tree like the parameters of bools.
      groups: parameter name -> its group of the optimizer.
      table: the parameters, their optimizer groups and shardings, to read.
      mesh: the devices.
    """

    model: Any
    objective: objectives.Objective
    init: Callable
    step: Callable
    abstract_state: TrainState
    abstract_batch: dict[str, Any]
    abstract_frozen: dict[str, Any]
    trainable: Any
    groups: dict[str, str]
    table: str
    mesh: Mesh

    def frozen(self) -> dict[str, Any]:
        """Returns the parameters of teachers with a `spec`, on the mesh."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_frozen)
        return jax.device_put(objectives.frozen(self.objective), where)

    def on(self, example: Mapping[str, Any], batch_size: int | Mapping[str, int]) -> "Program":
        """Returns the program for batches of another shape; the state is the same. Arguments as of `build_program`."""
        return self._replace(abstract_batch=sharding.abstract_batch(example, batch_size, self.mesh))

    def trace_step(self) -> jax.stages.Traced:
        """Traces `step` for global batches."""
        with jax.set_mesh(self.mesh):  # kernels and models read the mesh: where to run, how batches are split
            return self.step.trace(self.abstract_state, self.abstract_batch, self.abstract_frozen)

    def lower_step(self) -> jax.stages.Lowered:
        """Traces and lowers `step`."""
        with jax.set_mesh(self.mesh):
            return self.trace_step().lower()

    def compile_step(self) -> jax.stages.Compiled:
        """Lowers and compiles `step`."""
        return self.lower_step().compile(compiler_options=compiler_options(self.mesh.devices.flat[0]))


def train_step(
    state: TrainState,
    batch: Any,
    frozen: Mapping[str, Any],
    *,
    objective: objectives.Objective,
    model: Any,
    tx: optax.GradientTransformationExtraArgs,
    schedule: Callable,
    reach: Mapping[str, Any],
    trainable: Any,
    accumulate: int,
    ema: float | None,
    seed: Any,
    first: int = 0,
) -> tuple[TrainState, dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns (state, metrics, group norms) after one step, of a run or of an adaptation.

    Args:
      state, batch, frozen: of the step, see `Program`.
      objective, model: see `objectives.value_and_grad`.
      tx, schedule, reach: see `optim.build`.
      trainable: tree like the parameters of bools; None: all train.
      accumulate: number of micro-batches.
      ema: decay of the average of parameters, or None.
      seed: of the run; the step's key follows from both.
      first: the steps before this stage of the run; its first step is told to the optimizer as `begins`.
    """
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    _, metrics, grads, features = objectives.value_and_grad(
        objective, model, state.params, batch, rng, step=state.step, state=state.objective_state, frozen=frozen,
        accumulate=accumulate, trainable=trainable,
    )  # fmt: skip
    active = objectives.active(reach, state.step)
    begins = state.step == first if first else False
    updates, opt_state = tx.update(grads, state.opt_state, state.params, active=active, begins=begins)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads), "lr": schedule(state.step)}
    state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=optim.ema_update(state.ema, params, ema, state.step) if ema else None,
        objective_state=objectives.update(objective, state.objective_state, params, features, rng, state.step),
    )
    return state, metrics, gradient_norms(grads)


def batch_sizes(
    data: Mapping[str, Any], batch_size: int, mesh: Mesh, accumulate: int = 1
) -> int | dict[str, int] | dict[int, int]:
    """Returns the rows of a batch by a config's `data`, in the form of `loader.Loader.sizes`.

    Raises:
      UserError: the devices would get different numbers of rows.
    """
    if buckets := naflex.read(data.get("naflex")):
        buckets.check(mesh.shape["data"] * mesh.shape["fsdp"], accumulate)
        return buckets.sizes
    sizes = mixture.sizes(data.get("sources"), batch_size)
    sharding.check_batch_size(sizes, mesh)
    return sizes


def build_program(
    example: Mapping[str, Any],
    batch_size: int | Mapping[str, int],
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
    tokenizer: Any = None,
    load: Callable[[str], Any] | None = None,
    first: int = 0,
) -> Program:
    """Builds the jitted init and train step from config sections.

    `example` [b, ...] gives the examples' shapes and dtypes, `batch_size` the rows, or {row set: rows} of a batch of
    several; `tokenizer` and `load` are for `objectives.build`, `first` is for `train_step`.
    """
    if ema is not None and not 0 <= ema < 1:
        raise UserError(f"config.ema is {ema}; expected a decay from 0 to 1, such as 0.999")
    model = models.build(model)
    vocabulary.check_padding(model, tokenizer)
    objective = objectives.build(objective, model, steps=steps, tokenizer=tokenizer, load=load)
    batch = sharding.abstract_batch(example, batch_size, mesh)
    frozen = objectives.frozen(objective)
    zeros = partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))

    def init_params(rng, given):
        one = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), batch)
        params = map_with_name(
            lambda name, leaf: given.get(name, leaf), model.init(rng, *objectives.model_inputs(one, model))["params"]
        )
        return objectives.make(objective, model, params, zeros(batch), rng, zeros(frozen))

    shapes, memory = jax.eval_shape(init_params, jax.random.key(seed), {})
    reach = objectives.reached(objective, model, shapes, batch, memory, frozen)
    tx, groups, schedule = optim.build(optimizer, shapes, total_steps=steps("100%"), steps=steps, reach=reach)
    trainable = map_with_name(lambda name, _: not groups[name].startswith(optim.FROZEN), shapes)

    def init_state(rng, given):
        params, memory = init_params(rng, given)
        params = optim.zeroed(optimizer, params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            ema=params if ema else None,
            objective_state=memory,
        )

    take_step = partial(
        train_step, objective=objective, model=model, tx=tx, schedule=schedule, reach=reach, trainable=trainable,
        accumulate=accumulate, ema=ema, seed=seed, first=first,
    )  # fmt: skip

    param_shardings = sharding.param_shardings(partition, shapes, mesh)
    abstract = jax.eval_shape(init_state, jax.random.key(seed), {})
    placed = sharding.follow_params(abstract, shapes, param_shardings, mesh)
    if memory:
        terms = sharding.split_rows(memory["terms"], mesh)
        placed = placed.replace(objective_state=placed.objective_state | {"terms": terms})
    place_frozen = {name: sharding.param_shardings(sharding.RULES, params, mesh) for name, params in frozen.items()}
    described = partial(jax.tree.map, lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where))
    return Program(
        model=model,
        objective=objective,
        init=jax.jit(init_state, out_shardings=placed),
        step=jax.jit(
            take_step,
            donate_argnums=0,
            in_shardings=(placed, sharding.batch_sharding(mesh), place_frozen),
            out_shardings=(placed, sharding.replicated(mesh), sharding.replicated(mesh)),
        ),
        abstract_state=described(abstract, placed),
        abstract_batch=batch,
        abstract_frozen=described(frozen, place_frozen),
        trainable=trainable,
        groups=groups,
        table=format_table(shapes, groups, param_shardings),
        mesh=mesh,
    )
