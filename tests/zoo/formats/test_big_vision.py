"""big_vision's npz files: the reference arrays load by the names they were released under, and by all older ones."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

import vlm_jax
from tests.support.compare import close_in_scale as close
from tests.support.compare import same
from tests.support.paths import GOLDEN
from tests.support.released import read, unpack
from vlm_jax.errors import UserError
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained.embedding import embed
from vlm_jax.zoo import recognize
from vlm_jax.zoo.formats import big_vision
from vlm_jax.zoo.readers.tensors import write_npz

POOLS = {"vit_gap_learn": "gap", "text_last": "last"}  # of files whose arrays do not tell
SAYS = dict(preprocess="decode | resize(32, 48) | normalize", tokenizer="clip", tokenize="tokenize(16)")


def arrays_of(name):
    """Everything stored, and the parameters under their names without the root."""
    with np.load(GOLDEN / f"{name}.npz") as stored:
        arrays = dict(stored)
    return arrays, {key.removeprefix("params/"): value for key, value in arrays.items() if key.startswith("params/")}


def params_of(path):
    return named_leaves(read(path)[2])


@pytest.mark.parametrize("name", ["siglip_loop", "siglip_scan"])
def test_siglip(name):
    arrays, _ = arrays_of(name)
    loaded = vlm_jax.load(GOLDEN / f"{name}.npz", **SAYS)
    close(loaded.embed_image_batch(arrays["image"]), arrays["zimg"])
    close(embed(loaded.model, loaded.params, None, arrays["text"]), arrays["ztxt"])
    np.testing.assert_allclose(np.exp(loaded.params["logit_scale"]), arrays["t"][0], rtol=1e-6)
    assert loaded.params["logit_bias"] == arrays["b"][0]


@pytest.mark.parametrize("name", ["vit_gap_learn", "vit_map_sincos2d", "vit_tok_learn", "text_last", "text_map"])
def test_one_tower(name):
    arrays, _ = arrays_of(name)
    loaded = vlm_jax.load(GOLDEN / f"{name}.npz", pool=POOLS.get(name), **SAYS)
    side, inputs = ("image", arrays["image"]) if "image" in arrays else ("text", arrays["text"])
    assert loaded.params.keys() == {side}
    encoded = jax.jit(getattr(loaded.model, side).apply)({"params": loaded.params[side]}, inputs)
    close(encoded.pooled, arrays["logits"])
    if side == "image":
        close(encoded.tokens, arrays["encoded"])
    else:
        table = loaded.params["text"]["token_embed"]["embedding"]
        close(encoded.tokens @ table.T, arrays["vocab_logits"])


def test_scan_and_loop_have_the_same_place(tmp_path):
    """A loop's blocks are stacked on the way in."""
    _, loop = arrays_of("siglip_loop")
    stacked = {}
    for name in loop:
        if "encoderblock_0" in name:
            blocks = [loop[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(2)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
        elif "encoderblock_" not in name:
            stacked[name] = loop[name]
    write_npz(tmp_path / "scan.npz", stacked)
    same(params_of(tmp_path / "scan.npz"), params_of(GOLDEN / "siglip_loop.npz"))


OLD = (
    (r"LayerNorm_1/", "LayerNorm_2/"),
    (r"(encoderblock_\d+/)MultiHeadDotProductAttention_0/", r"\1MultiHeadDotProductAttention_1/"),
    (r"(encoderblock_\d+/)MlpBlock_0/", r"\1MlpBlock_3/"),
)
RENAMES = {
    "no root": (),
    "params/": ((r"^", "params/"),),
    "opt/target/": ((r"^", "opt/target/"),),
    "numbered over all classes": OLD,
    "positions in the encoder": (
        (r"img/pos_embedding", "img/Transformer/pos_embedding"),
        (r"txt/pos_embedding", "txt/Encoder_0/pos_embedding"),
    ),
    "positions in their own module": ((r"img/pos_embedding", "img/Transformer/posembed_input/pos_embedding"),),
}


@pytest.mark.parametrize("case", RENAMES)
def test_older_names(case, tmp_path):
    _, arrays = arrays_of("siglip_loop")
    renamed = {}
    for name, array in arrays.items():
        for pattern, replacement in RENAMES[case]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    if case == "opt/target/":  # beside them the optimizer's state, which nobody wants
        renamed["opt/state/step"] = np.int32(7)
    write_npz(tmp_path / "old.npz", renamed)
    same(params_of(tmp_path / "old.npz"), params_of(GOLDEN / "siglip_loop.npz"))


def test_an_array_under_both_names_is_refused(tmp_path):
    _, arrays = arrays_of("siglip_loop")
    write_npz(tmp_path / "a.npz", arrays | {"img/Transformer/pos_embedding": arrays["img/pos_embedding"]})
    with pytest.raises(UserError, match="has `img/pos_embedding` twice, under an old and a new name"):
        recognize.understand(tmp_path / "a.npz")


def test_bfloat16_is_stored_as_void(tmp_path):
    _, arrays = arrays_of("siglip_scan")
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    np.savez(tmp_path / "void.npz", **{name: array.view("V2") for name, array in half.items()})
    write_npz(tmp_path / "whole.npz", {name: array.astype(np.float32) for name, array in half.items()})
    same(params_of(tmp_path / "void.npz"), params_of(tmp_path / "whole.npz"))


@pytest.mark.parametrize(("rows", "covers"), [(5, True), (4, False), (6, False)])
def test_whether_the_cls_token_has_a_position(rows, covers, tmp_path):
    """A table of one more than a square has its first row for the token."""
    _, arrays = arrays_of("vit_tok_learn")
    arrays["pos_embedding"] = np.random.default_rng(0).normal(size=(1, rows, 32)).astype(np.float32)
    write_npz(tmp_path / "vit.npz", arrays)
    released, model, params = read(tmp_path / "vit.npz")
    assert released.model["image"]["cls_position"] is covers
    assert np.array_equal(params["image"]["pos_embed"], arrays["pos_embedding"])
    size = {5: (32, 32), 4: (32, 32), 6: (32, 48)}[rows]
    shape = jax.eval_shape(model.image.apply, {"params": params["image"]}, np.zeros((1, *size, 3), np.float32))
    assert shape.tokens.shape == (1, rows + (not covers), 32)


def test_naflex(tmp_path):
    """Packed patches in a grid of the table's own size are what the plain images give."""
    arrays, params = arrays_of("siglip_scan")
    params["img/embedding/kernel"] = params["img/embedding/kernel"].reshape(-1, 32)
    params["img/pos_embedding"] = params["img/pos_embedding"].reshape(2, 3, 32)
    write_npz(tmp_path / "naflex.npz", params)
    released, model, tree = read(tmp_path / "naflex.npz")
    assert released.model["image"]["image_size"] == (32, 48)
    patches = arrays["image"].reshape(3, 2, 16, 3, 16, 3).swapaxes(2, 3).reshape(3, 6, -1)
    packed = dict(patches=np.pad(patches, ((0, 0), (0, 2), (0, 0))), grid=np.array([[2, 3]] * 3, np.int32))
    close(embed(model, tree, packed, None), arrays["zimg"])


def test_bert_of_lit(tmp_path):
    """BERT's parameters, put into LiT's names by the table, come back."""
    (tmp_path / "bert").mkdir()
    unpack("bert", tmp_path / "bert")
    tree = read(tmp_path / "bert")[2]
    params = named_leaves({"text": {key: value for key, value in tree["text"].items() if key != "rep"}})
    section = dict(depth=2, heads=1)
    arrays = {}
    for entry in big_vision.tower_entries(big_vision.BERT, "text", "txt/", section, stacked=False):
        name, i = recognize.key_map.blocks_of(entry.ours, params)
        if name in params:
            array = np.asarray(params[name] if i is None else params[name][i])
            arrays[entry.theirs] = np.zeros(entry.their_shape(array.shape), np.float32)
            entry.write(array, arrays[entry.theirs])
    block = "txt/BertEncoder_0/encoder_block/layer_sequence/layers_1"
    assert arrays[f"{block}/attention_block/attention_layer/query/kernel"].shape == (16, 16)
    _, image = arrays_of("vit_gap_learn")
    arrays |= {f"img/{name}": array for name, array in image.items()} | {"t": np.float32([2.0])}
    head = {"text/head/kernel": np.eye(16, 7, dtype=np.float32), "text/head/bias": np.arange(7, dtype=np.float32)}
    arrays |= {name.replace("text/", "txt/"): array for name, array in head.items()}
    write_npz(tmp_path / "LiT-B16B_2.npz", arrays)
    released, _, tree = read(tmp_path / "LiT-B16B_2.npz", pool=dict(image="gap"))
    same(named_leaves({"text": tree["text"]}), params | head)
    assert released.tokenize == "tokenize(16)" and "tokenizer='wordpiece:" in released.hints["tokenizer"]
    text = released.model["text"]
    assert (text["pool"], text["post_norm"], text["pad_mask"], text["norm_eps"]) == ("first", True, True, 1e-12)
    assert tree["logit_scale"] == 2.0 and "logit_bias" not in tree


def test_released_names_tell_what_the_arrays_cannot(tmp_path):
    _, arrays = arrays_of("siglip_scan")
    write_npz(tmp_path / "webli_en_b16_224_63724782.npz", arrays)
    released = recognize.understand(tmp_path / "webli_en_b16_224_63724782.npz")
    assert released.preprocess == "decode | resize(224, method='bilinear', antialias=False) | normalize"
    assert released.tokenize == "lower | tokenize(16, bos=False)"
    with pytest.raises(UserError, match=r"hold its tokenizer: pass tokenizer=.sentencepiece:.*pad_id"):
        vlm_jax.load(tmp_path / "webli_en_b16_224_63724782.npz").embed_texts(["a"])
    with pytest.raises(UserError, match=r"(?s)pass preprocess= .*pass tokenizer=.*pass tokenize="):
        vlm_jax.load(GOLDEN / "siglip_scan.npz").lacks.check()


def test_what_is_of_no_format_is_named(tmp_path):
    write_npz(tmp_path / "odd.npz", {"a": np.zeros(3), "b": np.zeros(3)})
    with pytest.raises(UserError, match=r"holds 2 tensors \(a, b, ...\), which are of no format that is known"):
        recognize.understand(tmp_path / "odd.npz")
