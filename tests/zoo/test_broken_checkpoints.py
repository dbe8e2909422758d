"""Damaged and hostile folders of Transformers: each is one clear error; nothing crashes, runs, or eats memory."""

import json
import shutil
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import vlm_jax
from tests.support.released import unpack
from tests.support.tensor_files import mutate
from tests.support.torch_pickles import hostile_pickles
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize, released
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors

SAYS = dict(preprocess="decode | resize(8) | normalize", tokenizer="clip", tokenize="tokenize(8)")
LIMIT = 20e6  # bytes; a folder has 40 kB
QUERY = "vision_model.encoder.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, traced):
    folder = tmp_path_factory.mktemp("whole")
    unpack("clip_eos", folder)
    (folder / "gradients.safetensors").unlink()
    vlm_jax.load(folder, **SAYS)  # traces, so that memory is of the files alone
    return folder


@pytest.fixture(scope="module", autouse=True)
def traced():
    """Models of the same settings are traced once."""
    known, trace = {}, recognize.param_shapes

    def param_shapes(*args):
        key = repr(args)
        if key not in known:
            known[key] = trace(*args)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (recognize, released):
            patch.setattr(module, "param_shapes", param_shapes)
        yield


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def refused(path, **says):
    """The text of the UserError that loading ends in, within the memory limit."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            vlm_jax.load(path, **SAYS | says)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LIMIT and len(str(error.value)) < 2500
    return str(error.value)


def change(folder, **arrays):
    """Writes the weights anew, with other arrays; None leaves one out."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}
    tensors |= {name.replace("__", "."): array for name, array in arrays.items()}
    write_safetensors(path, {name: array for name, array in tensors.items() if array is not None})


# --- weights --------------------------------------------------------------------------------------------------------


def test_truncated(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 1000):
        path.write_bytes(data[:size])
        reason = "claims a header" if size == 1000 else "it is truncated or damaged, download it again"
        message = refused(folder)
        assert "model.safetensors" in message and reason in message


def test_zero_bytes(folder):
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty (0 bytes)" in refused(folder)


def test_a_header_of_ten_gigabytes(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**10) + path.read_bytes()[8:])
    assert "claims a header of 10,000,000,000 bytes" in refused(folder)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn])
def test_wrong_dtype(dtype, folder):
    change(folder, **{QUERY: np.zeros((16, 16), dtype)})
    message = refused(folder)
    assert f"{QUERY} is {np.dtype(dtype)}, image/blocks_0/attn/query/kernel needs a float" in message


@pytest.mark.parametrize("shape", [(16, 15), (16,), (0, 16), (16, 16, 1), ()])
def test_wrong_shape(shape, folder):
    change(folder, **{QUERY: np.zeros(shape, np.float32)})
    shown = "x".join(map(str, shape)) or "a scalar"
    assert f"{QUERY} is {shown}, image/blocks_0/attn/query/kernel needs 16x16" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        QUERY,
        "visual_projection.weight",
        "logit_scale",
        "text_model.embeddings.token_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm.bias",
    ],
)
def test_missing_key(name, folder):
    change(folder, **{name: None})
    assert name in refused(folder)


def test_extra_key(folder):
    change(folder, surprise__weight=np.zeros((2, 3), np.float32))
    message = refused(folder)
    assert "no parameter for: surprise.weight 2x3" in message and "no tensor for" not in message


def test_a_key_by_another_name_is_shown_on_both_sides(folder):
    array = open_tensors(folder / "model.safetensors").tensors[QUERY].read()
    change(folder, **{QUERY: None, QUERY.replace("q_proj", "query"): array})
    message = refused(folder)
    assert f"no tensor for: image/blocks_0/attn/query/kernel (from {QUERY})" in message
    assert f"no parameter for: {QUERY.replace('q_proj', 'query')} 16x16" in message


@pytest.mark.parametrize("kind", ["folder", "dangling", "loop", "device"])
def test_symbolic_links(kind, folder, tmp_path):
    path = folder / "model.safetensors"
    path.unlink()
    targets = {"folder": tmp_path, "dangling": tmp_path / "absent", "loop": path, "device": "/dev/zero"}
    path.symlink_to(targets[kind])
    message = refused(folder)
    assert {"folder": "is a folder", "device": "is a character device"}.get(kind, "model.safetensors") in message


def test_a_link_to_the_weights_is_followed(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    vlm_jax.load(folder, **SAYS)


@pytest.mark.parametrize("case", range(len(hostile_pickles("x"))))
def test_hostile_pickles(case, folder, tmp_path):
    """Each of the ways to run code that the reader's own tests know, as pytorch_model.bin."""
    made = tmp_path / "made"
    name, (code, _) = list(hostile_pickles(made).items())[case]
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(code)
    message = refused(folder)
    assert "pytorch_model.bin" in message and "\n" not in message, name
    assert not made.exists()


def test_shards_that_are_not_there(folder):
    names = list(open_tensors(folder / "model.safetensors").tensors)
    shutil.move(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map=places)))
    vlm_jax.load(folder, **SAYS)
    index.write_text(json.dumps(dict(weight_map=places | {QUERY: "model-00002-of-00002.safetensors"})))
    assert "model-00002-of-00002.safetensors is not there" in refused(folder)
    index.write_text(json.dumps(dict(weight_map=places | {QUERY: "../../etc/passwd"})))
    assert "names the shard '../../etc/passwd'" in refused(folder)


