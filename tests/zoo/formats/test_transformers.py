"""Settings of Transformers' config.json: each is read, or known to change nothing, or refused by name; no weights."""

import json

import numpy as np
import pytest

from tests.support.released import unpack
from vlm_jax.errors import UserError
from vlm_jax.zoo import recognize
from vlm_jax.zoo.formats import t5, transformers
from vlm_jax.zoo.formats.transformers_texts import TEXTS
from vlm_jax.zoo.formats.transformers_towers import read_config, write_config
from vlm_jax.zoo.formats.transformers_vision import VISION
from vlm_jax.zoo.readers.tensors import write_safetensors

SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
IMAGE = dict(SIZES, image_size=32, patch_size=8)
VIT = dict(IMAGE, model_type="vit")
BERT = dict(SIZES, model_type="bert", vocab_size=100)
POOLER = {"pooler.dense.weight": (32, 32), "embeddings.a": ()}


def image_of(config, shapes=None):
    return transformers.describe(config, shapes or {"embeddings.a": (), "b": ()})[0]["image"]


def text_of(config, shapes=None):
    return transformers.describe(config, shapes or {"embeddings.a": (), "b": ()})[0]["text"]


def test_the_poolers_activation():
    assert image_of(VIT, POOLER)["rep_activation"] == "tanh"
    vit = image_of(dict(VIT, pooler_act="relu"), POOLER)
    assert (vit["rep_dim"], vit["rep_activation"]) == (32, "relu")
    assert write_config(VISION["vit"], dict(vit, out_dim=None))["pooler_act"] == "relu"
    with pytest.raises(UserError, match=r"pooler_act of config\.json is `mish`"):
        image_of(dict(VIT, pooler_act="mish"), POOLER)


def test_query_key_and_value_without_biases():
    dino = dict(IMAGE, model_type="dinov2", qkv_bias=False)
    del dino["intermediate_size"]
    for config in (dict(VIT, qkv_bias=False), dino):
        image = image_of(config)
        assert image["attn_bias"] == ("out",)
        assert write_config(VISION[config["model_type"]], image)["qkv_bias"] is False


def test_rows_of_positions_before_the_first_token():
    text = text_of(dict(BERT, model_type="roberta", max_position_embeddings=514))
    assert (text["length"], text["pad_id"], text["posemb"]) == (512, 1, "counted")
    assert write_config(TEXTS["roberta"], text)["max_position_embeddings"] == 514


def test_a_decoder_is_causal():
    assert "causal" not in text_of(BERT)
    bert = text_of(dict(BERT, is_decoder=True))
    assert bert["causal"] and write_config(TEXTS["bert"], bert)["is_decoder"]
    with pytest.raises(UserError, match="add_cross_attention is True; only False"):
        text_of(dict(BERT, add_cross_attention=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(VIT, use_rope=False), "config.json has use_rope False, which is not known here"),
        (dict(VIT, num_channels=1), "config.json.num_channels is 1; only 3"),
        (dict(VIT, pruned_heads={"0": [1]}), "config.json.pruned_heads is"),
        (dict(VIT, quantization_config={}), "config.json has quantization_config"),
        (dict(BERT, use_bert=1), "config.json has use_bert 1"),
        (dict(model_type="dinov3_vit", **IMAGE, rope_theta=0), "rope_theta 0; expected a number above 0"),
        (dict(model_type="dinov3_vit", **IMAGE, rope_scaling={}), "config.json has rope_scaling {}"),
        (dict(BERT, model_type="xlm-roberta", max_position_embeddings=2), "of which no token has one"),
        (dict(model_type="clip", surprise=1), "config.json has surprise 1"),
        (dict(model_type="electra"), "model_type `electra`; known are: .*; the nearest is `bert`"),
        (dict(model_type="siglip3"), "the nearest is `siglip2?`"),
    ],
)
def test_what_is_not_known_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        transformers.describe(config, {"embeddings.a": (), "b": ()})


