"""`vlm_jax.load`: what its arguments do, what it says where one is missing, and where parameters end up."""

import json
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from huggingface_hub import constants

import vlm_jax
from tests.support import fuzz_checkpoints
from tests.support.compare import close_in_scale as close
from tests.support.released import unpack
from vlm_jax import evaluate, models
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.pretrained import Pretrained
from vlm_jax.zoo import key_map, recognize
from vlm_jax.zoo.readers.tensors import open_tensors, write_safetensors

PREPROCESS = "decode | resize({}) | normalize"
SAYS = dict(preprocess=PREPROCESS.format(8), tokenizer="clip", tokenize="tokenize(8)")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "cat", "dog")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP in Transformers' layout, weights and config only."""
    folder = tmp_path_factory.mktemp("clip")
    unpack("clip_eos", folder)
    return folder


@pytest.fixture(scope="module")
def lit(tmp_path_factory):
    """A complete folder: ViT and BERT with preprocessor and vocabulary."""
    folder = tmp_path_factory.mktemp("lit")
    unpack("dual", folder)
    size = {"height": 8, "width": 8}
    config = dict(image_processor_type="ViTImageProcessor", size=size, resample=2, image_mean=[0.5] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(config | dict(image_std=[0.5] * 3)))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="BertTokenizer")))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


PICTURES = np.random.default_rng(0).integers(0, 256, (3, 10, 12, 3), np.uint8)
TEXTS = ["a red cat", "a green dog", "dog"]


# --- what the files tell --------------------------------------------------------------------------------------------


def test_a_complete_folder_needs_no_argument(lit):
    loaded = vlm_jax.load(lit)
    assert loaded.preprocess == "decode | resize(8, method='bilinear') | normalize"
    assert loaded.tokenize == "tokenize(8)"
    assert loaded.tokenizer.encode("a red cat") == [5, 6, 8]
    images, texts = loaded.embed_images(list(PICTURES)), loaded.embed_texts(TEXTS)
    for rows in (images, texts):
        assert rows.shape == (3, 12) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    scale = np.exp(loaded.params["logit_scale"])
    close(loaded.logits(list(PICTURES), TEXTS), scale * images @ texts.T)
    weights = np.exp(scale * images @ texts.T)
    close(loaded.classify(list(PICTURES), TEXTS), weights / weights.sum(1, keepdims=True))
    assert recognize.understand(lit).licence == "apache-2.0"


def test_arguments_count_over_the_files(lit):
    loaded = vlm_jax.load(lit, preprocess="imagenet", tokenize="lower | tokenize(4)", dtype="bfloat16")
    assert "normalize('imagenet')" in loaded.preprocess and loaded.tokenize == "lower | tokenize(4)"
    assert loaded.model.image.dtype == loaded.model.text.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype(np.float32)}


def test_what_is_missing_is_named_with_the_argument(clip, lit, tmp_path):
    with pytest.raises(UserError) as error:
        evaluate.evaluate(vlm_jax.load(clip), "zeroshot", uri="tfds:emoji", split="unseen_style", classes="emoji:seen")
    for argument in ("preprocess=", "openai", "tokenizer=", "tokenize="):
        assert argument in str(error.value)
    for argument in SAYS:
        some = {key: value for key, value in SAYS.items() if key != argument}
        loaded = vlm_jax.load(clip, **some)
        assert getattr(loaded, argument) is None and f"pass {argument}= to `load`" in repr(loaded)
        with pytest.raises(UserError, match=f"pass {argument}="):
            loaded.logits(PICTURES, TEXTS)
        if argument != "preprocess":
            assert loaded.embed_images(PICTURES).shape == (3, 12)
    with pytest.raises(UserError, match=r"tokenizer `cip`|`cip`"):
        vlm_jax.load(clip, **SAYS | dict(tokenizer="cip"))
    unpack("openai", tmp_path)
    with pytest.raises(UserError, match="bare CLIP weights do not tell their activation; pass activation='quick_gelu'"):
        vlm_jax.load(tmp_path / "bare.safetensors", **SAYS)
    with pytest.raises(UserError, match="pass preprocess="):
        vlm_jax.load(tmp_path / "bare.safetensors", activation="gelu").embed_images(PICTURES)
    with pytest.raises(UserError, match="activation"):
        vlm_jax.load(tmp_path / "bare.safetensors", activation="quick-gelu", **SAYS)
    with pytest.raises(UserError, match="is no checkpoint: expected a folder of Transformers"):
        vlm_jax.load(tmp_path)
    with pytest.raises(UserError, match=r"there is no file or folder .*; check the path"):
        vlm_jax.load(tmp_path / "absent.npz")


