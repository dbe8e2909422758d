"""Files of torch are read right, and nothing in them is ever run."""

import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.support.torch_pickles import MATRIX, STATE, STORAGES, VIEWS, hostile_pickles
from tests.support.torch_writer import Call, Name, Object, Persistent, dumps, legacy_bytes, zip_bytes
from vlm_jax.errors import UserError
from vlm_jax.zoo.readers import torch_files
from vlm_jax.zoo.readers.tensors import open_tensors

WRITERS = {"torch": zip_bytes, "torch_legacy": legacy_bytes}


@pytest.fixture(params=WRITERS)
def kind(request):
    return request.param


@pytest.fixture
def save(kind, tmp_path):
    """save(value, storages, ...) -> the path of a file of either format."""

    def write(value, storages=STORAGES, **options):
        path = tmp_path / "weights.pt"
        path.write_bytes(WRITERS[kind](value, storages, **options))
        return path

    return write


def test_views_of_shared_storages(save, kind):
    file = open_tensors(save(STATE))
    assert file.kind == kind and list(file.tensors) == list(VIEWS) and file.metadata == {}
    for name, view in VIEWS.items():
        array = file.tensors[name].read()
        assert array.dtype == view.dtype == file.tensors[name].dtype and array.flags.writeable
        assert array.flags.c_contiguous and array.shape == view.shape == file.tensors[name].shape
        np.testing.assert_array_equal(array, view)
    np.testing.assert_array_equal(file.tensors["transposed"].read((slice(1, 5, 2), slice(2))), MATRIX.T[1:5:2, :2])


def test_weights_of_a_training_checkpoint(save):
    weights = Call("collections.OrderedDict", ([["module.a", STATE["whole"]], ["module.b.c", STATE["half"]]],))
    weights.state = {"_metadata": {"": {"version": 1}}}
    checkpoint = {
        "epoch": 7,
        "state_dict": weights,
        "optimizer": {"state": {0: {"exp_avg": STATE["cut"]}}},
        "args": Object("argparse.Namespace", {"lr": 0.5, "betas": (0.9, 0.98), "dtype": Name("torch.bfloat16")}),
        "device": Call("torch.device", ("cuda", 1)),
        "size": Call("torch.Size", ((2, 3),)),
    }
    file = open_tensors(save(checkpoint))
    assert list(file.tensors) == ["a", "b.c"]
    np.testing.assert_array_equal(file.tensors["b.c"].read(), VIEWS["half"])
    assert file.metadata == {
        "epoch": 7,
        "args.lr": 0.5,
        "args.betas": (0.9, 0.98),
        "args.dtype": "torch.bfloat16",
        "device": "cuda:1",
        "size": (2, 3),
        "left_out": ["optimizer"],
    }


def test_nested_dicts_flatten(save):
    parameter = Call("torch._utils._rebuild_parameter", (STATE["whole"], True, Call("collections.OrderedDict", ())))
    file = open_tensors(save({"image": {"w": parameter, "list": [STATE["cut"], STATE["half"]]}, "model": "ViT-B"}))
    assert list(file.tensors) == ["image.w", "image.list.0", "image.list.1"]
    assert file.metadata == {"model": "ViT-B"}


def test_torchscript(tmp_path):
    linear = lambda name: Object("__torch__.torch.nn.modules.linear.Linear", {"training": True, "weight": STATE[name]})
    model = Object(
        "__torch__.model.CLIP",
        {
            "training": False,
            "visual": Object("__torch__.Sequential", {"0": linear("transposed"), "1": linear("whole")}),
            "sizes": Call("torch.jit._pickle.build_intlist", ([1, 2],)),
            "table": Call("torch.jit._pickle.restore_type_tag", ({"a": 1}, "Dict[str, int]")),
            "logit_scale": STATE["scalar"],
        },
    )
    path = tmp_path / "ViT-B-32.pt"
    path.write_bytes(zip_bytes(model, STORAGES, {"constants.pkl": dumps(()), "code/__torch__/model.py": b"import os"}))
    file = open_tensors(path)
    assert file.kind == "torchscript"
    assert list(file.tensors) == ["visual.0.weight", "visual.1.weight", "logit_scale"]
    np.testing.assert_array_equal(file.tensors["visual.0.weight"].read(), MATRIX.T)
    assert file.metadata["sizes"] == [1, 2] and file.metadata["table.a"] == 1 and file.metadata["training"] is False


def test_classes_of_torchscript_only_in_torchscript(save):
    with pytest.raises(UserError, match=r"asks for `__torch__\.model\.CLIP`"):
        open_tensors(save(Object("__torch__.model.CLIP", {})))


