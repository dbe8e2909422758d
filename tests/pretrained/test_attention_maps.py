"""Attention and patches of an image tower against what its parameters say, computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import clip
from vlm_jax import UserError, config, models, objectives
from vlm_jax.data import tokenizers
from vlm_jax.models import insertion
from vlm_jax.models.insertions.low_rank import LowRank
from vlm_jax.models.insertions.prompts import Prompt
from vlm_jax.models.pooling import MapPool
from vlm_jax.pretrained import Pretrained, attention_maps

SMOKE = config.plain(clip.get_config("smoke"))
SIZES = dict(width=16, depth=2, heads=2, mlp_dim=32)
TEXT = dict(**SIZES, pool="mean", vocab_size=SMOKE["model"]["text"]["vocab_size"], length=8, out_dim=12)
PICTURES = list(np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8))
PIXELS = jnp.asarray(np.stack(PICTURES), jnp.float32) / 127.5 - 1
GRID = (2, 3)


def ready(section):
    """A `Pretrained` with drawn parameters, none of them zero."""
    model = models.build(section)
    texts = None if section["text"] is None else jnp.ones((3, 8), jnp.int32)
    shapes, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0), PIXELS, texts)["params"])
    rng = np.random.default_rng(1)
    drawn = [(0.3 * rng.standard_normal(leaf.shape) + 0.1).astype(np.float32) for leaf in shapes]
    tokenizer = tokenizers.build(SMOKE["tokenizer"])
    return Pretrained(model, jax.tree.unflatten(tree, drawn), tokenizer, "normalize", SMOKE["tokenize"])


def two_tower(text=None, **image):
    return ready(dict(image=dict(**SIZES, patch=8, out_dim=12, **image), text=text, scale_init=10.0))


@pytest.fixture(scope="module")
def towers():
    """One model for each way from tokens to an embedding."""
    return {
        "map": two_tower(TEXT, pool="map"),
        "tok": two_tower(pool="tok", registers=2),
        "gap": two_tower(pool="gap"),
        "concat": two_tower(pool="concat"),
    }


def scanned(pretrained, **fields):
    """The same model with its blocks in one scan."""
    image = pretrained.params["image"]
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(image[f"blocks_{i}"] for i in range(2)))
    image = {name: leaf for name, leaf in image.items() if not name.startswith("blocks_")} | {"blocks": blocks}
    model = pretrained.model.clone(image=pretrained.model.image.clone(scan=True, **fields))
    return Pretrained(model, pretrained.params | {"image": image}, None, "normalize", None)


def seen(pretrained):
    """What the modules of the image tower return, by path."""
    run = jax.jit(lambda params: pretrained.model.apply({"params": params}, PIXELS, None, capture_intermediates=True))
    _, state = run(pretrained.params)
    return state["intermediates"]["image"]


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def norm(params, x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


def weights(params, x, kv, heads=2):
    """Softmax of q k^T / sqrt(d), [B, heads, Lq, Lk]."""
    split = lambda t: t.reshape(*t.shape[:2], heads, -1)
    query, key = split(dense(params["query"], x)), split(dense(params["key"], kv))
    return jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5)


def of_blocks(pretrained):
    """The mean over heads of each block's weights, [B, L, L]."""
    outputs = seen(pretrained)
    inputs = [outputs[f"blocks_{i}"]["norm1"]["__call__"][0] for i in range(2)]
    params = [pretrained.params["image"][f"blocks_{i}"]["attn"] for i in range(2)]
    return [weights(p, x, x).mean(1) for p, x in zip(params, inputs, strict=True)]


def tokens(pretrained):
    return jax.jit(pretrained.model.apply)({"params": pretrained.params}, PIXELS, None).image_tokens


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_attention_of_a_map_head_is_its_probe_s(towers):
    found = attention_maps.attention(towers["map"], PICTURES)
    assert found.shape == (3, *GRID) and found.dtype == np.float32
    pool = towers["map"].params["image"]["map_pool"]
    probe = jnp.broadcast_to(pool["probe"], (3, 1, 16))
    expected = weights(pool["attn"], probe, tokens(towers["map"])).mean(1)[:, 0]
    np.testing.assert_allclose(found, expected.reshape(3, *GRID), atol=1e-6)
    np.testing.assert_allclose(attention_maps.attention(scanned(towers["map"]), PICTURES), found, atol=1e-6)