def test_weights_alone_embed_arrays_and_token_ids(clip, tmp_path):
    """Without preprocessing and tokenizer, also after it was saved; what they are decides nothing else."""
    vlm_jax.save_pretrained(vlm_jax.load(clip), tmp_path / "native")
    whole, pixels = vlm_jax.load(clip, **SAYS), np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    token_ids = np.array([[1, 5, 2, 0, 0, 0, 0, 0], [1, 7, 9, 2, 0, 0, 0, 0]])
    for bare in (vlm_jax.load(clip), vlm_jax.load(tmp_path / "native")):
        np.testing.assert_array_equal(bare.embed_image_batch(pixels), whole.embed_image_batch(pixels))
        np.testing.assert_array_equal(bare.embed_text_batch(token_ids), whole.embed_text_batch(token_ids))
        with pytest.raises(UserError, match=r"pass preprocess="):
            bare.classify(PICTURES, TEXTS)
        for wrong, expected in ((TEXTS, "texts go to `embed_texts`"), (pixels[0, 0], r"got float32 \[8, 3\]")):
            with pytest.raises(UserError, match=expected):
                bare.embed_text_batch(wrong)
        with pytest.raises(UserError, match="vocabulary"):
            bare.embed_text_batch(token_ids + 10**6)


def test_averaged_weights_that_are_not_there(clip, tmp_path):
    vlm_jax.save_pretrained(vlm_jax.load(clip), tmp_path / "native")
    fuzz_checkpoints.of_workdir(tmp_path)
    for folder in (tmp_path / "native", tmp_path, clip):
        with pytest.raises(UserError, match="holds no averaged weights"):
            vlm_jax.load(folder, weights="ema")
        with pytest.raises(UserError, match="weights is 'EMA'; expected 'ema'"):
            vlm_jax.load(folder, weights="EMA")


def test_a_tower_that_is_not_there(tmp_path):
    unpack("vit", tmp_path)
    loaded = vlm_jax.load(tmp_path, preprocess=SAYS["preprocess"])
    assert loaded.tokenizer is None and loaded.tokenize is None
    for call in (lambda: loaded.embed_texts(["a"]), lambda: loaded.classify(list(PICTURES), ["a"])):
        with pytest.raises(UserError, match="this model has no text tower"):
            call()


def test_a_text_longer_than_the_table_names_the_option(lit):
    loaded = vlm_jax.load(lit, tokenize="tokenize(9)")
    with pytest.raises(UserError, match=r"L <= 8, the text tower's `length`; got \[1, 9\]: tokenize\(8\) in the data"):
        loaded.embed_texts(["a cat"])


# --- other image sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", models.positions.RESAMPLING)
@pytest.mark.parametrize(("size", "grid"), [(16, (4, 4)), ((8, 20), (2, 5)), ((4, 8), (1, 2))])
def test_positions_resample_when_told_to(clip, size, grid, method):
    loaded = vlm_jax.load(clip, image_size=size, resample=method, **SAYS | dict(preprocess="openai"))
    table = open_tensors(clip / "model.safetensors").tensors["vision_model.embeddings.position_embedding.weight"].read()
    rows = models.resample_posemb(table[None, 1:].astype(np.float32), (2, 2), grid, method)
    got = loaded.params["image"]["pos_embed"]
    assert got.shape == (1, 1 + grid[0] * grid[1], 16)
    close(got[:, :1], table[None, :1])
    close(got[:, 1:], rows)
    sides = (size, size) if isinstance(size, int) else size
    assert loaded.model.image.image_size == sides
    expected = f"central_crop({size})" if isinstance(size, int) else f"central_crop({size[0]}, {size[1]})"
    assert expected in loaded.preprocess


