"""What every objective and every part of one has to do: it enters by being declared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.models import IMAGES, SPACES, TOKENS, initial, section, tiny
from tests.support.towers import Towers
from vlm_jax import catalogue, models, objectives
from vlm_jax.errors import UserError
from vlm_jax.params import sharding

PARTS = {"similarities": ("contrastive", "similarity"), "penalties": ("contrastive", "penalty"),
         "targets": ("contrastive", "targets"), "negatives": ("contrastive", "negatives"),
         "corruptions": ("captioning", "corruption")}  # fmt: skip


def is_default(declaration):
    """Whether an objective has the part unless told otherwise: then it is tested with the objective."""
    name, key = PARTS.get(declaration.family, (None, None))
    return name and catalogue.of("terms")[name].options[key] == repr(declaration.name)


CASES = [d for d in catalogue.of("terms", *PARTS, "selections").values() if not is_default(d)]
CASES += [d for d in catalogue.of("spaces").values() if d.name not in {c.needs.get("model.space") for c in CASES}]
ROWS = 8
EMBEDDED = ("contrastive", *(f"alignment.{name}" for name in (
    "continual", "distillation", "entities", "masked_tokens", "missing", "modalities", "mutual_information",
    "self_supervision", "sentences", "soft_masks",
)))  # fmt: skip


def settings(declaration):
    """(config.model, config.objective) of a declaration: its family's, and what it needs."""
    objective = {"name": declaration.name}
    needs = dict(declaration.needs)
    if declaration.family == "selections":
        objective = {"terms": {"contrastive": {"on": "chosen"}}, "selections": {"chosen": {"name": declaration.name}}}
    elif declaration.family in PARTS:
        name, key = PARTS[declaration.family]
        objective = {"name": name, key: {"name": declaration.name}}
        needs = catalogue.of("terms")[name].needs | needs
    elif declaration.family == "spaces":
        objective, needs = {"name": "contrastive"}, {"model.space": SPACES.get(declaration.name, declaration.name)}
    config = {"model": section(needs.pop("model.name", "two_tower"), scan=True), "objective": objective}
    for path, value in needs.items():
        *folders, key = path.split(".")
        place = functools.reduce(lambda part, folder: part[folder], folders, config)
        place[key] = value
    return config["model"], config["objective"]


def embeddings_suffice(declaration):
    """Whether the smallest model with two embeddings has all that a declaration reads."""
    of_towers = tuple(f"vlm_jax.objectives.{n}" for n in EMBEDDED)
    contrastive = declaration.module.startswith(of_towers)
    other = declaration.family in ("selections", "spaces") or declaration.name in ("self_distillation", "masked_words")
    attends = declaration.name == "attention_distillation"
    return (contrastive and not attends and "model.name" not in declaration.needs) or other


def batch(model):
    rows = np.resize(np.arange(len(TOKENS)), ROWS)
    rng = np.random.default_rng(0)
    given = {"image": (IMAGES[rows] + rng.normal(size=(ROWS, *IMAGES.shape[1:]))).astype(np.float32)}
    given["audio"] = given["image"][::-1]
    if "write" in getattr(model, "can", ()):
        given = {"input_ids": TOKENS[rows[::-1]]}
    wrong = TOKENS[(rows[:, None] + [1, 2]) % len(TOKENS)]
    tasks = {f"{task}_token_ids": TOKENS[(rows + i) % len(TOKENS)] for i, task in enumerate(("cap", "aref", "gcap"))}
    tasks |= {key.replace("token_ids", "counts"): ids > i for i, (key, ids) in enumerate(tasks.items())}
    crops = rng.normal(size=(3, ROWS, *IMAGES.shape[1:])).astype(np.float32)
    tasks |= {"global": crops[0], "local": np.moveaxis(crops[1:], 0, 1), "visual": rows > 0}
    tasks["views"] = tasks["local"]
    tasks |= {"image_present": rows != 1, "token_ids_present": rows != 2}
    tasks["has"] = (rows[:, None] + np.arange(5)) % 3 == 0
    tasks["triples"] = np.stack([wrong[..., :3]] * 3, axis=2)
    tasks |= {"paraphrases": wrong[:, ::-1], "tags": TOKENS[rows][:, 1:4, None]}
    return given | tasks | {"token_ids": TOKENS[rows], "texts": wrong, "concept": rows, "denoiser": rows % 2}


