"""Key tables: each layout there and back, parts of arrays, and what is said when tensors and parameters do not pair."""

import jax
import numpy as np
import pytest

from vlm_jax.errors import UserError
from vlm_jax.zoo import key_map
from vlm_jax.zoo.formats import big_vision, efficientnet, open_clip, open_clip_timm, t5, transformers_tables
from vlm_jax.zoo.key_map import Entry
from vlm_jax.zoo.readers.stored import Tensor

HEADS, PATCH, GRID = 3, 4, 2
SHAPES = {  # of our array, by (kind, our suffix); others are vectors of 12
    ("dense", "/kernel"): (12, 20),
    ("embedding", "/embedding"): (7, 12),
    ("conv", "/kernel"): (PATCH * PATCH * 3, 8),
    ("conv2d", "/kernel"): (5, 5, 6, 9),
    ("in_proj", "/kernel"): (12, 12),
    ("flax", "/kernel"): (12, 20),
    ("flax", "/embedding"): (7, 12),
    ("flax_conv", "/kernel"): (PATCH * PATCH * 3, 8),
    ("flax_heads", "/kernel"): (10, 12),
    ("flax_out", "/kernel"): (12, 10),
    ("flax_grid", ""): (1, 6, 8),
    ("same", ""): (3, 5),
    ("matrix", ""): (6, 12),
    ("vector", ""): (1, 1, 12),
    ("table", ""): (1, 9, 12),
    ("one", ""): (),
}
LAYOUTS = {
    (kind, ours): layout for kind, arrays in key_map.kinds(HEADS, PATCH, GRID).items() for ours, _, layout in arrays
}


def of(array):
    """A tensor in memory."""
    return Tensor(array.shape, array.dtype, lambda index: array[index].copy())


def parts(shape, rng, count=12):
    """Random parts of an array, the whole one first."""
    yield [slice(0, size) for size in shape]
    for _ in range(count):
        ends = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in shape]
        yield [slice(*pair) for pair in ends]


@pytest.mark.parametrize("key", LAYOUTS, ids=lambda key: "".join(key))
def test_layouts_there_and_back(key):
    layout, shape = LAYOUTS[key], SHAPES.get(key, (12,))
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    theirs = layout.to_theirs(array)
    assert theirs.shape == layout.their_shape(shape)
    assert sorted(theirs.ravel()) == sorted(array.ravel())
    assert np.array_equal(layout.to_ours(theirs, shape), array)


def entries():
    """An entry of every layout: alone, of one part, in a stack on either axis, where it has such axes."""
    for key, layout in LAYOUTS.items():
        rank = len(layout.their_shape(SHAPES.get(key, (12,))))
        for part in ((0, 1), (2, 3))[: rank + 1]:
            for block in (None, (0, 1, 3), (1, 2, 3))[: rank + 2]:
                yield pytest.param(key, part, block, id=f"{''.join(key)}-{part[0]}-{block}")


@pytest.mark.parametrize(("key", "part", "block"), list(entries()))
def test_any_part_of_any_entry(key, part, block, monkeypatch):
    """Written into a tensor of several, then read whole and in parts, in one piece and in small ones."""
    shape = SHAPES.get(key, (12,))
    entry = Entry("ours", "theirs", LAYOUTS[key], part, block)
    rng = np.random.default_rng(1)
    array = rng.normal(size=shape).astype(np.float32)
    into = np.full(entry.their_shape(shape), np.nan, np.float32)
    entry.write(array, into)
    assert np.isfinite(into).sum() == array.size
    tensor = of(into)
    for index in parts(shape, rng):
        want = array[tuple(index)]
        assert np.array_equal(entry.read(tensor, shape, index), want)
        for size in (2**23, 64):
            monkeypatch.setattr(key_map, "PIECE", size)
            out = key_map.aligned_empty(want.shape)
            entry.read_into(out, tensor, shape, index)
            assert np.array_equal(out, want)


