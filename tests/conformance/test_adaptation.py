"""What every method of adaptation has to do: a method enters by being declared."""

import ast
import dataclasses
import inspect

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vlm_jax
from tests.support.few_shot import NAMES, clip_like, few_shot_task, moved, pictures
from tests.support.few_shot import tuned as tuned_by
from vlm_jax import catalogue
from vlm_jax.adapt import methods
from vlm_jax.adapt.methods import Fits, fit
from vlm_jax.adapt.recipe import tree
from vlm_jax.adapt.task import accuracy
from vlm_jax.errors import UserError
from vlm_jax.params.sharding import make_mesh
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo.adapters import save_adapter

HEADS = catalogue.of("heads")
TRAINED = catalogue.of(*methods.TRAINED)
GIVEN = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def base():
    return clip_like(scan=True)


@pytest.fixture(scope="module")
def task(base):
    """(shots, validation, task)."""
    return few_shot_task(base, pictures())


@pytest.fixture(scope="module")
def options(base, tmp_path_factory):
    """Method -> options without a useful default."""
    folder = tmp_path_factory.mktemp("start")
    path = folder / "vpt.safetensors"
    save_adapter(path, base, tuned_by(base, TRAINED["vpt"].load()(base.model), pictures()))
    adapter = folder / "adapter.safetensors"
    save_adapter(adapter, base, tuned_by(base, TRAINED["adapter"].load()(base.model, width=2), pictures()))
    vlm_jax.save_pretrained(base, folder / "other")
    return {
        "pretrained_modules": {"start": str(path)},
        "m2pt": {"auxiliary": f"{folder / 'other'}:text"},
        **{name: {"files": f"one={adapter},two={adapter}"} for name in ("adapter_fusion", "adapter_stack")},
    }


def adapted(name, base, task, given):
    if name in HEADS:
        return fit(name)(base, *task)
    recipe, training = TRAINED[name].load()(base.model, **given), {"steps": 2, "batch_size": 4, "learning_rate": 1e-2}
    taken = inspect.signature(recipe.fit if isinstance(recipe, Fits) else methods.search_rate).parameters
    return fit(name)(base, *task, **given, **{key: value for key, value in training.items() if key in taken})


def logits(model):
    if model.head is not None:
        return model.head(model.embed_images(GIVEN))
    return model.class_logits(model._pictures(GIVEN), NAMES)


@pytest.mark.parametrize("name", HEADS)
def test_head(name, base, task, tmp_path):
    few = task[0]
    head = adapted(name, base, task, {})
    assert not moved(base, head)
    found = logits(head)
    assert found.shape == (4, 3) and np.isfinite(found).all()
    if head.head is not None:  # zero_shot learns nothing
        assert accuracy(base, head, few, NAMES) >= 1 / 3  # it names its own training pictures no worse than by chance
    comes_back(base, head, found, tmp_path)
    refuses(name, base, task)


@pytest.mark.parametrize("name", TRAINED)
def test_trained(name, base, task, tmp_path, monkeypatch, request):
    declaration = TRAINED[name]
    given = request.getfixturevalue("options")[name] if "" in declaration.options.values() else {}
    make = declaration.load()
    if declaration.needs:  # another model: the two-tower model is refused
        with pytest.raises(UserError) as error:
            adapted(name, base, task, given)
        assert "\n" not in str(error.value)
        return
    recipe, begun = make(base.model, **given), []
    if not isinstance(recipe, Fits):
        begin = type(recipe).begin
        keep = lambda self, rng, model, leaves: (
            begun.append((self, leaves, begin(self, rng, model, leaves))) or begun[-1][-1]
        )
        monkeypatch.setattr(type(recipe), "begin", keep)
    tuned = adapted(name, base, task, given)
    changed = moved(base, tuned)
    assert changed
    if not isinstance(recipe, Fits):
        recipe, leaves, own = begun[-1]  # what training began with
        combined = recipe.combine(own, leaves)
        assert changed <= combined.keys()
        if declaration.count or (declaration.family in ("modules", "prompts") and not given):
            assert sum(leaf.size for leaf in own.values()) == formula(declaration, base.model)
        if declaration.identity:
            untrained = dataclasses.replace(tuned, params=tree(leaves | combined))
            np.testing.assert_array_equal(logits(untrained), logits(base))
        if declaration.family in ("modules", "prompts"):
            assert all("/inserted_" in f"/{name}" for name in changed)
    others = task[1]
    by_pictures = tuned.class_logits(others.images, NAMES)
    assert accuracy(base, tuned, others, NAMES) == np.mean(by_pictures.argmax(1) == others.labels)
    found = logits(tuned)
    assert found.shape == (4, 3) and np.isfinite(found).all()
    comes_back(base, tuned, found, tmp_path)
    refuses(name, base, task)


def formula(declaration, model):
    """The paper's number of parameters, as the method declares it."""
    options = {name: ast.literal_eval(default) for name, default in declaration.options.items()}
    sizes = dict(D_t=model.text.width, D_v=model.image.width, L_t=model.text.depth, L_v=model.image.depth)
    sizes |= dict(H_t=model.text.heads, H_v=model.image.heads)
    return eval(declaration.count, {"min": min}, {**options, **sizes, "E": model.text.out_dim})


def comes_back(base, model, found, folder):
    """A small file gives the same model, bit for bit, on one device and, but for rounding, on eight."""
    save_adapter(folder / "a.safetensors", base, model)
    again = vlm_jax.load_adapter(folder / "a.safetensors", base)
    assert (again.classes, again.tokenize) == (NAMES, model.tokenize)
    np.testing.assert_array_equal(logits(again), found)
    assert named_leaves(again.params).keys() == named_leaves(model.params).keys()
    mesh = make_mesh(data=8)
    params = jax.device_put(again.params, NamedSharding(mesh, PartitionSpec()))
    spread = dataclasses.replace(again, mesh=mesh, params=params)
    np.testing.assert_allclose(logits(spread), found, rtol=1e-4, atol=1e-4)


def refuses(name, base, task):
    with pytest.raises(UserError, match="nonsense") as error:
        fit(name)(base, *task, nonsense=1)
    assert "\n" not in str(error.value)
