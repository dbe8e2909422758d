"""Reinforced data: the views of the loader are those that teachers saw, and what they said stands beside them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import reinforced
from tests.support.models import untrained
from vlm_jax import config, objectives, save_pretrained
from vlm_jax.data import loader, tokenizers
from vlm_jax.errors import UserError
from vlm_jax.precompute import reinforce

VIEWS, SIZE = 3, 32
EMBEDDINGS = ("image_embedding", "text_embedding")
WHERE = dict(style=("noto",))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, two_tower):
    """A config whose teacher is an untrained model, with a folder of what the teacher says of the first style."""
    root = tmp_path_factory.mktemp("reinforced")
    save_pretrained(two_tower, root / "teacher", "native")
    section = config.plain(reinforced.get_config("smoke"))
    other = dataclasses.replace(two_tower, params=jax.tree.map(lambda leaf: -leaf, two_tower.params))
    save_pretrained(other, root / "other", "native")
    section["objective"]["teachers"] = {
        name: dict(spec=str(root / folder), stored=True) for name, folder in (("tiny", "teacher"), ("other", "other"))
    }
    section["data"] |= dict(split="near_style", reinforced=str(root / "said"))
    reinforce(section, root / "said", views=VIEWS, batch_size=256, shard_size=1024)
    return section


def batches(settings, **changes):
    data = settings["data"] | changes
    return loader.train_loader(**data, batch_size=SIZE, seed=5, tokenizer=tokenizers.build("emoji"))


def test_a_view_is_what_the_teacher_saw(settings, two_tower):
    """The stored embeddings are those of the batch's own pictures and texts, to half precision."""
    given = batches(settings)
    assert given.teachers == {name: own["spec"] for name, own in settings["objective"]["teachers"].items()}
    batch = next(given)
    for teacher, sign in (("tiny", 1), ("other", -1)):
        params = jax.tree.map(lambda leaf, sign=sign: sign * leaf, two_tower.params)
        outputs = objectives.Outputs(two_tower.model, params, {k: batch[k] for k in ("image", "token_ids")})
        for name in EMBEDDINGS:
            np.testing.assert_allclose(batch[f"{teacher}/{name}"], outputs[name], atol=1e-3)


def test_stored_and_live_teachers_give_one_loss(settings, two_tower):
    batch = next(batches(settings))
    student = untrained(reinforced.get_config("smoke"))
    losses = []
    for stored in (True, False):
        teachers = dict(tiny=settings["objective"]["teachers"]["tiny"] | dict(stored=stored))
        section = settings["objective"] | dict(teachers=teachers)  # `other` is not asked
        objective = objectives.build(section, student.model, load=lambda spec: two_tower)
        run = jax.jit(lambda params, o=objective: objectives.value_and_grad(
            o, student.model, params, batch, None, frozen=objectives.frozen(o))[::2])  # fmt: skip
        losses.append(run(student.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-4), *losses)


def test_each_draw_takes_one_of_the_views(settings):
    """In enough epochs each record shows all its views and no other; the order of the run stays what it was."""
    few = dict(where=dict(concept=range(60)))
    given, plain = batches(settings, **few), batches(settings, **few, reinforced=None)
    seen = {}
    for _ in range(30 * given.num_examples // SIZE):
        batch, other = next(given), next(plain)
        np.testing.assert_array_equal(batch["concept"], other["concept"])
        for concept, said in zip(batch["concept"], batch["tiny/image_embedding"], strict=True):
            seen.setdefault(int(concept), set()).add(said.tobytes())
    assert {len(views) for views in seen.values()} == {VIEWS}


def test_a_loader_goes_on_bit_for_bit(settings):
    first, second = batches(settings), batches(settings)
    next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    want, got = next(first), next(second)
    assert want.keys() == got.keys()
    jax.tree.map(np.testing.assert_array_equal, want, got)


def test_what_does_not_fit_is_named(settings, tmp_path):
    with pytest.raises(UserError, match="is of split 'near_style', the config of 'unseen_style'; precompute it anew"):
        batches(settings, split="unseen_style")
    with pytest.raises(UserError, match="is of other ops than the config's"):
        batches(settings, ops=settings["data"]["ops"].replace("flip | ", ""))
    with pytest.raises(UserError, match=r"has no index\.json; write it with vlm_jax\.precompute"):
        batches(settings, reinforced=str(tmp_path))
    index = json.loads((Path(settings["data"]["reinforced"]) / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"fingerprint": "x"}))
    with pytest.raises(UserError, match="is of `tfds:emoji` before it changed; precompute it anew"):
        batches(settings, reinforced=str(tmp_path))
    for change in ({"views": 0}, {"seed": -1}, {"fields": {}}, {"fields": {"tiny/image_embedding": "128"}}):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=r"its index\.json has .* views of .*; precompute it anew"):
            batches(settings, reinforced=str(tmp_path))
    with pytest.raises(UserError, match="teachers has no checkpoint; expected"):
        reinforce(settings | dict(objective=dict(name="contrastive")), tmp_path, views=2)
    with pytest.raises(UserError, match="views"):
        reinforce(settings, tmp_path, views=0)
    objective = objectives.build(settings["objective"], None)
    with pytest.raises(UserError, match=r"tiny is `.*teacher`, what config\.data\.reinforced holds is of `other`"):
        objectives.check_stored(objective, {"tiny": "other"})
    objectives.check_stored(objective, batches(settings).teachers)