def test_attention_of_a_cls_token_is_its_row_of_the_last_block(towers):
    found = attention_maps.attention(towers["tok"], PICTURES)
    expected = of_blocks(towers["tok"])[-1][:, 0, 3:]  # after the cls token and two registers
    np.testing.assert_allclose(found, expected.reshape(3, *GRID), atol=1e-6)
    assert np.all(found.sum((1, 2)) < 0.999), "some of it goes to the cls token and the registers"
    again = attention_maps.attention(scanned(towers["tok"], remat="full"), PICTURES)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_attention_of_a_mean_is_rolled_out(towers):
    found = attention_maps.attention(towers["gap"], PICTURES)
    first, last = ((w + np.eye(6)) / 2 for w in of_blocks(towers["gap"]))
    np.testing.assert_allclose(found, (last @ first).mean(1).reshape(3, *GRID), atol=1e-6)
    np.testing.assert_allclose(found.sum((1, 2)), 1, atol=1e-5)
    again = attention_maps.attention(scanned(towers["gap"], remat="full"), PICTURES)
    np.testing.assert_allclose(again, found, atol=1e-6)


@pytest.mark.parametrize("pool", ["gap", "concat"])
def test_patches_add_up_to_the_picture(towers, pool):
    model, x = towers[pool], tokens(towers[pool])
    head = model.params["image"]["head"]
    if pool == "gap":
        each = dense(head, x)
    else:
        each = 6 * jnp.einsum("bnd,nde->bne", x, head["kernel"].reshape(6, 16, 12)) + head["bias"]
    np.testing.assert_allclose(unit(each.mean(1)), model.embed_images(PICTURES), atol=1e-5)
    found = attention_maps.patch_embeddings(model, PICTURES)
    np.testing.assert_allclose(found, unit(each).reshape(3, *GRID, 12), atol=1e-5)


def test_patches_of_a_map_head_pass_through_it_alone(towers):
    model, x = towers["map"], tokens(towers["map"])
    options = dict(activation="gelu_tanh", gated=False, norm="layernorm", norm_eps=1e-6, attn_bias=True, mlp_bias=True)
    pool = MapPool(heads=2, mlp_dim=32, head_dim=None, implementation=None, dtype="float32", **options)
    params, pool = model.params["image"], jax.jit(pool.apply)
    each = [dense(params["head"], pool({"params": params["map_pool"]}, x[:, i : i + 1])) for i in range(6)]
    expected = unit(np.stack(each, axis=1)).reshape(3, *GRID, 12)
    np.testing.assert_allclose(attention_maps.patch_embeddings(model, PICTURES), expected, atol=1e-5)
    words = ["cat", "a red hat"]
    cosines = attention_maps.word_patch(model, PICTURES, words)
    assert cosines.shape == (3, 2, *GRID) and cosines.dtype == np.float32
    text = model.embed_texts(words)
    np.testing.assert_allclose(cosines[1, :, 0, 2], text @ expected[1, 0, 2], atol=1e-5)


def test_patches_beside_a_cls_token_attend_to_themselves_last(towers):
    model, outputs = towers["tok"], seen(towers["tok"])
    params, last = model.params["image"], model.params["image"]["blocks_1"]
    x = outputs["blocks_0"]["__call__"][0][0]
    x = x + dense(last["attn"]["out"], dense(last["attn"]["value"], norm(last["norm1"], x)))
    x = x + dense(last["mlp"]["fc2"], jax.nn.gelu(dense(last["mlp"]["fc1"], norm(last["norm2"], x))))
    expected = unit(dense(params["head"], norm(params["norm"], x)))[:, 3:].reshape(3, *GRID, 12)
    np.testing.assert_allclose(attention_maps.patch_embeddings(model, PICTURES), expected, atol=1e-5)
    again = attention_maps.patch_embeddings(scanned(model), PICTURES)
    np.testing.assert_allclose(again, expected, atol=1e-5)


def test_coca_pools_with_its_first_query():
    words = dict(SIZES, depth=1, vocab_size=TEXT["vocab_size"], length=8, start_id=1)
    image, pool = dict(**SIZES, patch=8, cls=True), dict(width=16, queries=4, heads=2)
    model = ready(dict(name="coca", image=image, pool=pool, text=words, decoder=words, out_dim=12))
    x = jax.jit(model.model.image.apply)({"params": model.params["image"]}, PIXELS).tokens
    own = model.params["pool"]
    queries = np.broadcast_to(norm(own["query_norm"], own["queries"], 1e-5), (3, 4, 16))
    expected = weights(own["attn"], queries, x).mean(1)[:, 0, 1:]
    found = attention_maps.attention(model, PICTURES)
    np.testing.assert_allclose(found, expected.reshape(3, *GRID), atol=1e-6)
    pooled = norm(own["norm"], dense(own["attn"]["out"], dense(own["attn"]["value"], x[:, 1:])), 1e-5)
    expected = unit(dense(model.params["image_head"], pooled)).reshape(3, *GRID, 12)
    np.testing.assert_allclose(attention_maps.patch_embeddings(model, PICTURES), expected, atol=1e-5)


