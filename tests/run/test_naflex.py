"""Runs on pictures at their native aspect: counts, exact resumption, evaluation, mistakes in one line."""

import shutil

import jax
import numpy as np
import pytest

from configs import siglip2
from tests.support.pictures import write_pictures
from tests.support.runs import lines, on_pictures
from vlm_jax import config, load
from vlm_jax.errors import UserError
from vlm_jax.plan import train_step
from vlm_jax.run import stages
from vlm_jax.train import train

PACKED = "decode | resize_to_patches(8{0}) | normalize | pack_patches(8{0})"
OPS = PACKED.format("") + " | caption('text') | tokenize(8) | keep('image', 'token_ids')"
NAFLEX = dict(lengths=(8, 16), budget=256)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """4 steps: two rounds of 32 pictures of 8 patches and 16 pictures of 16 patches."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 64, sizes=((24, 48), (40, 40), (64, 16)))
    settings = on_pictures(folder) | dict(duration="4 steps", optimizer=dict(name="sgd", lr=0.1))
    settings["model"]["image"] |= dict(image_size=32, pool="map")
    settings["data"] |= dict(ops=OPS, naflex=NAFLEX)
    log = dict(tensorboard=False, every="1 steps")
    return settings | dict(preprocess=PACKED.format(", 16"), log=log, checkpoint=dict(every="1 steps", keep=4))


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(settings, workdir)


def test_examples_are_counted_as_they_were_seen(whole):
    workdir, results = whole
    logged = [line for line in lines(workdir) if "loss" in line]
    lengths = [line["data/length"] for line in logged]
    assert {*lengths[:2]} == {*lengths[2:]} == {8, 16}
    steps = [{8: 32, 16: 16}[length] for length in lengths]
    assert [line["examples"] for line in logged] == np.cumsum(steps).tolist()
    assert results["data/read_examples"] == sum(steps) == 96
    assert results["train/examples_per_second"] * results["train/seconds"] == pytest.approx(96)
    assert np.isfinite([line["loss"] for line in logged]).all()


def test_a_killed_run_goes_on_inside_of_a_round(settings, whole, tmp_path):
    workdir, results = whole
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    for later in (2, 3, 4):
        shutil.rmtree(again / "checkpoints" / str(later))
    (again / "results.json").unlink()
    found = train(settings, again)
    assert found["params_sha256"] == results["params_sha256"]
    assert found["data/read_examples"] == results["data/read_examples"]
    losses = [[line["loss"] for line in lines(folder) if "loss" in line] for folder in (workdir, again)]
    assert losses[0] == losses[1]


def test_the_model_embeds_pictures_at_their_aspect(whole):
    wide = np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8)
    pretrained = load(whole[0])
    assert pretrained.preprocess == PACKED.format(", 16")
    assert np.linalg.norm(pretrained.embed_images([wide])) == pytest.approx(1, abs=1e-5)


def test_siglip2_ends_at_the_native_aspect():
    settings = config.plain(siglip2.get_config("smoke-naflex"))
    first, _, last = stages.read(settings, 40)
    assert (last.last - last.first, last.settings["model"]) == (4, first.settings["model"])
    batch = train_step.traced(last.settings, jax.devices()[:1]).program.abstract_batch
    assert batch["image"]["patches"].shape == (16, 16, 192) and batch["cap_token_ids"].shape == (16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(accumulate=3), r"a batch of length 8 has 32 rows, .* with accumulate=3 cannot share; set multiple=24"),
        (dict(stages=[dict(share="50%"), dict(share="50%", data=dict(naflex=dict(budget=15)))]), "budget is 15, too s"),
    ],
)
def test_mistakes_are_named_before_the_first_step(settings, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        train(settings | change, tmp_path / "run")
    assert "\n" not in str(error.value) and not lines(tmp_path / "run")
