"""What is loaded can be written in every format that has words for it, and comes back bit for bit."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.flax

import vlm_jax
from tests.support.compare import same
from tests.support.paths import GOLDEN
from vlm_jax import convert, models
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize, save
from vlm_jax.zoo.load import read_params
from vlm_jax.zoo.readers.tensors import open_tensors

NEEDED = dict(preprocess="decode | resize(32) | normalize", tokenizer="emoji", tokenize="tokenize(16)")


def params_of(path, **told):
    released = recognize.understand(path, **told)
    return read_params(released.match(), released.shapes, released.tensors)


def square(name, folder):
    """A SigLIP for pictures of 32 x 32: Transformers has no others."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    arrays["params/img/pos_embedding"] = arrays["params/img/pos_embedding"][:, :4]
    np.savez(folder / "square.npz", **arrays)
    return folder / "square.npz"


@pytest.mark.parametrize("format", ["big_vision", "hf", "native"])
@pytest.mark.parametrize("name", ["siglip_loop", "siglip_scan"])
def test_two_towers_through_every_format(name, format, tmp_path):
    source, middle, back = square(name, tmp_path), tmp_path / "middle.npz", tmp_path / "back.npz"
    convert.convert(source, middle, format, **NEEDED)
    same(params_of(middle), params_of(source))
    convert.convert(middle, back, "big_vision")
    same(params_of(back), params_of(source))


@pytest.mark.parametrize("format", ["big_vision", "hf"])
def test_of_two_towers_that_also_write_the_towers_are_written(format, tmp_path):
    source, out = square("siglip_loop", tmp_path), tmp_path / "out.npz"
    content = save.content_of(recognize.understand(source))
    content = dataclasses.replace(content, **NEEDED)
    section = content.section | dict(name="two_tower_captioner", decoder=dict(width=8, depth=1))
    section["image"] = section["image"] | dict(any_size=True)
    shapes = dict(content.shapes) | {"decoder/norm/scale": None, "head/kernel": None}
    save.write(dataclasses.replace(content, section=section, shapes=shapes), out, format)
    same(params_of(out), params_of(source))


@pytest.mark.parametrize("name", ["vit_gap_learn", "vit_map_sincos2d", "vit_tok_learn", "text_last", "text_map"])
def test_one_tower(name, tmp_path):
    source = GOLDEN / f"{name}.npz"
    told = dict(pool={"vit_gap_learn": "gap", "text_last": "last"}.get(name))
    formats_of_it = ("native", "big_vision", "hf") if name == "text_last" else ("native", "big_vision")
    for format in formats_of_it:
        convert.convert(source, tmp_path / f"{format}.npz", format, **told)
        same(params_of(tmp_path / f"{format}.npz", **told), params_of(source, **told))


@pytest.mark.parametrize("name", ["cappa_loop", "cappa_scan"])
def test_captioners(name, tmp_path):
    source = GOLDEN / f"{name}.npz"
    for format in ("native", "big_vision"):
        convert.convert(source, tmp_path / f"{format}.npz", format, image_size=(32, 48), **NEEDED)
        same(params_of(tmp_path / f"{format}.npz"), params_of(source))
    for format in ("hf", "open_clip"):
        with pytest.raises(UserError, match=r"has no such captioner; it can be written as native, big_vision$"):
            convert.convert(source, tmp_path / format, format, image_size=(32, 48), **NEEDED)


@pytest.mark.parametrize("name", ["siglip_loop", "cappa_loop"])
def test_big_vision_files_are_as_released(name, tmp_path):
    """Written from a scan, an npz has the arrays of the loop that the reference has, up to their root."""
    convert.convert(GOLDEN / f"{name}.npz", tmp_path / "a.npz", "big_vision", image_size=(32, 48), **NEEDED)
    with np.load(GOLDEN / f"{name}.npz") as want, np.load(tmp_path / "a.npz") as got:
        names = [name for name in want.files if name.startswith("params/")]
        assert sorted(got.files) == sorted(names)
        for name in names:
            np.testing.assert_array_equal(got[name], want[name])


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return vlm_jax.load(square("siglip_scan", tmp_path_factory.mktemp("siglip")), **NEEDED)


@pytest.mark.parametrize("format", ["native", "hf"])
def test_preprocessing_and_tokenizer_travel(siglip, format, tmp_path):
    vlm_jax.save_pretrained(siglip, tmp_path / "copy", format)
    copy = vlm_jax.load(tmp_path / "copy")
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), np.uint8))
    np.testing.assert_array_equal(copy.embed_images(pictures), siglip.embed_images(pictures))
    if format == "native":
        assert (copy.preprocess, copy.tokenize) == (siglip.preprocess, siglip.tokenize)
    tokens = siglip.tokenizer(["a cat", "two dogs"], 16)
    np.testing.assert_array_equal(copy.tokenizer(["a cat", "two dogs"], 16), tokens)


