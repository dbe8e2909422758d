"""An adapted model is saved, loaded, exported and evaluated whole."""

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

import vlm_jax
from tests.support.few_shot import GIVEN as GIVEN_SHAPES
from tests.support.few_shot import NAMES, clip_like, few_shot_task, pictures
from vlm_jax.adapt.methods import fit
from vlm_jax.adapt.recipe import tree
from vlm_jax.adapt.tune import with_room
from vlm_jax.convert import convert
from vlm_jax.errors import UserError
from vlm_jax.evaluate import evaluate
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.prompts import Context
from vlm_jax.params.table import named_leaves

MODULES = {
    "lora": (LowRank(rank=2),),
    "coop": (Context(length=2, at=0),),
}
GIVEN = np.random.default_rng(1).integers(0, 255, (4, 8, 8, 3), np.uint8)


def noisy(params, names):
    """The parameters with noise on some of them, as if these were trained."""
    rng, leaves = np.random.default_rng(0), named_leaves(params)
    return tree(leaves | {name: leaves[name] + np.float32(rng.normal(size=leaves[name].shape)) for name in names})


@pytest.fixture(scope="module")
def adapted():
    base = clip_like(scan=True)
    made = {"tip_adapter": fit("tip_adapter")(base, *few_shot_task(base, pictures()))}
    biases = [name for name in named_leaves(base.params) if name.endswith("bias")]
    named = dict(classes=NAMES, templates=("a {}",))
    made["bias"] = replace(base, params=noisy(base.params, biases), **named)
    for name, modules in MODULES.items():
        model = with_room(base, modules)
        params = insertion.begin(jax.random.key(0), model.model, base.params, *GIVEN_SHAPES)
        made[name] = replace(model, params=noisy(params, insertion.new_leaves(params)), **named)
    return made


@pytest.mark.parametrize("name", ["tip_adapter", "bias", *MODULES])
def test_saved_and_loaded(name, adapted, tmp_path):
    """A folder, a folder of that folder, and a base with `adapter=` give the same model, bit for bit."""
    model = adapted[name]
    want = model.classify(GIVEN)
    vlm_jax.save_pretrained(model, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "again")
    vlm_jax.save_pretrained(clip_like(scan=True), tmp_path / "base")
    file = tmp_path / "adapted.safetensors"
    vlm_jax.zoo.adapters.save_adapter(file, clip_like(scan=True), model)
    for loaded in (
        vlm_jax.load(tmp_path / "saved"),
        vlm_jax.load(tmp_path / "again"),
        vlm_jax.load(tmp_path / "base", adapter=file),
    ):
        assert (loaded.classes, loaded.templates, loaded.tokenize) == (NAMES, model.templates, model.tokenize)
        assert named_leaves(loaded.params).keys() == named_leaves(model.params).keys()
        np.testing.assert_array_equal(loaded.classify(GIVEN), want)


def test_other_formats(adapted, tmp_path, caplog):
    """What a format cannot hold is refused; a warning tells of the names of classes."""
    with pytest.raises(
        UserError, match="hf has no place for the head TipAdapter of this adapted model: write it as nat"
    ):
        vlm_jax.save_pretrained(adapted["tip_adapter"], tmp_path / "a", "hf")
    with pytest.raises(UserError, match="big_vision has no place for LowRank of this adapted model"):
        vlm_jax.save_pretrained(adapted["lora"], tmp_path / "a.npz", "big_vision")
    caplog.set_level(logging.WARNING)
    with pytest.raises(UserError, match="big_vision has no such model"):  # it has no mean of texts
        vlm_jax.save_pretrained(adapted["bias"], tmp_path / "b.npz", "big_vision")
    assert "no place for the model's 3 classes; give them to `classify`" in caplog.text


def test_a_head_names_its_own_classes(adapted):
    head = adapted["tip_adapter"]
    every = head.class_logits(head._pictures(GIVEN))
    few = head.class_logits(head._pictures(GIVEN), [NAMES[2], NAMES[0]])
    np.testing.assert_array_equal(few, every[:, [2, 0]])
    for wrong, message in ((dict(labels=["dog"]), "the label `dog`"), (dict(templates=["a {}"]), "templates")):
        with pytest.raises(UserError, match=f"a head has only the 3 classes of its training; leave out {message}"):
            head.classify(GIVEN, **wrong)


def test_another_size_keeps_the_adapter(adapted, tmp_path):
    """`image_size` resamples the positions of the adapted model; its preprocessing follows."""
    vlm_jax.save_pretrained(adapted["lora"], tmp_path / "saved")
    larger = vlm_jax.load(tmp_path / "saved", image_size=16, resample="bicubic")
    assert larger.preprocess == "decode | resize(16) | normalize" and larger.classes == NAMES
    assert larger.model.insertions == adapted["lora"].model.insertions
    assert larger.classify(GIVEN).shape == (4, 3)


def test_evaluated_with_its_head(adapted, tmp_path):
    """zeroshot of a model with a head: the head names the pictures, whatever the order of the data set's classes."""
    pixels = np.random.default_rng(2).integers(0, 255, (6, 8, 8, 3), np.uint8)
    for i, picture in enumerate(pixels):
        path = tmp_path / NAMES[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    right = adapted["tip_adapter"].classify(pixels).argmax(1) == np.arange(6) % 3
    found = evaluate(adapted["tip_adapter"], "zeroshot", uri=f"folder:{tmp_path}", gallery=0)
    assert found["zeroshot/top1"] == np.mean(right)
