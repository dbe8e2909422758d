"""Embeddings computed once: what the tower returns, shards that go on where they stopped, a model that takes them."""

import io
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.support.models import initial, run
from vlm_jax import models, save_pretrained
from vlm_jax.data import loader
from vlm_jax.data.source import BadExample
from vlm_jax.data.sources import open_source
from vlm_jax.data.sources.precomputed import read_shard, shard_names
from vlm_jax.errors import UserError
from vlm_jax.precompute import precompute
from vlm_jax.pretrained import Pretrained

COUNT, BAD = 20, 5
PREPARE = "decode | resize(16) | normalize"
IMAGE = dict(width=16, depth=1, heads=2, patch=8, image_size=16, pool="gap")


@pytest.fixture(scope="module")
def lit(tmp_path_factory):
    """(settings, params, folder of pictures, folder of embeddings): a locked tower and 20 pictures, one truncated."""
    root = tmp_path_factory.mktemp("lit")
    for i in range(COUNT):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(stream, "PNG")
        (root / "pictures" / "thing").mkdir(parents=True, exist_ok=True)
        (root / "pictures" / "thing" / f"{i:02d}.png").write_bytes(stream.getvalue()[: 60 if i == BAD else None])
    section = dict(name="two_tower", image=IMAGE, text=None)
    model = models.build(section)
    params = initial(model, jnp.zeros((1, 16, 16, 3)), None)
    other = Pretrained(model, params, None, PREPARE, None, dict(model=section, preprocess=PREPARE))
    save_pretrained(other, root / "tower", "native")
    text = dict(width=16, depth=1, heads=2, vocab_size=12, length=4, out_dim=16)
    settings = dict(model=dict(image=IMAGE, text=text), preprocess=PREPARE, model_init=dict(image=str(root / "tower")))
    uri = f"folder:{root / 'pictures'}"
    precompute(settings, root / "embedded", uri=uri, batch_size=8, shard_size=8)
    return settings, params, uri, root / "embedded"


def pooled(params, uri):
    """What the tower returns for all pictures but the truncated one: {index: [D]}."""
    source = open_source(uri)
    model = models.build(dict(image=IMAGE, text=None))
    batches = loader.eval_batches(uri=uri, ops=f"{PREPARE} | keep('image')", batch_size=COUNT, max_bad_fraction=0.1)
    batch = next(iter(batches))
    assert len(source) == COUNT
    rows = run(model.image, params["image"], batch["image"]).pooled
    return {i: row for i, (row, real) in enumerate(zip(rows, batch["mask"], strict=True)) if real}


def test_it_is_what_the_tower_returns(lit):
    _, params, uri, folder = lit
    source = open_source(f"precomputed:{folder}")
    want = pooled(params, uri)
    assert len(source) == COUNT and want.keys() == set(range(COUNT)) - {BAD}
    for i, row in want.items():
        record = source[i]
        assert record["text"] == "thing" and source.key(i) == f"thing/{i:02d}.png"
        np.testing.assert_allclose(record["image"], row, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadExample, match="could not be embedded"):
        source[BAD]
    assert "image" not in source.narrow(frozenset({"text"}))[BAD]
    assert source.label_names("label") == {0: "thing"}


def test_it_goes_on_where_it_stopped(lit):
    """Only the shard that is missing is written again, with the same bytes."""
    settings, _, uri, folder = lit
    first, second, third = (folder / name for name in shard_names(COUNT, 8))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (first, second, third)}
    second.unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards, embeddings-00001-of-00003"):
        open_source(f"precomputed:{folder}")
    precompute(settings, folder, uri=uri, batch_size=8, shard_size=8)
    assert second.read_bytes() == before[second][1]
    assert [path.stat().st_mtime_ns for path in (first, third)] == [before[first][0], before[third][0]]