def test_a_t5_too():
    with pytest.raises(UserError, match=r"config\.json has use_moe True"):
        t5.describe(dict(model_type="t5", use_moe=True), {})


def test_what_changes_nothing_is_passed_over():
    more = dict(torch_dtype="float16", initializer_range=0.1, id2label={}, encoder_stride=16, return_dict=True)
    assert image_of(dict(VIT, **more)) == image_of(VIT)


def test_config_dicts_override_with_their_defaults():
    """As `CLIPConfig.__post_init__`: what `vision_config_dict` leaves out is its class's default."""
    shapes = {"vision_model.embeddings.a": (), **{str(i): () for i in range(12)}}
    config = dict(model_type="clip", vision_config=dict(IMAGE, hidden_act="gelu"), text_config={})
    assert image_of(config, shapes)["activation"] == "gelu"
    image = image_of(dict(config, vision_config_dict=IMAGE), shapes)
    assert (image["activation"], image["width"]) == ("quick_gelu", 32)
    siglip = dict(config, model_type="siglip", vision_config_dict=dict(hidden_size=99))  # ignored there
    assert image_of(siglip, shapes)["width"] == 32


def test_classifiers_pool_otherwise_than_their_towers():
    shapes = {"vision_model.embeddings.a": (), "classifier.weight": (5, 32), "classifier.bias": (5,)}
    config = dict(vision_config=IMAGE, text_config={})
    clip = image_of(dict(config, model_type="clip"), shapes)
    assert (clip["pool"], clip["cls"], clip["final_norm"], clip["head_bias"]) == ("patches", True, "none", True)
    section, _, ignored = transformers.describe(dict(config, model_type="siglip"), shapes)
    assert section["image"]["pool"] == "gap" and "vision_model.head.*" in ignored
    shapes = {"vit.embeddings.a": (), "classifier.weight": (5, 32)}
    assert image_of(VIT, shapes)["pool"] == "tok" and image_of(VIT, shapes)["out_dim"] == 5
    with pytest.raises(UserError, match="this classifier reads the cls token beside the mean"):
        image_of(dict(IMAGE, model_type="dinov2"), {"dinov2.embeddings.a": (), "classifier.weight": (5, 64)})


def test_projections_have_no_bias():
    shapes = {"vision_model.embeddings.a": (), "visual_projection.weight": (5, 32), "visual_projection.bias": (5,)}
    assert image_of(dict(model_type="clip", vision_config=IMAGE, text_config={}), shapes)["head_bias"] is False


def test_sizes_of_pictures():
    clip = VISION["clip_vision_model"]
    with pytest.raises(UserError, match=r"image_size \[32, 48\]; expected a whole number"):
        read_config(clip, dict(IMAGE, image_size=[32, 48]), ())
    fields = read_config(clip, IMAGE, ())
    assert write_config(clip, dict(fields, image_size=(32, 32)))["image_size"] == 32
    assert read_config(VISION["vit"], dict(IMAGE, image_size=[32, 48]), ())["image_size"] == [32, 48]


def test_one_file_counts_over_its_index(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VIT))
    write_safetensors(tmp_path / "model.safetensors", {"embeddings.a": np.zeros(1, np.float32)})
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "gone.safetensors"}}')
    assert recognize.understand(tmp_path).path.name == "model.safetensors"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("pad_token_id", "0", "pad_token_id '0'; expected a whole number of 0 or more, below 32"),
        ("pad_token_id", 32, "pad_token_id 32; expected a whole number of 0 or more, below 32"),
        ("decoder_start_token_id", -1, "decoder_start_token_id -1; expected a whole number"),
        ("decoder_start_token_id", True, "decoder_start_token_id True; expected a whole number"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings 'yes'; expected true or false"),
    ],
)
def test_ids_of_t5_are_of_the_vocabulary(key, value, expected, tmp_path):
    unpack("t5", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=expected):
        recognize.understand(tmp_path)