def test_a_resampled_model_takes_such_pictures(clip):
    size = (8, 12)
    says = SAYS | dict(preprocess="decode | resize(8, 12) | normalize")
    loaded = vlm_jax.load(clip, image_size=size, resample="bicubic", **says)
    assert loaded.embed_images(list(PICTURES)).shape == (3, 12)
    with pytest.raises(UserError, match=r"images should be \[B, 8, 12, 3\]; got \[2, 8, 8, 3\]"):
        loaded.embed_image_batch(np.zeros((2, 8, 8, 3), np.float32))


def test_positions_never_resample_silently(clip):
    with pytest.raises(UserError, match=r"positions for 2 x 2 patches.* 4 x 4: pass resample= .*linear, bicubic, bic"):
        vlm_jax.load(clip, image_size=16, **SAYS)
    with pytest.raises(UserError, match="resampling method is `area`; expected one of: linear, bicubic"):
        vlm_jax.load(clip, image_size=16, resample="area", **SAYS)
    same = vlm_jax.load(clip, image_size=8, **SAYS)
    assert np.array_equal(same.params["image"]["pos_embed"], vlm_jax.load(clip, **SAYS).params["image"]["pos_embed"])


def test_longer_texts_keep_what_short_ones_were(tmp_path):
    """A causal tower of 24 tokens reads 40: the first 20 places, and so short texts, are as they were."""
    tower = dict(width=16, depth=1, heads=2, mlp_dim=16, out_dim=8)
    text = dict(vocab_size=2985, length=24, pool="eos", eos_id=2, causal=True, **tower)
    section = dict(image=dict(patch=8, image_size=8, **tower), text=text)
    model = models.build(section)
    params = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 24), int))["params"]
    own = dict(preprocess="decode | resize(8) | normalize", tokenize="lower | tokenize(24, bos=False)")
    about = dict(own, tokenizer="emoji", model=section)
    vlm_jax.save_pretrained(Pretrained(model, params, None, **own, config=about), tmp_path / "a")
    short, long = vlm_jax.load(tmp_path / "a"), vlm_jax.load(tmp_path / "a", text_length=40)
    assert long.model.text.length == 40 and long.tokenize == "lower | tokenize(40, bos=False)"
    close(long.embed_texts(["a cat", "two dogs"]), short.embed_texts(["a cat", "two dogs"]))
    words = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2
    assert not np.allclose(long.embed_texts([words]), short.embed_texts([words]), atol=1e-4)
    again = tmp_path / "long"
    vlm_jax.save_pretrained(long, again)
    close(vlm_jax.load(again).embed_texts([words]), long.embed_texts([words]))
    with pytest.raises(UserError, match="text_length is 0; expected 1 or more"):
        vlm_jax.load(tmp_path / "a", text_length=0)


@pytest.mark.parametrize("size", [0, -8, 3, (8,), (8, 8, 8), "8", 8.5])
def test_sizes_that_are_none(clip, size):
    with pytest.raises(UserError, match="image_size"):
        vlm_jax.load(clip, image_size=size, resample="linear", **SAYS)


