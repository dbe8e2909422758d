"""Runs that begin from parameters of others: the same tokens, bit-equal parameters, heads anew, errors by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import clip
from tests.support.models import T5_SIZES, VOCAB, initial, run, section, tiny, untrained
from tests.support.paths import GOLDEN
from vlm_jax import config, load, models, save_pretrained
from vlm_jax.errors import UserError
from vlm_jax.models import insertion
from vlm_jax.models.encoder_decoder import T5
from vlm_jax.params import sharding
from vlm_jax.params.table import map_with_name, named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.run.checkpoint import load_params
from vlm_jax.train import train
from vlm_jax.zoo import key_map, model_init, recognize
from vlm_jax.zoo.load import read_params

TOKENS = jnp.array([[3, 4, 5, 6, 1, 0], [7, 8, 1, 0, 0, 0]])


def shapes_of(model, images, texts=TOKENS):
    """The parameters of a model by name, on a mesh of two devices."""
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, texts)["params"]
    places = sharding.param_shardings(sharding.RULES, shapes, mesh)
    placed = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return named_leaves(jax.tree.map(placed, shapes, places))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """(folder, model, params) of an encoder-decoder without a scan."""
    model, params, _ = tiny("encoder_decoder")
    folder = tmp_path_factory.mktemp("t5") / "saved"
    about = dict(model=section("encoder_decoder"))
    save_pretrained(Pretrained(model, params, None, None, None, about), folder, "native")
    return folder, model, params


def two_towers(**text):
    fields = dict(T5, **T5_SIZES, posemb="none", vocab_size=VOCAB, length=8, pad_mask=True, pool="mean", out_dim=16)
    image = dict(width=32, depth=1, heads=4, patch=8, out_dim=16)
    return models.build(dict(image=image, text=fields | text))


@pytest.mark.parametrize("scan", [False, True])
def test_a_text_tower_from_an_encoder(t5, scan):
    """Its tokens are the encoder's; the head is new."""
    folder, model, own = t5
    tower = two_towers(scan=scan)
    shapes = shapes_of(tower, jnp.zeros((2, 16, 16, 3)))
    found = model_init.read({"text": f"{folder}:encoder"}, shapes)
    assert {name for name in shapes if name.startswith("text/")} - found.keys() == {
        "text/head/kernel",
        "text/head/bias",
    }
    assert all(found[name].sharding == shapes[name].sharding for name in found)
    images = jnp.zeros((2, 16, 16, 3))
    params = map_with_name(lambda name, leaf: jax.device_get(found.get(name, leaf)), initial(tower, images, TOKENS))
    got = run(tower, params, None, TOKENS).text_tokens
    want, seen = run(model, own, TOKENS, method="encode")
    np.testing.assert_allclose(got[seen], want[seen], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_of_an_image_tower_from_an_encoder_of_texts(t5, scan):
    """Block by block; all else of the tower starts anew."""
    folder, _, own = t5
    blocks = {key: value for key, value in (T5 | T5_SIZES).items() if not key.startswith("relative")}
    image = dict(blocks, patch=8, image_size=16, out_dim=16, scan=scan)
    shapes = shapes_of(models.build(dict(image=image, text=None)), jnp.zeros((2, 16, 16, 3)), None)
    found = model_init.read({"image/blocks": f"{folder}:encoder"}, shapes)
    assert found.keys() == {name for name in shapes if name.startswith("image/blocks")}
    encoder = {name: leaf for name, leaf in named_leaves(own).items() if name.startswith("encoder/blocks")}
    for name, leaf in encoder.items():
        np.testing.assert_array_equal(array(name.replace("encoder", "image", 1), found), leaf, err_msg=name)
    sizes = [sum(leaf.size for leaf in leaves.values()) for leaves in (found, encoder)]
    assert sizes[0] == sizes[1]


def array(name, params):
    """A parameter by the name it has without scans."""
    leaf, i = key_map.blocks_of(name, params)
    return params[leaf] if i is None else params[leaf][i]


def test_a_tower_of_two():
    """Blocks without a scan from a file that is read with one, and a head that the file has not."""
    released = recognize.understand(GOLDEN / "siglip_loop.npz")
    tower = dict(released.model["image"], scan=False, out_dim=8)
    model = models.build(dict(image=tower, text=None))
    shapes = shapes_of(model, jnp.zeros((2, 32, 48, 3)), None)
    found = model_init.read({"image": str(GOLDEN / "siglip_loop.npz")}, shapes)
    assert shapes.keys() - found.keys() == {"image/head/kernel", "image/head/bias"}
    want = read_params(released.match(), released.shapes, released.tensors)
    for entry in released.entries:
        if key_map.blocks_of(entry.ours, found)[0] in found:
            np.testing.assert_array_equal(array(entry.ours, found), array(entry.ours, want), err_msg=entry.ours)


@pytest.mark.parametrize("pool", ["tok", "mean"])
def test_positions_of_another_grid_are_resampled(tmp_path, pool, capsys):
    cls = pool == "tok"
    image = dict(width=32, depth=1, heads=4, patch=8, pool=pool, cls_position=cls)
    about = dict(model=dict(image=dict(image, image_size=16), text=None), preprocess="decode | resize(16)")
    small = models.build(about["model"])
    params = initial(small, jnp.zeros((1, 16, 16, 3)), None)
    save_pretrained(Pretrained(small, params, None, about["preprocess"], None, about), tmp_path / "small", "native")
    shapes = shapes_of(models.build(dict(image=dict(image, image_size=32), text=None)), jnp.zeros((1, 32, 32, 3)), None)
    found = model_init.read({"image": str(tmp_path / "small")}, shapes)
    assert found.keys() == shapes.keys() and "image/pos_embed resampled, from" in capsys.readouterr().out
    assert found["image/pos_embed"].sharding == shapes["image/pos_embed"].sharding
    before, after = np.asarray(params["image"]["pos_embed"])[0], np.asarray(found["image/pos_embed"])[0]
    np.testing.assert_array_equal(before[:cls], after[:cls])
    corners, table = before[cls:].reshape(2, 2, 32), after[cls:].reshape(4, 4, 32)
    for y in range(4):
        for x in range(4):
            left, right = corners[0] * (1 - y / 3) + corners[1] * y / 3
            np.testing.assert_allclose(table[y, x], left * (1 - x / 3) + right * x / 3, atol=1e-6)


def test_a_class_token_stays_behind(tmp_path):
    image = dict(width=32, depth=1, heads=4, patch=8, image_size=16)
    about = dict(model=dict(image=dict(image, pool="tok", cls_position=True), text=None))
    before = models.build(about["model"])
    picture = jnp.zeros((1, 16, 16, 3))
    params = initial(before, picture, None)
    save_pretrained(Pretrained(before, params, None, "decode | resize(16)", None, about), tmp_path / "cls", "native")
    shapes = shapes_of(models.build(dict(image=dict(image, pool="map"), text=None)), picture, None)
    found = model_init.read({"image": str(tmp_path / "cls")}, shapes)
    assert "image/cls" not in found and not any("map_pool" in name for name in found)
    np.testing.assert_array_equal(found["image/pos_embed"], params["image"]["pos_embed"][:, 1:])
    np.testing.assert_array_equal(found["image/patch_embed/kernel"], params["image"]["patch_embed"]["kernel"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"text": "{}:encoder"}, r"text/blocks_0/mlp/fc1/kernel.*32x64"),
        ({"text": "{}"}, r"has no part `text`; it has: decoder, encoder, head"),
        ({"txt": "{}:encoder"}, r"no tower `txt`; it has: image, text"),
        ({"text": "/nowhere:encoder"}, r"/nowhere"),
        ({"text/blocks": "{}:image"}, r"has no part `image`"),
    ],
)
def test_what_does_not_fit_is_named(t5, spec, message):
    shapes = shapes_of(two_towers(mlp_dim=64), jnp.zeros((2, 16, 16, 3)))
    with pytest.raises(UserError, match=message):
        model_init.read({tower: path.format(t5[0]) for tower, path in spec.items()}, shapes)