def begin(objective, model, given):
    """(parameters with the terms' own, memory after a step)"""
    params, rng = initial(model, *objectives.model_inputs(given, model)), jax.random.key(0)
    frozen = objectives.frozen(objective)
    make = functools.partial(objectives.make, objective, model, frozen=frozen)
    if jax.eval_shape(make, params, given, rng) == jax.eval_shape(lambda: (params, None)):
        return params, None
    params, state = jax.jit(make)(params, given, rng)
    if state is None:
        return params, None
    take_step = functools.partial(objectives.value_and_grad, objective, model, frozen=frozen)
    step = lambda params, state: objectives.update(
        objective, state, params, take_step(params, given, rng, state=state)[3], rng, 0
    )
    state = jax.jit(step)(params, state)
    return params, state | {"teachers": jax.tree.map(lambda leaf: 1.1 * jnp.roll(leaf, 1), state["teachers"])}


def assert_close(got, want):
    """To 2e-5, or 2e-6 of the tree's largest number: some gradients, of keys' biases, are sums that vanish."""
    largest = np.nanmax([np.nanmax(np.abs(leaf), initial=0) for leaf in jax.tree.leaves(want)])
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6 * largest)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("declaration", CASES, ids=lambda d: f"{d.family}-{d.name}")
def test_objective(declaration):
    model_section, section = settings(declaration)
    if embeddings_suffice(declaration):
        space = model_section.get("space")
        space = space and catalogue.build(
            "spaces", SPACES.get(space, space) if isinstance(space, str) else space, "config.model.space"
        )
        model = Towers(tokens=declaration.needs.get("model.image.pool") == "all", space=space)
    else:
        model = models.build(model_section)
    objective, given = objectives.build(section, model, load=tiny), batch(model)
    params, state = begin(objective, model, given)
    frozen = objectives.frozen(objective)
    differentiate = functools.partial(objectives.value_and_grad, objective, model, frozen=frozen, train=False)
    run = jax.jit(
        lambda params, batch, k: differentiate(params, batch, jax.random.key(0), state=state, accumulate=k)[:3],
        static_argnums=2,
    )
    value, metrics, grads = whole = run(params, given, 1)
    assert np.isfinite(value) and value == metrics["loss"]
    assert any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):  # accumulated, on eight devices
        spread = run(params, sharding.to_global(given, mesh, ROWS), 2)
    for part, whole_part in zip(spread, whole, strict=True):
        assert_close(part, whole_part)
    if declaration.family == "selections" or declaration.name == "dynamic_distillation":
        return  # after a step the choice is another, or the weights, through which no gradient flows
    step = 1e-2 / optax.tree.norm(grads)
    moved = jax.tree.map(lambda p, g: p - step * g, params, grads)
    assert run(moved, given, 1)[0] < value


@pytest.mark.parametrize("declaration", CASES, ids=lambda d: f"{d.family}-{d.name}")
def test_a_mistyped_key_is_named(declaration):
    if declaration.family == "spaces":
        return  # in test_spaces.py
    model_section, section = settings(declaration)
    part = section[PARTS[declaration.family][1]] if declaration.family in PARTS else section
    part = section["selections"]["chosen"] if declaration.family == "selections" else part
    part["nonsense"] = 1
    with pytest.raises(UserError, match="nonsense") as error:
        objectives.build(section, models.build(model_section), load=tiny)
    assert "\n" not in str(error.value)
