"""A T5 with its tokenizer: saved and loaded in each format, what it writes and how it scores texts."""

import dataclasses
import io
import json
import shutil

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

import vlm_jax
from vlm_jax import convert, models
from vlm_jax.data import tokenizers
from vlm_jax.models.generate import log_likelihood
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo.formats import t5x
from vlm_jax.zoo.readers.tensors import Tensor, open_tensors, write_safetensors

LINES = ["a photo of a dog in the park", "two cats, and the dog they saw", "what is this? it is the end of it"]
TEXTS, ANSWERS = ["a photo of a dog", "two cats"], ["the dog", "cats in the park"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """An untrained T5 v1.1 whose logits are far from uniform."""
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4), model_writer=stream, vocab_size=40, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("t5") / "spiece.model"
    path.write_bytes(stream.getvalue())
    spec = f"sentencepiece:{path}?extra_ids=3"
    tokenizer = tokenizers.build(spec)
    sizes = dict(width=32, depth=2, heads=4, head_dim=12, mlp_dim=48, scan=True)
    decoder = dict(**sizes, vocab_size=tokenizer.vocab_size, length=32)
    section = dict(name="encoder_decoder", encoder=sizes, decoder=decoder)
    model = models.build(section)
    ids = jnp.ones((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids, ids)["params"]
    params["head"]["kernel"] = 0.5 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    tokenize = "tokenize(32, bos=False)"
    return Pretrained(model, params, tokenizer, None, tokenize, dict(model=section, tokenizer=spec))


def same(got, want):
    got, want = named_leaves(got.params), named_leaves(want.params)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize(
    ("tied", "gated", "activation"),
    [(None, True, "gelu_tanh"), (None, True, "silu"), (32**-0.5, False, "relu"), (1.0, False, "gelu")],
)
def test_there_and_back(t5, tied, gated, activation, tmp_path):
    """Every kind of T5 keeps its parameters, settings and tokenizer, bit for bit."""
    section = t5.config["model"]
    parts = {side: dict(section[side], gated=gated, activation=activation) for side in ("encoder", "decoder")}
    section = dict(section, encoder=parts["encoder"], decoder=dict(parts["decoder"], tied_scale=tied))
    params = {name: value for name, value in named_leaves(t5.params).items() if gated or "gate" not in name}
    if tied is not None:
        del params["head/kernel"]
    kind = dataclasses.replace(
        t5, model=models.build(section), params=flax.traverse_util.unflatten_dict(params, sep="/"),
        config=dict(t5.config, model=section),
    )  # fmt: skip
    for format in ("native", "hf"):
        vlm_jax.save_pretrained(kind, tmp_path / format, format)
        loaded = vlm_jax.load(tmp_path / format)
        same(loaded, kind)
        assert loaded.model == kind.model and loaded.tokenize == t5.tokenize
        assert loaded.tokenizer.vocab_size == t5.tokenizer.vocab_size
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tied is not None) and config["eos_token_id"] == 1


