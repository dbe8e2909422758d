"""What an objective adds to a run: what is off or out of reach stands still, and what a run holds besides the model."""

import collections
import dataclasses
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import models as tiny
from tests.support.towers import Towers
from vlm_jax import objectives
from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.objectives import Objective, Row, Selection, Teacher, Term
from vlm_jax.params import optim, sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.run import stages
from vlm_jax.run.program import build_program

B, STEPS = 8, 6
RNG = np.random.default_rng(0)
BATCH = {"image": RNG.normal(size=(B, 4, 4, 3)).astype(np.float32), "token_ids": RNG.integers(1, 14, (B, 3), np.int32)}


@method(family="models", differs="tiny")
def towers():
    """The model of these tests."""
    return Towers()


@method(family="terms", differs="for these tests")
def head_size(*, model) -> Term:
    """The size of a part of the term's own on the texts, and a memory of its mean."""

    def features(outputs, ctx):
        return outputs.part("head", nn.Dense(4), outputs["text_embedding"])

    def loss(outputs, features, rows, ctx):
        return jnp.mean((features - ctx.state) ** 2), {}

    follow = lambda state, features, ctx: 0.5 * (state + jnp.mean(features, 0))
    return Term("head_size", features, loss, init=lambda features: jnp.ones(4), update=follow)


def build(objective, example=BATCH, model=None, mesh=None, **options):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    steps = lambda length: optim.duration_to_steps(length, B, 64, STEPS)
    optimizer = dict(name="adamw", lr=0.01, weight_decay=0.1, schedule=dict(name="constant"))
    given = dict(optimizer=optimizer, partition=sharding.RULES, accumulate=1, ema=0.5, seed=0) | options
    return build_program(example, B, mesh, steps, model=model or dict(name="towers"), objective=objective, **given)


# Terms that are off.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_term_that_is_off_costs_nothing(accumulate):
    """Nor do its selection and its teacher; a NaN that they would make stays away."""
    ran = collections.Counter()

    def count(name, x, step):
        jax.debug.callback(lambda _: ran.update([name]), x.reshape(-1)[0])
        return jnp.where(step < 2, jnp.nan, x)

    def seen(outputs, ctx):
        return {"score": count("selection", outputs.teacher("average")["image_embedding"].sum(1), ctx.step)}

    def choose(features, rows, ctx):
        index = jax.lax.top_k(count("choice", features["score"], ctx.step), 4)[1]
        return {key: Row(key, index) for key in rows}

    features = lambda outputs, ctx: count("features", outputs["image_embedding"], ctx.step)
    loss = lambda outputs, features, rows, ctx: (jnp.mean(count("loss", features, ctx.step) ** 4), {"size": 1.0})
    late = Term("late", features, loss, on="chosen", weight=lambda step: jnp.where(step < 2, 0.0, 2.0))
    always = Term(
        "always", lambda o, ctx: o["image_embedding"] * o["text_embedding"], lambda o, f, r, c: (f.mean(), {})
    )
    objective = Objective((always, late), (Selection("chosen", seen, choose),), {"average": Teacher(decay=0.5)})
    params = tiny.initial(Towers(), BATCH["image"], BATCH["token_ids"])
    state = {"terms": {}, "teachers": {"average": params}}
    run = partial(objectives.value_and_grad, state=state, accumulate=accumulate)
    both = jax.jit(lambda step: run(objective, Towers(), params, BATCH, jax.random.key(0), step=step)[:3])
    alone = jax.jit(lambda: run(Objective((always,)), Towers(), params, BATCH, jax.random.key(0))[:3])()

    off = jax.block_until_ready(both(1))
    jax.effects_barrier()
    assert not ran
    np.testing.assert_allclose(off[0], alone[0], rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), off[2], alone[2])
    assert np.isnan(off[1]["late/loss"]) and np.isnan(off[1]["late/size"]) and off[1]["loss"] == off[0]

    on = jax.block_until_ready(both(2))
    jax.effects_barrier()
    assert set(ran) == {"selection", "choice", "features", "loss"}
    np.testing.assert_allclose(on[0], on[1]["always/loss"] + 2 * on[1]["late/loss"], rtol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(on[2]))


LATE = dict(
    terms=dict(
        contrastive=dict(reaches="image.*|logit_.*"),
        head_size=dict(weight=dict(begin="2 steps"), reaches="text_head/.*|objective/.*"),
    ),
    teachers=dict(average=dict(decay=0.5)),
)


@pytest.fixture(scope="module")
def states():
    """(program, the states of a run of four steps, metrics of each step)"""
    program = build(LATE)
    step, states, shown = program.compile_step(), [program.init(jax.random.key(0), {})], []
    for _ in range(4):
        given = jax.tree.map(jnp.copy, states[-1])  # the step takes its input's place
        state, metrics, _ = step(given, sharding.to_global(BATCH, program.mesh, B), {})
        states, shown = [*states, state], [*shown, metrics]
    return program, jax.device_get(states), jax.device_get(shown)


