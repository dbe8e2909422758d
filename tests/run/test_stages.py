"""Stages: other pictures on the way, exact resumption in and across stages, errors in one line."""

import shutil

import jax
import numpy as np
import pytest

from tests.support.pictures import write_pictures
from tests.support.runs import lines, on_pictures
from vlm_jax import load
from vlm_jax.errors import UserError
from vlm_jax.models import positions
from vlm_jax.params.table import named_leaves
from vlm_jax.run import stages
from vlm_jax.train import train

OPS = "decode | resize({}) | normalize | caption('text') | tokenize(8) | keep('image', 'token_ids')"
SMALL = dict(
    model=dict(image=dict(image_size=16)), data=dict(ops=OPS.format(16)), preprocess="decode | resize(16) | normalize"
)
MERGE = dict(teacher="before", alpha=0.5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """12 steps on 32 px, the first quarter on 16 px and then merged with its beginning; AdamW and averages."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, 32)
    return staged(on_pictures(folder), dict(share="25%", **SMALL, merge=MERGE), dict(share="75%"))


def staged(settings, *sections):
    tower = dict(settings["model"]["image"], image_size=32, pool="tok", cls_position=True)
    model = settings["model"] | dict(image=tower)
    objective = dict(terms=dict(contrastive={}, lwf={}), teachers=dict(before=dict(decay=1.0, refresh=True)))
    settings = settings | dict(objective=objective)
    return settings | dict(model=model, stages=sections, ema=0.9, preprocess="decode | resize(32) | normalize")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, train(settings | dict(checkpoint=dict(every="1 steps", keep=12)), workdir)


def test_a_killed_run_goes_on_in_its_stage(settings, whole, tmp_path):
    """After any step: in the first stage, at its end, in the second."""
    workdir, results = whole
    losses = [line["loss"] for line in lines(workdir) if "loss" in line]
    for step in (2, 3, 5):
        again = tmp_path / str(step)
        shutil.copytree(workdir, again)
        for later in range(step + 1, 13):
            shutil.rmtree(again / "checkpoints" / str(later))
        (again / "results.json").unlink()
        found = train(settings | dict(checkpoint=dict(every="1 steps", keep=12)), again)
        assert found["params_sha256"] == results["params_sha256"]
        assert [line["loss"] for line in lines(again) if "loss" in line] == losses
        assert found["data/read_examples"] == results["data/read_examples"] == 12 * 16


def test_a_teacher_is_the_model_before_the_stage(whole):
    """Where a stage begins, the model is its own teacher; the second begins with what was merged."""
    workdir, _ = whole
    lost = [line["lwf/loss"] for line in lines(workdir) if "lwf/loss" in line]
    assert [abs(loss) < 1e-6 for loss in lost[:5]] == [True, False, False, True, False]


def test_a_checkpoint_loads_as_the_model_of_its_stage(whole, tmp_path):
    workdir, _ = whole
    for step, size in ((3, 16), (4, 32)):
        part = tmp_path / str(step)
        shutil.copytree(workdir, part)
        for later in range(step + 1, 13):
            shutil.rmtree(part / "checkpoints" / str(later))
        pretrained = load(part)
        rows = 1 + (size // 8) ** 2
        assert pretrained.params["image"]["pos_embed"].shape == (1, rows, 32)
        assert pretrained.embed_images([np.zeros((40, 40, 3), np.uint8)]).shape[0] == 1


def test_equal_stages_change_nothing(settings, tmp_path):
    one = settings | dict(
        objective=dict(name="contrastive"), stages=None, duration="4 steps", checkpoint=dict(every="4 steps")
    )
    two = one | dict(stages=(dict(share="50%"), dict(share="50%", accumulate=1)))
    assert train(one, tmp_path / "one")["params_sha256"] == train(two, tmp_path / "two")["params_sha256"]


def test_positions_are_resampled_in_parameters_moments_and_averages():
    rng = np.random.default_rng(0)
    place = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.P())
    tree = lambda rows: {
        name: {"image": {"pos_embed": rng.random((1, rows, 4), np.float32) + 0.1}, "scale": np.float32(2)}
        for name in ("params", "opt_state", "ema")
    }
    state, target = jax.tree.map(jax.numpy.asarray, tree(5)), tree(17)
    into = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), target)
    stage = stages.Stage(2, 3, 12, {}, "bicubic_sharp")
    found = stages.carried(state, into, stage)
    for name, method in (("params", "bicubic_sharp"), ("opt_state", "linear"), ("ema", "bicubic_sharp")):
        old, new = (np.asarray(side[name]["image"]["pos_embed"]) for side in (state, found))
        np.testing.assert_array_equal(old[:, 0], new[:, 0])
        np.testing.assert_array_equal(new[:, 1:], positions.resample_posemb(old[:, 1:], (2, 2), (4, 4), method))
    assert named_leaves(found).keys() == named_leaves(into).keys()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([dict(share="80%")], "the shares are 80% together; expected 100%"),
        ([dict(share="80%"), dict(share="30%")], "the shares are 110% together"),
        ([dict(share=0.5), dict(share="50%")], "stage 1 has share=0.5; expected a share such as 80%"),
        ([dict(share="1%"), dict(share="99%")], "stage 1 has no step: 1% of 12"),
        ([dict(share="50%", batch_size=8), dict(share="50%")], "stage 1 cannot change `batch_size`"),
        ([dict(share="50%", modell={}), dict(share="50%")], "cannot change `modell`; did you mean `model`"),
        (
            [dict(share="50%", model=dict(image=dict(width=64))), dict(share="50%")],
            r"stage 2 changes `.*, \(.*64.*\) before, \(.*32",
        ),
        ([dict(share="50%", model=dict(image=dict(image_siz=64))), dict(share="50%")], "no key `image_siz`"),
        ([dict(share="50%", resample="cubic"), dict(share="50%")], "resample is `cubic`"),
        ([dict(share="50%", merge=dict(teacher="old", alpha=2)), dict(share="50%")], "stage 1: alpha is 2, the share"),
        (
            [dict(share="50%"), dict(share="50%", merge=dict(teacher="old", alpha=0.5))],
            "stage 2 merges with the teacher `old`, which is no average in this stage; .* has: before",
        ),
    ],
)
def test_mistakes_are_named_before_the_first_step(settings, tmp_path, sections, message):
    with pytest.raises(UserError, match=message) as error:
        train(settings | dict(stages=sections), tmp_path / "run")
    assert "\n" not in str(error.value) and not lines(tmp_path / "run")