def test_what_the_layouts_mean():
    """Against the formulas of the layers: torch's linear, convolution and fused projections, flax' heads."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(5, 12)).astype(np.float32)
    kernel = rng.normal(size=(12, 20)).astype(np.float32)
    np.testing.assert_allclose(x @ LAYOUTS["dense", "/kernel"].to_theirs(kernel).T, x @ kernel, rtol=1e-6)
    pixels = rng.normal(size=(PATCH, PATCH, 3)).astype(np.float32)
    kernel = rng.normal(size=(PATCH * PATCH * 3, 8)).astype(np.float32)
    weight = LAYOUTS["conv", "/kernel"].to_theirs(kernel)
    np.testing.assert_allclose(np.einsum("hwc,ochw->o", pixels, weight), pixels.ravel() @ kernel, rtol=1e-4)
    kernel = rng.normal(size=(12, 12)).astype(np.float32)
    by_head = LAYOUTS["flax_heads", "/kernel"].to_theirs(kernel)
    assert by_head.shape == (12, HEADS, 4)
    np.testing.assert_allclose(np.einsum("ld,dhk->lhk", x, by_head).reshape(5, -1), x @ kernel, rtol=1e-4, atol=1e-6)


def test_aligned_arrays_are_taken_over_without_a_copy():
    for shape in ((), (3,), (5, 7)):
        array = key_map.aligned_empty(shape)
        assert array.shape == shape and array.ctypes.data % 64 == 0
    array = key_map.aligned_empty((256, 256))
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


# --- tables ---------------------------------------------------------------------------------------------------------

TABLES = {
    **{name: rows for name, rows in vars(transformers_tables).items() if isinstance(rows, tuple)},
    "open_clip": open_clip.IMAGE,
    "open_clip_text": (*open_clip.TEXT, *open_clip.TEXT_HEAD),
    "open_clip_timm": open_clip_timm.TIMM_IMAGE,
    "big_vision": big_vision.IMAGE,
    "big_vision_text": big_vision.TEXT,
    "big_vision_bert": big_vision.BERT,
    "efficientnet": efficientnet.ROWS,
    "t5_encoder": (*t5.ENCODER, *t5.MLP),
    "t5_decoder": (*t5.DECODER, *t5.GATED_MLP),
}


@pytest.mark.parametrize("name", TABLES)
def test_no_table_names_a_place_twice(name):
    entries = key_map.expand(TABLES[name], depth=2, heads=2)
    assert len({entry.ours for entry in entries}) == len(entries)
    assert len({(entry.theirs, entry.part, entry.block) for entry in entries}) == len(entries)
    for entry in entries:  # the parts of a tensor are all there
        assert sum(other.theirs == entry.theirs for other in entries) in (entry.part[1], entry.part[1] * 2)


ROWS = (("blocks_{i}/fc", "layers.{i}.fc#0/2", "dense"), ("blocks_{i}/gate", "layers.{i}.fc#1/2", "dense"))
ROWS += (("head", "head", "dense"), ("scale", "scale", "one"))


def model(depth=2):
    """(parameter shapes of a scan, tensors), a small model and its file."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    shapes = {"scale": shape(), "head/kernel": shape(4, 3), "head/bias": shape(3)}
    for name in ("fc", "gate"):
        shapes |= {f"blocks/{name}/kernel": shape(depth, 4, 6), f"blocks/{name}/bias": shape(depth, 6)}
    rng = np.random.default_rng(3)
    arrays = {"scale": (1,), "head.weight": (3, 4), "head.bias": (3,)}
    for i in range(depth):
        arrays |= {f"layers.{i}.fc.weight": (12, 4), f"layers.{i}.fc.bias": (12,)}
    return shapes, {name: of(rng.normal(size=sizes).astype(np.float32)) for name, sizes in arrays.items()}


def match(shapes, tensors, ignored=(), rows=ROWS):
    return key_map.match(key_map.expand(rows, depth=2), shapes, tensors, ignored, "file.safetensors")


def test_match_and_read():
    shapes, tensors = model()
    plan = match(shapes, tensors)
    assert plan.keys() == shapes.keys()
    read = lambda name, *index: key_map.read(name, plan[name], tensors, shapes[name].shape, index)
    weights = np.stack([tensors[f"layers.{i}.fc.weight"].read() for i in range(2)])
    everything = slice(None)
    assert np.array_equal(read("blocks/fc/kernel", *[everything] * 3), weights[:, :6].swapaxes(1, 2))
    assert np.array_equal(read("blocks/gate/kernel", *[everything] * 3), weights[:, 6:].swapaxes(1, 2))
    part = read("blocks/gate/kernel", slice(1, 2), slice(1, 3), slice(2, 6))
    assert np.array_equal(part, weights[1:, 6:].swapaxes(1, 2)[:, 1:3, 2:])
    assert read("scale").shape == () and read("scale") == tensors["scale"].read()[0]


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_every_float_becomes_float32(dtype):
    shapes, tensors = model()
    array = tensors["head.weight"].read().astype(jax.numpy.dtype(dtype))
    tensors["head.weight"] = of(array)
    got = key_map.read("head/kernel", match(shapes, tensors)["head/kernel"], tensors, (4, 3), [slice(None)] * 2)
    assert got.dtype == np.float32 and np.array_equal(got, array.T.astype(np.float32))


def test_what_is_left_on_either_side():
    shapes, tensors = model()
    renamed = {name.replace("head.bias", "head.offset"): tensor for name, tensor in tensors.items()}
    renamed["layers.1.fc.weight"] = of(np.zeros((12, 5), np.float32))
    renamed["scale"] = of(np.zeros(1, np.int64))
    renamed["layers.0.fc.steps"] = of(np.zeros((), np.int64))
    with pytest.raises(UserError) as error:
        match(shapes, renamed, ("*.steps",))
    assert str(error.value).splitlines() == [
        "file.safetensors does not fit the model of its config:",
        "  these differ: layers.1.fc.weight is 12x5, blocks_1/fc/kernel needs 12x4, "
        "layers.1.fc.weight is 12x5, blocks_1/gate/kernel needs 12x4, scale is int64, scale needs a float",
        "  no tensor for: head/bias (from head.bias)",
        "  no parameter for: head.offset 3",
    ]


def test_a_parameter_without_a_place_and_a_block_too_many():
    shapes, tensors = model()
    with pytest.raises(UserError, match=r"no tensor for: scale \(the format has no place for it\)"):
        match(shapes, tensors, rows=ROWS[:-1])
    shapes, tensors = model(depth=3)
    with pytest.raises(UserError, match=r"(?s)blocks/fc/kernel \(the format has no .*no parameter for: layers.2.fc"):
        match(shapes, tensors)


def test_long_lists_are_cut():
    shapes, tensors = model()
    tensors |= {f"extra.{i}": of(np.zeros(2, np.float32)) for i in range(30)}
    with pytest.raises(UserError, match=rf"extra.{key_map.SHOWN - 1} 2, and {30 - key_map.SHOWN} more$"):
        match(shapes, tensors)