def test_what_no_term_reaches_stands_still_and_what_is_off_until_it_is_on(states):
    """Bit for bit, weight decay, moments and averages included."""
    program, states, shown = states
    params = [
        named_leaves({"params": s.params, "ema": s.ema, "teachers": s.objective_state["teachers"]}) for s in states
    ]
    moments = [named_leaves(s.opt_state) for s in states]
    late = ("text_head/", "objective/head_size/head/")
    for before, after, on in zip(params[:-1], params[1:], (False, False, True, True), strict=True):
        for name, leaf in before.items():
            moves = "embed/" not in name and (on or not any(part in name for part in late))
            assert np.array_equal(leaf, after[name]) != moves, (name, on)
    moments_of = lambda i: [leaf for name, leaf in moments[i].items() if any(part in name for part in late)]
    assert moments_of(2) and not any(np.any(leaf) for leaf in moments_of(2))
    assert all(np.any(leaf) for leaf in moments_of(3))
    assert not any("embed/" in name for name in moments[0])
    assert "frozen: no term reaches it" in next(row for row in program.table.splitlines() if "embed/embedding" in row)
    assert [bool(np.isnan(metrics["head_size/loss"])) for metrics in shown] == [True, True, False, False]


def test_the_memory_of_a_term_that_is_off_stands_still(states):
    memory = [state.objective_state["terms"]["head_size"] for state in states[1]]
    assert np.array_equal(memory[0], memory[2]) and not np.array_equal(memory[2], memory[3])


def test_reached(states):
    """For each parameter, the weights that switch its terms on."""
    program, _, _ = states
    abstract = program.abstract_state
    reach = objectives.reached(
        program.objective, program.model, abstract.params, BATCH, abstract.objective_state, program.abstract_frozen
    )
    late = (program.objective.terms[1].weight,)
    assert reach == {
        **dict.fromkeys(("image_fc/kernel", "image_fc/bias", "image_head/kernel", "image_head/bias"), None),
        **dict.fromkeys(("logit_scale", "logit_bias"), None),
        **dict.fromkeys(("text_head/kernel", "text_head/bias"), late),
        **dict.fromkeys(("objective/head_size/head/kernel", "objective/head_size/head/bias"), late),
    }
    assert [bool(objectives.active(reach, step)[late]) for step in (0, 1, 2, 5)] == [False, False, True, True]


def test_a_teacher_of_some_parameters_follows_them_bit_for_bit():
    """Of the image tower alone, for 20 steps, on a mesh."""
    terms = dict(contrastive={}, feature_distillation=dict(of=["image_embedding"]))
    objective = dict(terms=terms, teachers=dict(average=dict(decay=0.75, of="image.*")))
    split = ((r"image_fc/kernel", ("fsdp", None)), (r".*", ()))
    program = build(objective, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2), ema=None, partition=split)
    state, step = program.init(jax.random.key(0), {}), program.compile_step()
    batch = sharding.to_global(BATCH, program.mesh, B)
    follow = jax.jit(lambda a, p: a + 0.25 * (p - a))
    expected = {n: leaf for n, leaf in jax.device_get(named_leaves(state.params)).items() if n.startswith("image")}
    for _ in range(20):
        state, _, _ = step(state, batch, {})
        params = jax.device_get(named_leaves(state.params))
        expected = {n: follow(old, params[n]) for n, old in expected.items()}
    found = jax.device_get(named_leaves(state.objective_state["teachers"]["average"]))
    assert found.keys() == expected.keys() and len(found) == 4
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))
    assert not np.array_equal(found["image_fc/kernel"], params["image_fc/kernel"])


def test_a_stage_that_adds_terms_begins_them_as_a_new_run_and_its_teacher_as_the_model():
    before, term = build(dict(name="contrastive")), dict(reaches="text_head/.*|objective/.*")
    terms = dict(contrastive={}, head_size=term, feature_distillation=dict(of=["image_embedding"]))
    after = build(dict(terms=terms, teachers=dict(average=dict(decay=0.5, of="image.*"))))
    stage = stages.Stage(2, 1, STEPS, {})
    stages.check(before.abstract_state, after.abstract_state, stage)
    state, new = before.init(jax.random.key(1), {}), jax.jit(after.init)(jax.random.key(0), {})
    found = stages.carried(state, after.abstract_state, stage, partial(after.init, jax.random.key(0), {}))
    found, state, new = (named_leaves(jax.device_get(tree)) for tree in (found, state, new))
    assert found.keys() == new.keys() > state.keys()
    for name, leaf in found.items():
        teacher = name.replace("objective_state/teachers/average/", "params/")
        np.testing.assert_array_equal(leaf, state.get(name, state.get(teacher, new[name])), err_msg=name)
    own = [name for name in found if "objective/head_size" in name]
    assert len(own) == 8 and np.any(found["params/objective/head_size/head/kernel"])  # kernel, bias: ema, mu, nu
    stages.check(after.abstract_state, before.abstract_state, stage)  # and they may go