# --- config.json ----------------------------------------------------------------------------------------------------


NO_OBJECTS = ("", "{", "not JSON", "\x00", "[" * 100_000, '{"a": 1e', "NaN", "[1, 2]", "3", '"clip"')


@pytest.mark.parametrize("text", NO_OBJECTS)
def test_a_config_that_is_no_json_object(text, folder):
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert "config.json" in message and ("is not JSON" in message or "should hold a JSON object" in message)


def test_a_config_that_is_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not JSON" in refused(folder)


def edit(folder, part, key, value):
    settings = json.loads((folder / "config.json").read_text())
    (settings[part] if part else settings)[key] = value
    (folder / "config.json").write_text(json.dumps(settings))


def test_a_config_without_a_model_type(folder):
    settings = json.loads((folder / "config.json").read_text())
    del settings["model_type"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert "is no checkpoint" in refused(folder)
    edit(folder, None, "model_type", "florence")
    assert "model_type `florence`; known are: clip, siglip" in refused(folder)


ABSURD = [-1, 0, 3, 10**9, 2**80, 1e300, float("nan"), "16", None, [], {}, True, [16], {"a": 1}]
KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
KEYS += ("hidden_act", "layer_norm_eps")


@pytest.mark.parametrize("key", [*KEYS, "vision_config", "model_type"])
def test_absurd_values_of_a_config(key, folder):
    """What is not refused is what the weights do not tell from the right value."""
    good = (folder / "config.json").read_text()
    accepted = []
    for value in ABSURD:
        (folder / "config.json").write_text(good)
        edit(folder, None if key in ("vision_config", "model_type") else "vision_config", key, value)
        try:
            vlm_jax.load(folder, **SAYS)
            accepted.append(value)
        except UserError as error:
            assert str(folder) in str(error) or "config.json" in str(error), value
    assert all(value in ([0, None] if key == "layer_norm_eps" else [None]) for value in accepted), accepted


# --- mutations ------------------------------------------------------------------------------------------------------


def outcome(folder) -> bool:
    """Whether it loads; False where a UserError refuses it."""
    try:
        vlm_jax.load(folder, **SAYS)
    except UserError as error:
        assert len(str(error)) < 2500
        return False
    return True


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_mutated_bytes(file, folder):
    data = (folder / file).read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    tracemalloc.start()
    for _ in range(60):
        (folder / file).write_bytes(mutate(data, rng))
        refusals += not outcome(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * LIMIT and refusals > 20


def test_mutated_values(folder):
    """Any value of config.json, at any depth, becomes any other."""
    good = json.loads((folder / "config.json").read_text())
    rng = np.random.default_rng(1)
    tracemalloc.start()
    for _ in range(40):
        settings = json.loads(json.dumps(good))
        part = settings if rng.random() < 0.3 else settings[("vision_config", "text_config")[rng.integers(2)]]
        keys = list(part)
        part[keys[rng.integers(len(keys))]] = ABSURD[rng.integers(len(ABSURD))]
        (folder / "config.json").write_text(json.dumps(settings))
        outcome(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * LIMIT


# --- our own folders ------------------------------------------------------------------------------------------------

SECTION = dict(width=8, depth=2, heads=2, mlp_dim=16, patch=4, image_size=8, scan=True)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("image", "depth", 10**9, "has 1000000000 blocks of the image tower; the file holds fewer"),
        ("image", "width", 16, "does not fit the model of its config"),
        ("image", "width", -8, "width is -8; expected 1 or more"),
        ("image", "widht", 8, "has no key `widht`; did you mean `width`"),
        ("image", "heads", "two", "heads=.two. should be a whole number"),
        ("model", "name", "three_tower", "is `three_tower`; expected one of: two_tower"),
        (
            None,
            "tokenizer",
            "wordpiece:/etc/vocab.txt",
            r"names the file '/etc/vocab.txt'; expected one in this folder",
        ),
        (None, "tokenizer", "json:../tokenizer.json?pad_id=0", r"names the file '../tokenizer.json'; expected one in"),
        ("image", "image_size", 10**6, r"image_size is 1000000; expected at most 65,536"),
        ("image", "image_size", [60_000, 60_000], r"the number of patches is 225000000; expected at most"),
        ("image", "mlp_dim", 10**12, r"mlp_dim is 1000000000000; expected at most"),
        (None, "tokenizer", ["clip"], r"has tokenizer \['clip'\]; expected a string"),
        (None, "model", 3, "cannot be understood"),
    ],
)
def test_our_own_config(part, key, value, message, tmp_path):
    settings = dict(model=dict(name="two_tower", image=dict(SECTION), text=None), preprocess=SAYS["preprocess"])
    arrays = {
        name: np.zeros(leaf.shape, np.float32) for name, leaf in recognize.param_shapes(settings["model"]).items()
    }
    write_safetensors(tmp_path / "params.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    vlm_jax.load(tmp_path)
    {None: settings, "model": settings["model"], "image": settings["model"]["image"]}[part][key] = value
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        vlm_jax.load(tmp_path)
