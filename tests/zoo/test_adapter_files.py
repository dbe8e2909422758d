"""Adapter files from elsewhere: what does not fit the model is one error, at loading."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import vlm_jax
from tests.support import few_shot
from tests.support.fuzz_kinds import adapters
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.insertions.sparse import LowRankSparse
from vlm_jax.params.table import named_leaves
from vlm_jax.zoo.adapters import KEY, save_adapter
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors

DOWN = "params/image/blocks/mlp/inserted_down"


@pytest.fixture
def parts(tmp_path, request):
    """(arrays, metadata, path) of an adapter's file, to change."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(adapters()[request.param])
    file = open_tensors(path)
    return {name: tensor.read() for name, tensor in file.tensors.items()}, json.loads(file.metadata[KEY]), path


def load(parts):
    arrays, about, path = parts
    write_safetensors(path, arrays, {KEY: json.dumps(about)})
    return vlm_jax.load_adapter(path, few_shot.clip_like(scan=True))


@pytest.mark.parametrize("parts", ["modules"], indirect=True)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, about: about["insertions"][0].update(width=10**12), "is 1000000000000; expected at most"),
        (lambda arrays, about: about["insertions"][0].update(width=3), "inserted_down"),
        (lambda arrays, about: about["insertions"][0].update(where="(a+)+$"), "regex that may run for hours"),
        (lambda arrays, about: about["insertions"][0].update(type="Popen"), "Popen"),
        (lambda arrays, about: about.update(insertions=3), "damaged"),
        (lambda arrays, about: about.pop("classes"), "damaged"),
        (lambda arrays, about: about.update(classes=[1, 2, 3]), "not all texts"),
        (lambda arrays, about: about.update(templates=["no place"]), "no `{}`"),
        (lambda arrays, about: about.update(tokenize="tokenize(99999999999)"), "expected 1 to"),
        (lambda arrays, about: arrays.pop(DOWN), "inserted_down"),
        (lambda arrays, about: arrays.update({DOWN: arrays[DOWN].astype(np.int32)}), "inserted_down"),
        (lambda arrays, about: arrays.update({DOWN: arrays[DOWN][:, :3]}), "inserted_down"),
        (lambda arrays, about: arrays.update({"params/image/stranger": np.ones(2)}), "stranger"),
    ],
)
def test_modules_that_do_not_fit(change, message, parts):
    assert load(parts).classes == few_shot.NAMES
    change(*parts[:2])
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        load(parts)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("parts", ["head"], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        lambda arrays, about: about["head"].update(type="Popen"),
        lambda arrays, about: about["head"].pop("bias"),
        lambda arrays, about: arrays.pop("head/bias"),
        lambda arrays, about: arrays.update({"head/weights": arrays["head/weights"][:2]}),
        lambda arrays, about: about.update(classes=["a", "b"]),
        lambda arrays, about: about.update(head="x"),
    ],
)
def test_heads_that_do_not_fit(change, parts):
    assert load(parts).head is not None
    change(*parts[:2])
    with pytest.raises(UserError, match=r"adapter"):
        load(parts)


KERNEL, NEW = "image/blocks/mlp/fc1/kernel[1]", "image/blocks/attn/query/inserted_s"
SPARSE = {
    "of another model": lambda arrays, about: about.update(base="0"),
    "do not fit": lambda arrays, about: arrays[f"params/{KERNEL}@index"].__setitem__(0, 10**6),
    "do not fit ": lambda arrays, about: arrays[f"params/{KERNEL}@index"].__setitem__(0, -1),
    "do not fit float32": lambda arrays, about: arrays.update({f"params/{KERNEL}@value": np.ones(2, np.float16)}),
    "do not fit.*make the file again": lambda arrays, about: arrays.update({f"params/{KERNEL}@value": np.ones(5, "f")}),
    "damaged": lambda arrays, about: arrays.pop(f"params/{KERNEL}@index"),
    "no `image/blocks/mlp/fc1/kernel\\[9\\]`": lambda arrays, about: arrays.update(
        {f"params/{KERNEL[:-3]}[9]@value": np.ones(1, "f")}
    ),
    "more than the whole model": lambda arrays, about: about["sparse"].update({NEW: [10**6, 10**6]}),
    "inserted_s": lambda arrays, about: about["sparse"].update({NEW: [3, 16, 8]}),
    "damaged ": lambda arrays, about: about.update(sparse=[NEW]),
}


@pytest.mark.parametrize("message", SPARSE)
def test_sparse_values_that_do_not_fit(message, tmp_path):
    base = few_shot.clip_like(scan=True)
    model = insertion.inserted(base.model, LowRankSparse(where="image/.*/query", rank=1))
    leaves = named_leaves(insertion.begin(jax.random.key(0), model, base.params, *few_shot.GIVEN))
    leaves[NEW] = leaves[NEW].at[1, 2, 3].set(4.0)
    stack = KERNEL[:-3]
    leaves[stack] = leaves[stack].at[1, 0, :2].add(jnp.array([1.0, 2.0]))
    adapted = dataclasses.replace(base, model=model, params=unflatten_dict(leaves, sep="/"), classes=few_shot.NAMES)
    path = tmp_path / "a.safetensors"
    save_adapter(path, base, adapted)
    file = open_tensors(path)
    parts = {name: tensor.read() for name, tensor in file.tensors.items()}, json.loads(file.metadata[KEY]), path
    assert f"params/{KERNEL}@index" in parts[0] and parts[1]["sparse"] == {NEW: [3, 16, 16]}
    assert np.asarray(named_leaves(load(parts).params)[NEW])[1, 2, 3] == 4
    SPARSE[message](*parts[:2])
    with pytest.raises(UserError, match=message.strip()) as error:
        load(parts)
    assert "\n" not in str(error.value)