def test_a_locked_tower_stays_as_it_was_read(tmp_path):
    """LiT: the image tower of another model, locked; the text tower begins anew and learns."""
    settings = clip.get_config("smoke")
    settings.update(dict(duration="2 steps", batch_size=16))
    settings.evals = {}
    settings.model_init = dict(image=str(tmp_path / "other"))
    settings.optimizer = dict(name="sgd", lr=0.1, params=(("image/.*", dict(freeze=True)), (".*", {})))
    other = untrained(settings, seed=5)
    params = other.params
    save_pretrained(other, tmp_path / "other", "native")
    train(settings, tmp_path / "run")
    before, after = named_leaves(params), named_leaves(load_params(tmp_path / "run"))
    for name in before:
        if name.startswith("image/"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        elif name.endswith("kernel"):
            assert not np.array_equal(before[name], after[name]), name
    assert np.any(after["text/head/bias"])  # it was 0

    settings = config.plain(settings) | dict(model_init=str(tmp_path / "other"))
    settings["model"]["insertions"] = [dict(type="LowRank", rank=2)]
    settings["optimizer"]["params"] = insertion.TABLE
    train(settings, tmp_path / "low_rank")
    tuned = load(tmp_path / "low_rank")
    own = named_leaves(tuned.params)
    assert all(np.array_equal(own[name], leaf) for name, leaf in before.items())
    assert own.keys() - before.keys() == insertion.new_leaves(tuned.params).keys()
    assert all(np.any(leaf) for leaf in insertion.new_leaves(tuned.params).values())  # b was 0