def test_what_is_inserted_counts(towers):
    plain = towers["tok"]
    adapted = insertion.inserted(plain.model, LowRank(where="image/.*/attn/query", rank=2))
    params = insertion.begin(jax.random.key(0), adapted, plain.params, PIXELS, None)
    for i in range(2):
        params["image"][f"blocks_{i}"]["attn"]["query"]["inserted_b"] = jax.random.normal(jax.random.key(i), (2, 16))
    found = attention_maps.attention(Pretrained(adapted, params, None, "normalize", None), PICTURES)
    merged = Pretrained(plain.model, insertion.merge(params, adapted.insertions), None, "normalize", None)
    np.testing.assert_allclose(found, attention_maps.attention(merged, PICTURES), atol=1e-5)
    assert np.abs(found - attention_maps.attention(plain, PICTURES)).max() > 1e-3
    prompted = insertion.inserted(plain.model, Prompt(length=3))
    params = insertion.begin(jax.random.key(0), prompted, plain.params, PIXELS, None)
    found = attention_maps.attention(Pretrained(prompted, params, None, "normalize", None), PICTURES)
    assert found.shape == (3, *GRID)


def test_what_has_no_patches_or_no_embeddings_is_named(towers):
    image = dict(type="efficientnet", variant="lite0", out_dim=12)
    lite = Pretrained(models.build(dict(image=image, text=None)), {}, None, "normalize", None)
    with pytest.raises(UserError, match="a EfficientNetLite, has no patches; a ViT has"):
        attention_maps.attention(lite, PICTURES)
    captioner = models.build(
        dict(name="captioner", image=dict(**SIZES, patch=8), decoder=dict(**SIZES, vocab_size=9, length=4))
    )
    with pytest.raises(UserError, match="a captioner embeds no pictures"):
        attention_maps.patch_embeddings(Pretrained(captioner, {}, None, "normalize", None), PICTURES)
    with pytest.raises(UserError, match="this model has no text tower"):
        attention_maps.word_patch(towers["gap"], PICTURES, ["a cat"])
    packed = Pretrained(towers["gap"].model, {}, None, "to_float | pack_patches(8, 6)", None)
    with pytest.raises(UserError, match=r"different grids, \[\[2, 3\], \[3, 2\]\]; give them one at a time"):
        attention_maps.attention(packed, [PICTURES[0], PICTURES[0].swapaxes(0, 1)])


def test_attention_of_packed_patches_leaves_the_padding_out():
    image = dict(**SIZES, patch=8, image_size=(16, 24), pool="map", out_dim=12)
    plain = ready(dict(image=image, text=None))
    packed = Pretrained(plain.model, plain.params, None, "normalize | pack_patches(8, 9)", None)
    for found in (attention_maps.attention, attention_maps.patch_embeddings):
        np.testing.assert_allclose(found(packed, PICTURES), found(plain, PICTURES), atol=1e-5)


def test_maps_lie_on_what_the_tower_sees(towers):
    model = dataclasses.replace(
        towers["gap"], preprocess="central_crop(16, 20) | resize(17, 30, method='bilinear') | normalize"
    )
    pictures = attention_maps.seen(model, PICTURES)
    assert pictures.dtype == np.uint8 and pictures.shape == (3, 16, 24, 3), "whole patches of 8"
    crop = Image.fromarray(PICTURES[1][:, 2:22]).resize((30, 17), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pictures[1], np.asarray(crop)[:16, :24])
    np.testing.assert_array_equal(attention_maps.seen(towers["gap"], [Image.fromarray(PICTURES[0])])[0], PICTURES[0])


@pytest.mark.parametrize("pool", ["map", "concat"])
def test_terms_see_the_same_patches(towers, pool):
    outputs = objectives.Outputs(towers[pool].model, towers[pool].params, {"image": PIXELS})
    found = attention_maps.patch_embeddings(towers[pool], PICTURES)
    np.testing.assert_allclose(outputs["patch_embeddings"].reshape(found.shape), found, atol=1e-5)


def test_class_tokens_pass_the_head(towers):
    """The second one is the first register; the pool `second` embeds pictures by it."""
    tok = towers["tok"]
    outputs = objectives.Outputs(tok.model, tok.params, {"image": PIXELS})
    first, second, _ = np.moveaxis(outputs["class_embeddings"], 1, 0)
    np.testing.assert_allclose(first, outputs["image_embedding"], atol=1e-6)
    model = tok.model.clone(image=tok.model.image.clone(pool="second", cls=True))
    again = objectives.Outputs(model, tok.params, {"image": PIXELS})
    np.testing.assert_allclose(second, again["image_embedding"], atol=1e-6)
    assert outputs["patch_embeddings"].shape == (3, 6, 12)


def test_patches_that_a_pool_couples_are_named(towers):
    model = towers["concat"].model.clone(image=towers["concat"].model.image.clone(out_dim=None))  # as long as all
    outputs = objectives.Outputs(model, towers["concat"].params, {"image": PIXELS})
    with pytest.raises(UserError, match="this one has pool `concat`: set model"):
        outputs["patch_embeddings"]