def test_untyped_storages(save):
    fp8 = np.arange(6).astype(ml_dtypes.float8_e4m3fn)
    identity = Persistent(("storage", Name("torch.storage.UntypedStorage"), "0", "cpu", 6))
    arguments = (
        identity,
        0,
        (3, 2),
        (1, 3),
        False,
        Call("collections.OrderedDict", ()),
        Name("torch.float8_e4m3fn"),
        None,
    )
    file = open_tensors(save({"w": Call("torch._utils._rebuild_tensor_v3", arguments)}, {"0": fp8}))
    assert file.tensors["w"].dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(file.tensors["w"].read().astype(np.float32), np.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("name", hostile_pickles("x"))
def test_any_other_global_is_refused_by_name(name, save, kind, tmp_path):
    target = tmp_path / "made"
    code, wanted = hostile_pickles(target)[name]
    path = save(code[2:-1] if code.endswith(b".") else code[2:])
    with pytest.raises(UserError, match=rf"asks for `[\w.]*{wanted}`.*no code is run"):
        open_tensors(path)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(code)
    with pytest.raises(UserError, match=rf"asks for `[\w.]*{wanted}`"):
        open_tensors(bare)
    assert not target.exists()


def strange(offset=0, shape=(4, 6), strides=(6, 1), size=24, key="0", kind="torch.FloatStorage"):
    identity = Persistent(("storage", Name(kind), key, "cpu", size))
    return {"w": Call("torch._utils._rebuild_tensor_v2", (identity, offset, shape, strides, False, ()))}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (strange(shape=(5, 6)), "lies outside its storage `0` of 24 elements"),
        (strange(offset=1), "lies outside its storage"),
        (strange(strides=(6, 2)), "lies outside its storage"),
        (strange(offset=-1), "impossible shape, strides or offset"),
        (strange(strides=(-6, 1)), "impossible shape, strides or offset"),
        (strange(shape=(2.0, 6)), "impossible shape, strides or offset"),
        (strange(shape=(4, 6, 1)), "impossible shape, strides or offset"),
        (strange(shape=(1 << 40, 6), strides=(0, 1)), "larger than its file"),
        (strange(shape=(0, 1 << 62), strides=(0, 0)), "that no array can have"),
        (strange(shape=(1,) * 40, strides=(1,) * 40), "40 axes"),
        (strange(size=1 << 70), "impossible size"),
        (strange(key="9"), r"`archive/data/9` is missing|storage `9` of `w` is missing"),
        (strange(size=25, shape=(5, 5), strides=(5, 1)), "has 96 bytes; expected 100|is not as declared"),
        (strange(kind="torch.float32"), "damaged pickle"),
        ({"a": strange(), "b": strange(size=20, shape=(20,), strides=(1,))}, "two types or an impossible size"),
        ({"w": Persistent(("module", "a", "b", "c", 1))}, "a persistent id that is no storage"),
        ({"w": Call("torch.FloatStorage", (10,))}, "calls `torch.FloatStorage`"),
        ({"w": Call("collections.OrderedDict", (1, 2))}, "in an unknown way"),
        ({"w": Object("torch.Size", ())}, "makes an object of `torch.Size`"),
        ({"w": b"ccollections\nOrderedDict\n}(X\x01\x00\x00\x00aNub"}, "Global where Record belongs"),
        ({("a", "b"): 1}, "a key that is tuple"),
        ({"w": b"K\x01I12\n"}, "instruction b'I'"),
        ({"w": b"\x82\x01"}, r"instruction b'\\x82'"),
        ({"w": b"\x8e" + struct.pack("<Q", 1 << 50)}, "bytes, .* are left"),
        ({"w": b"\x96" + struct.pack("<Q", 1 << 50)}, r"instruction b'\\x96'"),
        ({"a.b": 1, "a": {"b": 2}}, "two values under the name `a.b`"),
        (b"ttt", "damaged pickle"),
        (b"h\x05", "damaged pickle"),
    ],
)
def test_what_is_damaged_is_named(value, message, save):
    with pytest.raises(UserError, match=message):
        open_tensors(save(value))


def test_bombs_stay_small(save, monkeypatch):
    """Memo numbers, lists in lists, and trees whose walk would never end."""
    monkeypatch.setattr(torch_files, "_MAX_VALUES", 10_000)
    doubled = b"]q\x000" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)) + b"h%c" % 60
    tracemalloc.start()
    open_tensors(save({"w": b"]r\xff\xff\xff\xff"}))
    for value in (doubled, b"]q\x00h\x00a", b"]" * 20_000 + b"a" * 19_999, b"}q\x00X\x01\x00\x00\x00ah\x00s"):
        with pytest.raises(UserError, match="nested without end"):
            open_tensors(save(value))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_big_endian_is_refused(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(legacy_bytes(STATE, STORAGES, little_endian=False))
    with pytest.raises(UserError, match="is big-endian"):
        open_tensors(path)
    path.write_bytes(zip_bytes(STATE, STORAGES).replace(b"little", b"bigbig"))
    with pytest.raises(UserError, match="byte order"):
        open_tensors(path)


def test_archives_that_torch_does_not_write(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(zip_bytes(STATE, {key: np.tile(part, 99) for key, part in STORAGES.items()}, compression=8))
    with pytest.raises(UserError, match="is compressed, which torch never does"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", dumps({}))
        archive.writestr("b/data.pkl", dumps({}))
    with pytest.raises(UserError, match="holds 2 pickles"):
        open_tensors(path)


def test_truncated_files_are_refused(save):
    path = save(STATE)
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            open_tensors(path)