def test_tables_that_files_hold_several_times(t5, tmp_path):
    """As .bin files do; and with the table under another of its names."""
    vlm_jax.save_pretrained(t5, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = {name: tensor.read() for name, tensor in open_tensors(path).tensors.items()}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    again = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"], unused: np.zeros((32, 4), np.float32)}
    for arrays in (again, {name: array for name, array in again.items() if name != "shared.weight"}):
        path.unlink()
        write_safetensors(path, {n: Tensor(a.shape, a.dtype, lambda i, a=a: a[i]) for n, a in arrays.items()})
        same(vlm_jax.load(tmp_path / "hf"), t5)
    text = convert.text(convert.describe(tmp_path / "hf"))
    assert "encoder  " in text and "decoder/token_embed/embedding" in text and "(NOTHING TAKES IT)" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(feed_forward_proj="gated-swiglu"), "feed_forward_proj of config.json is `swiglu`"),
        (dict(feed_forward_proj="two-relu"), "has feed_forward_proj two-relu"),
        (dict(num_heads=0), "has num_heads 0; expected a whole number of 1 or more"),
        (dict(num_layers=3), "no tensor for: encoder/blocks_2"),
        (dict(num_layers=10**6), "has num_layers 1000000, the file 52 tensors"),
        (dict(layer_norm_epsilon="x"), "has layer_norm_epsilon 'x'"),
        (dict(d_model=16), "these differ: shared.weight"),
        (dict(model_type="longt5"), "model_type `longt5`; known are: .*t5, mt5"),
    ],
)
def test_configs_that_do_not_fit(t5, changes, message, tmp_path):
    vlm_jax.save_pretrained(t5, tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(vlm_jax.UserError, match=message):
        vlm_jax.load(tmp_path / "hf")


@pytest.mark.parametrize("tied", [None, 32**-0.5])
def test_t5x_there_and_back(t5, tied, tmp_path):
    section = dict(t5.config["model"], decoder=dict(t5.config["model"]["decoder"], tied_scale=tied, length=512))
    params = dict(t5.params) if tied is None else {side: t5.params[side] for side in ("encoder", "decoder")}
    kind = dataclasses.replace(t5, model=models.build(section), params=params, config=dict(t5.config, model=section))
    vlm_jax.save_pretrained(kind, tmp_path / "t5x", "t5x")
    says = dict(tokenizer=t5.config["tokenizer"], tokenize=t5.tokenize)
    loaded = vlm_jax.load(tmp_path / "t5x", activation="gelu_tanh", **says)
    same(loaded, kind)
    assert loaded.model == kind.model
    with pytest.raises(vlm_jax.UserError, match="pass activation='gelu_tanh'"):
        vlm_jax.load(tmp_path / "t5x", **says)
    with pytest.raises(vlm_jax.UserError, match=r"extra_ids=100"):
        vlm_jax.load(tmp_path / "t5x", activation="silu").generate(["a cat"])
    store = tmp_path / "t5x" / "target.encoder.layers_0.mlp.wo.kernel"
    (store / ".zarray").write_text("{}")
    with pytest.raises(vlm_jax.UserError, match="kernel is no zarr array"):
        vlm_jax.load(tmp_path / "t5x", **says)
    (tmp_path / "t5x" / "checkpoint").write_bytes(b"?")
    with pytest.raises(vlm_jax.UserError, match="checkpoint is not of T5X"):
        vlm_jax.load(tmp_path / "t5x", **says)


@pytest.mark.parametrize("format", ["hf", "t5x"])
def test_onto_a_mesh(t5, format, tmp_path):
    """Tensor by tensor to where the partition rules say, over fsdp x tensor; the texts stay the same."""
    section = dict(t5.config["model"], decoder=dict(t5.config["model"]["decoder"], length=512))
    t5 = dataclasses.replace(t5, model=models.build(section), config=dict(t5.config, model=section))
    vlm_jax.save_pretrained(t5, tmp_path / format, format)
    says = dict(tokenizer=t5.config["tokenizer"], tokenize=t5.tokenize, activation="gelu_tanh")
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    loaded = vlm_jax.load(tmp_path / format, mesh=mesh, **says if format == "t5x" else {})
    same(loaded, t5)
    for part, shape in ((loaded.params["encoder"], (2, 8, 24)), (loaded.params["decoder"], (2, 8, 24))):
        assert part["blocks"]["mlp"]["fc1"]["kernel"].addressable_shards[0].data.shape == shape
    assert loaded.params["decoder"]["token_embed"]["embedding"].addressable_shards[0].data.shape[1] == 8
    np.testing.assert_allclose(loaded.score(TEXTS, ANSWERS), t5.score(TEXTS, ANSWERS), rtol=1e-5)


def test_t5x_with_stacked_layers(t5, tmp_path):
    """As `scalable_t5` has them: layers on the second axis, an axis for heads; norms lie in the msgpack file."""
    folder = tmp_path / "t5x"
    folder.mkdir()
    arrays, mlp = {}, dict(gate="wi_0", fc1="wi_1", fc2="wo")
    for side in ("encoder", "decoder"):
        names = dict(t5x.PARTS[side], mlp="mlp")
        for name, leaf in named_leaves(t5.params[side]["blocks"]).items():
            module, *rest = name.split("/")
            array = np.asarray(leaf)
            if rest[0] in ("query", "key", "value"):
                array = array.reshape(2, 32, 4, 12)
            elif rest[0] == "out":
                array = array.reshape(2, 4, 12, 32)
            own = "/".join([mlp.get(rest[0], rest[0]), *rest[1:]])
            arrays[f"{side}/{side}/{names[module]}/{own}"] = np.moveaxis(array, 0, 1)
        arrays[f"{side}/relpos_bias/rel_embedding"] = np.asarray(t5.params[side]["relative"]["table"]).T
        arrays[f"{side}/{side}_norm/scale"] = np.asarray(t5.params[side]["norm"]["scale"])
    arrays["token_embedder/embedding"] = np.asarray(t5.params["decoder"]["token_embed"]["embedding"])
    arrays["decoder/logits_dense/kernel"] = np.asarray(t5.params["head"]["kernel"])
    t5x.write(folder, {n: Tensor(a.shape, a.dtype, lambda i, a=a: a[i]) for n, a in arrays.items()})
    state = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    state["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = arrays["encoder/encoder_norm/scale"]
    shutil.rmtree(folder / "target.encoder.encoder_norm.scale")
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(state))
    says = dict(tokenizer=t5.config["tokenizer"], tokenize=t5.tokenize, activation="gelu_tanh")
    same(vlm_jax.load(folder, **says), t5)


def test_what_the_layout_has_no_words_for(t5, tmp_path):
    section = t5.config["model"]
    section = dict(section, encoder=dict(section["encoder"], relative_distance=64))
    other = dataclasses.replace(t5, model=models.build(section), config=dict(t5.config, model=section))
    with pytest.raises(vlm_jax.UserError, match=r"decoder\.relative_distance would be 64, not 128"):
        vlm_jax.save_pretrained(other, tmp_path / "hf", "hf")
    for format in ("open_clip", "big_vision"):
        with pytest.raises(vlm_jax.UserError, match="it can be written as native"):
            vlm_jax.save_pretrained(t5, tmp_path / "other", format)


def test_generate_and_score(t5):
    greedy = t5.generate(TEXTS, max_length=6)
    assert len(greedy) == 2 and greedy[0] != greedy[1]
    assert t5.generate(TEXTS[::-1], max_length=6) == greedy[::-1]
    scores = t5.score(TEXTS, ANSWERS)
    ids = [jnp.asarray(t5.tokenizer(texts, 32)) for texts in (TEXTS, ANSWERS)]
    np.testing.assert_allclose(scores, log_likelihood(t5.model, t5.params, *ids), rtol=1e-5)
    beams = t5.generate(TEXTS, "beam", max_length=6, beams=2, prefix="the")
    assert all(text.startswith("the") for text in beams)


def test_sentinels_are_read_and_written(t5):
    top = t5.tokenizer.vocab_size - 1
    ids = t5.tokenizer.encode("a <extra_id_0> in<extra_id_2> park <extra_id_3>")
    assert ids.index(top) == len(t5.tokenizer.encode("a")) and ids.count(top - 2) == 1 and top - 3 not in ids
    assert t5.tokenizer.decode([top, *t5.tokenizer.encode("the dog"), top - 1]) == "<extra_id_0> the dog <extra_id_1>"


def test_errors(t5):
    with pytest.raises(vlm_jax.UserError, match="score takes a target for each text; got 2 texts, 1 targets"):
        t5.score(TEXTS, ANSWERS[:1])
    for call in (t5.caption, t5.embed_images, t5.image_features):
        with pytest.raises(vlm_jax.UserError, match="this model has no image tower"):
            call([np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(vlm_jax.UserError, match="this model has no text tower"):
        t5.embed_texts(TEXTS)
    model = models.build(dict(name="two_tower", image=None, text=dict(variant="mu", vocab_size=8, length=8)))
    tower = dataclasses.replace(t5, model=model)
    with pytest.raises(vlm_jax.UserError, match="writes no texts about texts; an EncoderDecoder or a PrefixLM does"):
        tower.generate(TEXTS)
    with pytest.raises(vlm_jax.UserError, match="this model has no decoder"):
        tower.score(TEXTS, ANSWERS)