# --- hf: ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_hf_reads_a_filled_cache_without_network(cache, lit):
    sha = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--org--lit"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(sha)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / sha).mkdir(parents=True)
    for file in lit.iterdir():  # as the hub does: links to blobs
        shutil.copyfile(file, folder / "blobs" / f"of-{file.name}")
        (folder / "snapshots" / sha / file.name).symlink_to(f"../../blobs/of-{file.name}")
    want = named_leaves(vlm_jax.load(lit).params)
    for spec in ("hf:org/lit", "hf:org/lit@main", f"hf:org/lit@{sha}"):
        got = named_leaves(vlm_jax.load(spec).params)
        assert all(np.array_equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("name", ["org/absent", "org/absent@v2"])
def test_hf_names_what_is_not_cached(cache, name):
    with pytest.raises(UserError, match=f"hf:{name} is not in the cache and cannot be downloaded") as error:
        vlm_jax.load(f"hf:{name}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "a/b/c", "org/na me", "../org", "org/name/"])
def test_hf_names_that_are_none(cache, name):
    with pytest.raises(UserError, match=r"^hf:") as error:
        vlm_jax.load(f"hf:{name}")
    assert "\n" not in str(error.value)


# --- meshes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [dict(data=8), dict(fsdp=8), dict(tensor=4), dict(data=2, fsdp=2, tensor=2)])
def test_parameters_go_straight_to_their_shards(clip, sizes):
    mesh = sharding.make_mesh(**{"data": -1, **sizes})
    rules = ((r".*(pos_embed|cls|scale|logit_scale)", ()), *sharding.RULES)
    loaded = vlm_jax.load(clip, mesh=mesh, partition=rules, **SAYS)
    want, places = vlm_jax.load(clip, **SAYS).params, sharding.param_shardings(rules, loaded.params, mesh)
    split = 0
    for leaf, alone, place in zip(*map(jax.tree.leaves, (loaded.params, want, places)), strict=True):
        assert leaf.sharding == place and leaf.dtype == np.float32
        assert np.array_equal(leaf, alone)
        split += not leaf.is_fully_replicated
    assert split == {"data": 0, "fsdp": 16, "tensor": 20}.get("".join(sizes), 24)  # of 42


def test_a_mesh_changes_no_embedding(lit):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = vlm_jax.load(lit, mesh=mesh)
    close(spread.embed_texts(TEXTS), vlm_jax.load(lit).embed_texts(TEXTS))


def test_a_shard_that_does_not_divide_is_named(clip):
    with pytest.raises(UserError, match="does not divide"):
        vlm_jax.load(clip, mesh=sharding.make_mesh(data=1, tensor=8), partition=((".*", ("tensor",)),), **SAYS)


def unaligned(shape):
    """As `key_map.aligned_empty`, but where jax must copy on a CPU, as it must to a device with a memory of its own."""
    buffer = np.empty(int(np.prod(shape)) + 32, np.float32)
    start = -buffer.ctypes.data % 64 // 4 + 1
    return buffer[start : start + int(np.prod(shape))].reshape(shape)


def test_the_host_holds_one_shard_at_a_time(tmp_path, monkeypatch):
    """Peak of what numpy allocates beside the devices' memory, while a model of 58 MB loads onto a mesh."""
    rng = np.random.default_rng(0)
    section = dict(width=512, depth=2, heads=8, mlp_dim=2048, vocab_size=16_384, length=8, scan=True)
    model = dict(name="two_tower", image=None, text=section)
    shapes = recognize.param_shapes(model)
    arrays = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
    write_safetensors(tmp_path / "params.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps(dict(model=model)))
    monkeypatch.setattr(key_map, "PIECE", 2**18)
    monkeypatch.setattr(key_map, "aligned_empty", unaligned)
    load = lambda: vlm_jax.load(tmp_path, mesh=sharding.make_mesh(data=2, fsdp=4), **SAYS)
    load()  # imports and traces
    tracemalloc.start()
    loaded = load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(loaded.params))
    assert largest == 2**23  # of the token embedding
    assert peak <= 1.2 * largest + 1e6  # and what jax and Python need to trace a model and to read headers
    leaves = named_leaves(loaded.params)
    assert all(np.array_equal(leaves[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("name", ["clip_tiny", "clip_base", "cappa_base"])
def test_packaged_models_name_pictures_of_a_style_that_they_have_not_seen(name):
    model, source = vlm_jax.load(f"pkg:vlm_jax/zoo/{name}"), open_source("tfds:emoji", "unseen_style")
    records = [source[i] for i in range(800, 816)]
    found = model.classify([record["image"] for record in records], [record["name"]["en"] for record in records])
    assert np.mean(np.argmax(found, axis=1) == np.arange(16)) >= 0.75  # chance is 0.06


def test_the_packaged_language_model_tells_the_end_of_a_caption():
    model, source = vlm_jax.load("pkg:vlm_jax/zoo/lm_base"), open_source("scenes:?examples=16", "unseen_pairs")
    words = [source[i]["long_caption"].split() for i in range(16)]
    begins, ends = ([" ".join(one[part]) for one in words] for part in (slice(0, 4), slice(4, None)))
    backwards = [" ".join(end.split()[::-1]) for end in ends]
    assert np.mean(model.score(begins, ends) > model.score(begins, backwards)) >= 0.75  # chance is 0.5