def test_an_interrupt_loses_at_most_a_batch(lit, tmp_path, monkeypatch):
    settings, _, uri, folder = lit
    get, asked = loader.EvalBatches.__getitem__, []

    def interrupted(self, number):
        asked.append(number)
        if asked.count(2) == 1 and number == 2:
            raise KeyboardInterrupt
        return get(self, number)

    monkeypatch.setattr(loader.EvalBatches, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute(settings, tmp_path, uri=uri, batch_size=8, shard_size=24)
    (shard,) = shard_names(COUNT, 24)
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", f"{shard}.partial"}
    with pytest.raises(UserError, match="lacks 1 of 1 shards"):
        open_source(f"precomputed:{tmp_path}")
    precompute(settings, tmp_path, uri=uri, batch_size=8, shard_size=24)
    assert asked == [0, 0, 1, 2, 0, 2], "each run opens with batch 0, for the shapes"
    assert {path.name for path in tmp_path.iterdir()} == {"index.json", shard}
    rows, before = (open_source(f"precomputed:{path}").embeddings for path in (tmp_path, folder))
    assert [rows[i] for i in range(COUNT)] == [before[i] for i in range(COUNT)]
    (tmp_path / shard).rename(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"x" * 99)
    assert read_shard(tmp_path / "a") == [] == read_shard(tmp_path / "b")


def test_what_does_not_fit_is_named(lit, tmp_path):
    settings, _, uri, folder = lit
    with pytest.raises(UserError, match="holds embeddings of other settings"):
        precompute(settings | dict(preprocess="decode | resize(16)"), folder, uri=uri, batch_size=8, shard_size=8)
    with pytest.raises(UserError, match=r"lacks model_init\.image; expected the checkpoint"):
        precompute(settings | dict(model_init=None), tmp_path, uri=uri)
    with pytest.raises(UserError, match="has no image/head/bias"):
        headed = dict(settings["model"], image=dict(IMAGE, out_dim=4))
        precompute(settings | dict(model=headed), tmp_path, uri=uri, batch_size=8, shard_size=8)
    with pytest.raises(UserError, match=f"`precomputed:{tmp_path / 'none'}` has no index.json"):
        open_source(f"precomputed:{tmp_path / 'none'}")


def test_two_towers_take_either(lit):
    """The same parameters and the same embeddings from pictures as from what was computed before."""
    settings, _, _, _ = lit
    model = models.build(settings["model"])
    images, ids = jax.random.normal(jax.random.key(1), (3, 16, 16, 3)), jnp.ones((3, 4), jnp.int32)
    init = jax.jit(model.init)
    params, again = (init(jax.random.key(0), given, ids)["params"] for given in (images, jnp.zeros((3, 16))))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    before = run(model.image, params["image"], images).pooled
    want, got = (run(model, params, given, ids) for given in (images, before))
    np.testing.assert_allclose(got.image, want.image, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got.text, want.text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": 10**12}, "lacks 125000000000 of 125000000000 shards, embeddings-00000-of-125000000000"),
        ({"records": 1.5}, "index.json has records 1.5; write it anew"),
        ({"records": True}, "index.json has records True"),
        ({"records": -1}, "index.json has records -1"),
        ({"shard_size": 0}, "index.json has shard_size 0"),
        ({"shard_size": "8"}, "index.json has shard_size '8'"),
        ({"uri": None}, "index.json has uri None"),
        ({"split": 3}, "index.json has split 3"),
        ({"uri": "precomputed:/x"}, "is of `precomputed:/x`; expected a data set of pictures"),
        ("[" * 10**5, "is not JSON of an object"),
        ("[]", "is not JSON of an object"),
        ("\xff", "is not JSON of an object"),
    ],
)
def test_an_index_of_a_stranger(lit, tmp_path, change, message):
    folder = lit[3]
    for path in folder.iterdir():
        os.symlink(path, tmp_path / path.name)
    index = json.loads((folder / "index.json").read_text())
    (tmp_path / "index.json").unlink()
    text = change if isinstance(change, str) else json.dumps(index | change)
    (tmp_path / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        open_source(f"precomputed:{tmp_path}")
    (tmp_path / "index.json").write_text(json.dumps({key: value for key, value in index.items() if key != "split"}))
    assert len(open_source(f"precomputed:{tmp_path}")) == COUNT


def test_damaged_shards(lit, tmp_path):
    folder = lit[3]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = open_source(f"precomputed:{tmp_path}").fingerprint()
    first = tmp_path / shard_names(COUNT, 8)[0]
    content = first.read_bytes()
    first.write_bytes(content[:-700] + b"x" * 700)
    assert open_source(f"precomputed:{tmp_path}").fingerprint() != before
    first.write_bytes(b"")
    with pytest.raises(UserError, match=f"`precomputed:{tmp_path}` cannot be read: ArrayRecord file should be"):
        open_source(f"precomputed:{tmp_path}")
