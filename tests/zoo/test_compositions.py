"""Adapters' files composed by name: stacks, splits, fusion against loops, and what cannot be composed."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import vlm_jax
from tests.support.few_shot import GIVEN, NAMES, pictures
from tests.support.few_shot import clip_like as model_like
from vlm_jax.adapt.modules.compositions import adapter_fusion, named_files
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.adapter import Adapter
from vlm_jax.models.insertions.compositions import Fusion, Split
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.layers import Dense
from vlm_jax.params.table import map_with_name, named_leaves
from vlm_jax.zoo.adapters import save_adapter
from vlm_jax.zoo.compositions import by_tower, split, stacked

D, WIDTHS = 4, (2, 3)
ADAPTERS = tuple(Adapter("", width, name=name) for name, width in zip(("a", "b"), WIDTHS, strict=True))


@pytest.fixture(scope="module")
def base():
    return model_like(scan=True)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Two adapters' files, of random parameters, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    model = insertion.inserted(base.model, Adapter(width=1))
    begun = insertion.begin(jax.random.key(0), model, base.params, *GIVEN)
    for seed, name in enumerate(("style", "names")):
        params = _random(begun, seed)
        save_adapter(folder / name, base, dataclasses.replace(base, model=model, params=params, classes=NAMES))
    return {name: str(folder / name) for name in ("style", "names")}


def _random(params, seed):
    """New parameters are drawn by their names; values of a fusion stay."""
    draw = lambda name, leaf: np.random.default_rng([seed, *name.encode()]).normal(size=leaf.shape).astype(leaf.dtype)
    drawn = lambda name: "inserted_" in name and not name.endswith("fusion_value")
    return map_with_name(lambda name, leaf: draw(name, leaf) if drawn(name) else leaf, params)


def embed(model):
    return model.embed_image_batch(pictures()[0])


def test_stacked(base, files, tmp_path):
    """Small files; the result comes back bit for bit; towers of their own files are those files' towers."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
    assert all(Path(path).stat().st_size < 0.05 * size for path in files.values())
    both = stacked(base, files)
    found = embed(both)
    assert both.classes == NAMES
    save_adapter(tmp_path / "both", base, both)
    np.testing.assert_array_equal(embed(vlm_jax.load_adapter(tmp_path / "both", base)), found)
    one = vlm_jax.load_adapter(files["style"], base)
    np.testing.assert_array_equal(embed(stacked(base, {"style": files["style"]})), embed(one))
    towers = by_tower(base, {"image": files["style"], "text": files["names"]})
    np.testing.assert_array_equal(embed(towers), embed(one))
    save_adapter(tmp_path / "towers", base, towers)
    np.testing.assert_array_equal(embed(vlm_jax.load_adapter(tmp_path / "towers", base)), embed(one))
    parts = split(base, files, ends=[2])
    save_adapter(tmp_path / "parts", base, parts)
    again = vlm_jax.load_adapter(tmp_path / "parts", base)
    assert again.model.insertions == parts.model.insertions
    jax.tree.map(np.testing.assert_array_equal, again.params, parts.params)


@pytest.fixture(scope="module")
def dense():
    """(model, params, x, h) of one dense layer in float64, with the adapters' and the fusion's parameters."""
    with jax.enable_x64(True):
        x = np.random.default_rng(1).normal(size=(2, 3, D))
        model = Dense(D, dtype="float64", param_dtype="float64")
        params = model.init(jax.random.key(0), x)["params"]
        return model, params, x, np.asarray(model.apply({"params": params}, x))


def changed(dense, insertion_, seed=2):
    """(output, new parameters) of the layer with an insertion of random parameters."""
    model, params, x, _ = dense
    with jax.enable_x64(True):
        model = insertion.inserted(model, insertion_)
        params = insertion.begin(jax.random.key(0), model, params, x)
        params = _random(params, seed)
        named = {name.removeprefix("inserted_"): np.asarray(leaf) for name, leaf in named_leaves(params).items()}
        return np.asarray(model.apply({"params": params}, x)), named


def change(new, name, x):
    hidden = np.maximum(x @ new[f"{name}_down"] + new[f"{name}_down_bias"], 0)
    return hidden @ new[f"{name}_up"] + new[f"{name}_up_bias"]


def test_fusion_is_attention_over_adapters(dense, monkeypatch):
    values = np.random.default_rng(3).normal(size=(D, D))
    monkeypatch.setattr("vlm_jax.models.insertions.compositions.jnp.eye", lambda *shape: values)
    got, new = changed(dense, Fusion("", ADAPTERS))
    h = dense[-1]
    want = np.zeros_like(h)
    for place in np.ndindex(2, 3):
        x = h[place]
        changes = [change(new, name, x) for name in "ab"]
        query = x @ new["fusion_query"] + new["fusion_query_bias"]
        logits = [query @ (dh @ new["fusion_key"] + new["fusion_key_bias"]) for dh in changes]
        weights = np.exp(logits - np.max(logits)) / np.sum(np.exp(logits - np.max(logits)))
        want[place] = x + sum(w * (dh @ new["fusion_value"]) for w, dh in zip(weights, changes, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert sum(new[f"fusion_{part}"].size for part in ("query", "query_bias", "key", "key_bias", "value")) == 56


def test_a_fusion_of_one_adapter_begins_as_that_adapter(dense):
    """Bit for bit, whatever queries and keys are."""
    got, new = changed(dense, Fusion("", ADAPTERS[:1]))
    np.testing.assert_array_equal(new["fusion_value"], np.eye(D))
    np.testing.assert_array_equal(got, changed(dense, ADAPTERS[0])[0])


def test_a_split_has_an_adapter_for_each_token(dense):
    got, new = changed(dense, Split("", ADAPTERS, (1,)))
    h = dense[-1]
    want = np.concatenate([h[:, :1] + change(new, "a", h[:, :1]), h[:, 1:] + change(new, "b", h[:, 1:])], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_cannot_be_composed_is_named(base, files, dense, tmp_path):
    for ends in ((), (2, 1), (1, 2)):
        with pytest.raises(UserError, match="a split of 2 adapters has one rising end fewer"):
            changed(dense, Split("", ADAPTERS, ends))
    with pytest.raises(UserError, match="adapters of one module need one form and different names"):
        changed(dense, Fusion("", ADAPTERS[:1] * 2))
    with pytest.raises(UserError, match="there are no adapters to compose"):
        stacked(base, {})
    with pytest.raises(UserError, match="an adapter cannot be named 'a_b'"):
        stacked(base, {"a_b": files["style"]})
    with pytest.raises(UserError, match="by_tower takes adapters by tower"):
        by_tower(base, {"sound": files["style"]})
    for wrong in ("a.safetensors", "a=1,a=2"):
        with pytest.raises(UserError, match="expected NAME=FILE,NAME=FILE with different names"):
            named_files(wrong)
    model = insertion.inserted(base.model, LowRank(rank=1))
    params = insertion.begin(jax.random.key(0), model, base.params, *GIVEN)
    save_adapter(tmp_path / "lora", base, dataclasses.replace(base, model=model, params=params))
    with pytest.raises(UserError, match="expected one Adapter without a name to compose"):
        stacked(base, {"style": tmp_path / "lora"})
    assert adapter_fusion(base.model, files=f"style={files['style']}").insertions(base.model, 0)