@pytest.mark.parametrize("licence", ["mit", "CC BY 4.0; see NOTICE"])
def test_a_card_says_what_the_folder_holds(siglip, licence, tmp_path):
    licensed = dataclasses.replace(siglip, config=siglip.config | dict(licence=licence))
    vlm_jax.save_pretrained(licensed, tmp_path / "a", "hf")
    front, _, text = (tmp_path / "a" / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert 'library_name: "transformers"\npipeline_tag: "zero-shot-image-classification"' in front
    assert f"{models.count(siglip.params):,} parameters" in text and siglip.preprocess in text
    assert recognize.understand(tmp_path / "a").licence == licence


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stablehlo_runs_without_the_project(dtype, tmp_path):
    """The two programs and the file of parameters suffice, for any number of pictures and texts."""
    model, out = vlm_jax.load("pkg:vlm_jax/zoo/clip_tiny"), tmp_path / "a"
    vlm_jax.save_pretrained(model, out, "stablehlo", dtype=dtype)
    params = safetensors.flax.load_file(out / "params.safetensors")
    image, text = (jax.export.deserialize((out / f"{side}.stablehlo").read_bytes()) for side in ("image", "text"))
    assert image.platforms == text.platforms == ("cpu", "cuda", "tpu")
    model = vlm_jax.load(out)
    for n in (1, 3):
        pictures = np.random.default_rng(0).normal(size=(n, 32, 32, 3)).astype(np.float32)
        texts = ["a cat", "two dogs", "umbrella"][:n]
        token_ids = np.stack([model.tokenizer([one], 8, bos=False, eos=False)[0] for one in texts])
        np.testing.assert_allclose(image.call(params, pictures), model.embed_image_batch(pictures), atol=1e-6)
        np.testing.assert_allclose(text.call(params, token_ids), model.embed_texts(texts), atol=1e-6)


def test_stablehlo_says_what_it_cannot_hold(siglip, tmp_path):
    bare = dataclasses.replace(siglip, tokenize=None)
    with pytest.raises(UserError, match="the shape of the text tower's input is not known; pass tokenize="):
        vlm_jax.save_pretrained(bare, tmp_path / "a", "stablehlo")
    with pytest.raises(UserError, match="this model has none; it can be written as native"):
        convert.convert(GOLDEN / "cappa_loop.npz", tmp_path / "a", "stablehlo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["native", "hf"])
def test_weights_in_bfloat16(siglip, format, tmp_path):
    vlm_jax.save_pretrained(siglip, tmp_path / "a", format, dtype="bfloat16")
    copy = vlm_jax.load(tmp_path / "a")
    rounded = jax.tree.map(lambda x: np.asarray(x, ml_dtypes.bfloat16).astype(np.float32), siglip.params)
    jax.tree.map(np.testing.assert_array_equal, dict(copy.params), dict(rounded))


def test_files_hold_what_other_readers_expect(siglip, tmp_path):
    vlm_jax.save_pretrained(siglip, tmp_path / "hf", "hf")
    file = open_tensors(tmp_path / "hf" / "model.safetensors")
    fused = file.tensors["vision_model.head.attention.in_proj_weight"].read()
    pool = siglip.params["image"]["map_pool"]["attn"]
    np.testing.assert_array_equal(fused, np.concatenate([pool[n]["kernel"].T for n in ("query", "key", "value")]))
    assert file.metadata["format"] == "pt"
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "hf").iterdir()
    }


def test_what_a_format_has_no_words_for(siglip, tmp_path):
    with pytest.raises(vlm_jax.UserError, match=r"open_clip's format is of two towers; this model has one"):
        convert.convert(GOLDEN / "vit_tok_learn.npz", tmp_path / "a", "open_clip")
    with pytest.raises(vlm_jax.UserError, match=r"Transformers has no such model.*text/map_pool"):
        convert.convert(GOLDEN / "text_map.npz", tmp_path / "a", "hf")
    with pytest.raises(vlm_jax.UserError, match=r"Transformers has no such model.*image_size would be 224"):
        convert.convert(GOLDEN / "siglip_loop.npz", tmp_path / "a", "hf")
    with pytest.raises(vlm_jax.UserError, match=r"nearest is SiglipModel, but config.json has image_size \(32, 48\)"):
        convert.convert(GOLDEN / "siglip_loop.npz", tmp_path / "a", "hf", image_size=(32, 48))
    with pytest.raises(vlm_jax.UserError, match=r"timm has no image tower of width 32, depth 2.*pool `map`"):
        vlm_jax.save_pretrained(siglip, tmp_path / "a", "open_clip")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(vlm_jax.UserError, match="exists; remove it or write elsewhere"):
        vlm_jax.save_pretrained(siglip, tmp_path / "a")
    with pytest.raises(vlm_jax.UserError, match="--format is `tf`; expected one of: native, hf"):
        vlm_jax.save_pretrained(siglip, tmp_path / "b", "tf")
    with pytest.raises(vlm_jax.UserError, match="--dtype is `int8`; expected one of: float32, bfloat16"):
        vlm_jax.save_pretrained(siglip, tmp_path / "b", dtype="int8")


def test_a_failure_leaves_nothing(siglip, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        vlm_jax.save_pretrained(siglip, tmp_path / "a", "hf")
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_what_a_file_is(tmp_path):
    text = convert.text(convert.describe(GOLDEN / "siglip_scan.npz"))
    assert "format       big_vision" in text and "licence      not stated" in text
    assert "preprocess   unknown: pass preprocess= to load" in text
    row = next(line for line in text.splitlines() if "encoderblock/LayerNorm_0/bias" in line and line.startswith("img"))
    assert row.split() == [
        "img/Transformer/encoderblock/LayerNorm_0/bias", "2x32", "float32", "image/blocks_0/norm1/bias", "...",
        "image/blocks_1/norm1/bias",
    ]  # fmt: skip
    arrays = dict(np.load(GOLDEN / "siglip_loop.npz"))
    del arrays["params/img/embedding/bias"]
    np.savez(tmp_path / "odd.npz", **arrays, **{"params/img/more": np.zeros(3)})
    text = convert.text(convert.describe(tmp_path / "odd.npz"))
    assert "img/more" in text and "(NOTHING TAKES IT)" in text
    assert "no tensor for: image/patch_embed/bias (from img/embedding/bias)" in text


def test_random_parameters_are_told_apart(siglip, tmp_path):
    """Swapped layers or projections would not survive this: every array differs from every other."""
    flat = jax.tree.leaves(siglip.params)
    assert len({np.asarray(leaf).tobytes() for leaf in flat}) == len(flat)