def test_a_teacher_with_refresh_is_the_model_before_the_stage():
    """And one without goes on; the merge at a stage's end is between that model and the stage's own."""
    teachers = dict(before=dict(decay=1.0, refresh=True), first=dict(decay=1.0), slow=dict(decay=0.5))
    objective = dict(terms=dict(contrastive={}, topology={}), teachers=teachers)
    program = build(objective)
    assert objectives.refreshed(program.objective) == {"before"}
    state, step = program.init(jax.random.key(0), {}), program.compile_step()
    held = lambda state, teacher: jax.device_get(state.objective_state["teachers"][teacher])
    params = lambda state: jax.device_get(state.params)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    begun = params(state)
    state, *_ = step(state, BATCH, {})
    trained, slow = params(state), held(state, "slow")
    stage = stages.Stage(2, 1, STEPS, {}, merge=stages.Merge("before", 0.25))
    stages.check(program.abstract_state, program.abstract_state, stage)
    state = stages.carried(state, program.abstract_state, stage, None, objectives.refreshed(program.objective))
    for teacher, wanted in (("before", trained), ("first", begun), ("slow", slow)):
        same(held(state, teacher), wanted)
    state, *_ = step(state, BATCH, {})
    same(held(state, "before"), trained)
    own, average = params(state), jax.device_get(state.ema)
    for alpha in (0.25, 1.0):
        found = stages.merged(state, dataclasses.replace(stage, merge=stages.Merge("before", alpha)))
        for tree, mine in ((found.params, own), (found.ema, average)):
            mix = lambda t, o, alpha=alpha: (1 - alpha) * np.float64(t) + alpha * np.float64(o)
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
            jax.tree.map(close, jax.device_get(tree), jax.tree.map(mix, trained, mine))
    same(params(found), own)  # alpha = 1
    step(found, BATCH, {})  # the compiled step takes it
    assert stages.merged(state, stages.Stage(2, 1, STEPS, {})) is state


def test_ewc_learns_of_stages_from_the_program():
    """No pull in the first stage; in the second, F is not 0 and the anchor is the model at its beginning."""
    table = ((".*", dict(transform=dict(name="ewc", weight=1.0))),)
    optimizer = dict(name="sgd", lr=0.1, schedule=dict(name="constant"), params=table)
    first, second = (build(dict(name="contrastive"), optimizer=optimizer, ema=None, first=n) for n in (0, 2))
    state = first.init(jax.random.key(0), {})
    part = lambda state, name: {
        n: x for n, x in jax.device_get(named_leaves(state.opt_state)).items() if f"/{name}/" in n
    }
    for program, steps in ((first, 2), (second, 2)):
        step = program.compile_step()
        for _ in range(steps):
            before, squares = jax.device_get(named_leaves(state.params)), part(state, "squares")
            fisher = part(state, "fisher")
            begins = program is second and int(state.step) == 2
            state, *_ = step(state, BATCH, {})
            wanted = {n.replace("squares", "fisher"): x for n, x in squares.items()} if begins else fisher
            jax.tree.map(np.testing.assert_array_equal, part(state, "fisher"), wanted)
            if begins:
                anchors = {n.split("/anchor/")[1]: x for n, x in part(state, "anchor").items()}
                jax.tree.map(np.testing.assert_array_equal, anchors, before)
    assert any(np.any(x) for x in part(state, "fisher").values())


# What a run holds.


def test_own_parts_teachers_and_memories_are_in_the_state_and_sharded(states):
    """By the rules of all parameters: large ones over fsdp; in the table and in the EMA."""
    terms = dict(
        contrastive=dict(negatives=dict(name="queue", size=2 * B)),
        matching=dict(fusion=dict(width=32, depth=1, heads=2)),
        feature_distillation=dict(teacher="other", of=["image_embedding"]),
    )
    teachers = dict(momentum=dict(decay=0.99), other=dict(spec="runs/other"))
    given = tiny.tiny("captioner")
    other = tiny.section("two_tower")
    other["image"]["out_dim"] = other["text"]["out_dim"] = 24
    other = SimpleNamespace(model=tiny.models.build(other))
    other.params = tiny.initial(other.model, tiny.IMAGES, tiny.TOKENS)
    example = {"image": given.inputs[0], "token_ids": tiny.TOKENS.astype(np.int32)}
    mesh = sharding.make_mesh(data=2, fsdp=4)
    objective = dict(terms=terms, teachers=teachers)
    program = build(objective, example, tiny.section("two_tower"), mesh, load=lambda spec: other)
    state = named_leaves(program.abstract_state)
    split = lambda leaf: "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
    own = "objective/matching/fusion/blocks_0/mlp/fc1/kernel"
    mapped = "objective/feature_distillation/image_embedding/kernel"
    for name in (f"params/{own}", f"ema/{own}", f"objective_state/teachers/momentum/{own}"):
        assert split(state[name]), name
    assert state[f"params/{mapped}"].shape == (16, 24) and f"ema/{mapped}" in state
    assert own in program.table and mapped in program.table
    queue = {name.rpartition("/")[2]: leaf.shape for name, leaf in state.items() if "/terms/contrastive/" in name}
    assert queue == {"key_image": (16, 16), "key_text": (16, 16), "filled": (16,), "next": ()}
    assert sum("mu" in name and own in name for name in state) == 1  # the optimizer has moments of parameters alone
    assert not any("teachers/other" in name for name in state)
    frozen = named_leaves(program.abstract_frozen)
    assert {name.partition("/")[2] for name in frozen} == set(named_leaves(other.params))
    assert any(split(leaf) for leaf in frozen.values())


# One line for each mistake.


LATER = dict(weight=dict(begin="7 steps"))


@pytest.mark.parametrize(
    "objective, message",
    [
        (dict(name="contrastve"), "config.objective.name is `contrastve` .did you mean `contrastive`"),
        (dict(terms=dict(contrastve={})), "terms.contrastve.name is `contrastve` .did you mean `contrastive`"),
        (dict(terms=dict(a=dict(name="contrastive", penalti="x"))), "terms.a has no key `penalti`; did you mean `pen"),
        (dict(terms=dict(contrastive={}, head_size=dict(sise=1))), "terms.head_size has no key `sise`"),
        (dict(terms=dict(contrastive={}), teacher={}), "objective has no key `teacher`; did you mean `teac"),
        (dict(name="contrastive", weight=0), "config.objective.weight is 0 at every step; leave the term out"),
        (dict(terms=dict(contrastive={}, head_size=LATER)), "head_size.weight: 1.0 from step 7 to step 6 is 0"),
        (dict(name="contrastive", reaches="txt/.*"), "the term `contrastive` reaches no parameter: its loss depends"),
        (dict(name="contrastive", on="pairs"), "`contrastive` reads the row set `pairs`, which neither the"),
        (dict(name="contrastive", targets="concept"), "targets is `concept`, which the batch lacks; expected"),
        (dict(name="contrastive", combine="projct"), "config.objective.combine is `projct`; expected one of: project"),
        (dict(name="contrastive", selections=dict(learned={})), "selections.learned.name is `learned`; expec"),
        (dict(name="captioning"), "`captioning` needs `next_token`|`captioning` needs `context`"),
    ],
)  # fmt: skip
def test_mistakes_are_named(objective, message):
    with pytest.raises(UserError, match=message) as error:
        build(objective)
    assert "\n" not in str(error.value)


def test_what_a_model_lacks_is_named():
    captioner, inputs = tiny.tiny("captioner").model, tiny.tiny("captioner").inputs
    objective = objectives.build(dict(name="matching"), captioner)
    batch = dict(zip(("image", "token_ids"), inputs, strict=True))
    with pytest.raises(
        UserError, match="`pairs` needs `image_embedding`, which neither the batch nor the model has"
    ) as error:
        jax.eval_shape(
            partial(objectives.make, objective, captioner), tiny.shapes_of("captioner"), batch, jax.random.key(0)
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "made, message",
    [
        (
            lambda i: {"image": Row("picture", i)},
            "`picture`, which its rows of `batch` lack; they have: im",
        ),
        (
            lambda i: {"image": objectives.Feature("tokens", i)},
            "`tokens`, which its features lack; they have: size",
        ),
    ],
)
def test_a_look_up_of_what_is_not_there_is_named(made, message):
    half = Selection("half", lambda o, ctx: {"size": o["image"].sum((1, 2, 3))}, lambda *given: made(jnp.arange(4)))
    term = Term("size", lambda o, ctx: o["image_embedding"], lambda o, f, r, ctx: (f.mean(), {}), on="half")
    params = tiny.initial(Towers(), BATCH["image"], BATCH["token_ids"])
    with pytest.raises(UserError, match=message):
        objectives.value(Objective((term,), (half,)), Towers(), params, BATCH, None)


def test_selections_stand_in_order():
    one = lambda name, on: Selection(name, lambda o, ctx: {}, lambda f, rows, ctx: {}, on=on)
    term = Term("size", lambda o, ctx: o["image_embedding"], lambda o, f, r, ctx: (f.mean(), {}), on="b")
    with pytest.raises(UserError, match="the selection `a` reads `b`, which is made later"):
        Objective((term,), (one("a", "b"), one("b", "batch")))
