"""Op strings: parsed, refused, split by `cache`."""

import pickle

import numpy as np
import pytest

from tests.support.records import encode, picture, run
from vlm_jax.data import ops, tokenizers
from vlm_jax.data.source import BadExample
from vlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("string", "message"),
    [
        ("decode | flipp", "there is no op `flipp`; did you mean `flip`?"),
        ("resize", "op `resize`: missing a required argument: 'height'; usage: resize(height"),
        ("resize(32, method='cubic')", "op `resize` was given method='cubic'"),
        ("resize('32')", "op `resize` was given height='32'"),
        ("resize(32, hight=3)", "got an unexpected keyword argument 'hight'"),
        ("random_resized_crop(32, scale=0.5)", "was given scale=0.5"),
        ("resize(os.name)", "not a literal"),
        ("resize(32) flip", "is not ops joined by `|`"),
        ("__import__('os').system('true')", "expected an op such as"),
        ("flip | cache", "op `flip` is random and stands before `cache`"),
        ("cache | cache", "has `cache` 2 times"),
        ("tokenize(8)", "needs a tokenizer"),
        ("normalize('clap')", "was given mean='clap'"),
        ("views('local', 2, flop)", "there is no op `flop`; did you mean `flip`?"),
        ("views('local', 2, 'flip')", "was given ops='flip'; usage: views(to: str, n: int, ops: Pipeline)"),
        ("views('local', 2, cache | flip)", "was given `cache | flip`; `cache` stands outside of other ops"),
        ("views('local', 2, flip) | cache", "op `views` is random and stands before `cache`"),
        ("resize(60000)", "op `resize` was given height=60000; expected 1 to 4096"),
        ("resize(8, width=0)", "was given width=0; expected 1 to 4096"),
        ("views('local', 0, flip)", "was given n=0; expected 1 to 1024"),
        (
            "template()",
            "op `template`: missing a required argument: 'template'; usage: template(template: str, *templates: str)",
        ),
        ("keep()", "op `keep`: missing a required argument: 'path'"),
        ("resize(8, {[]: 1})", "not a literal"),
        ("flip | " * 600 + "flip", "has more than 500 ops"),
        ("flip | " * 9000 + "flip", "nested too deep, or has too many ops"),
        ("flip | " * 20_000 + "flip", "has 140,004 characters; expected at most 65,536"),
        ("(" * 9000, "is not ops joined by `|`"),
        ("-" * 30_000 + "1", "nested too deep"),
        ("resize(0x" + "f" * 9000 + ")", "Exceeds the limit"),
        ("flip\0", "null bytes"),
        ("flip(\n9,", "is not ops joined by `|`"),
        (3, "an op string is 3; expected a text"),
        ("tokenize(8, tokenizer=3)", "op `tokenize` was given tokenizer=3; expected a spec, such as tokenizer='clip'"),
        ("tokenize(8, tokenizer='clap')", "the tokenizer spec is `clap`; expected one of: clip, emoji"),
        ("lower(tokenizer='clip')", "got an unexpected keyword argument 'tokenizer'"),
        ("captions(3, flip)", "op `captions` was given `flip`, which is not a literal"),
    ],
)
def test_a_wrong_op_string_is_one_clear_line(string, message):
    with pytest.raises(UserError) as error:
        ops.parse(string)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_cache_splits_the_pipeline_and_leaves_what_it_holds_alone():
    pipeline = ops.parse("decode | resize(8) | cache | flip(1.0) | normalize")
    prepared = pipeline.prepare({"image": encode(picture()), "label": 3})
    assert prepared["image"].dtype == np.uint8 and prepared["image"].shape == (8, 8, 3)
    before = prepared["image"].copy()
    out = pipeline.finish(prepared, np.random.default_rng(0))
    np.testing.assert_array_equal(prepared["image"], before)
    np.testing.assert_allclose(out["image"], before[:, ::-1] / 127.5 - 1, atol=1e-6)
    assert pipeline.paths is None
    assert ops.parse('caption("name/en") | keep("text", "concept")').paths >= {"name/en", "image", "concept"}


def test_ops_as_an_argument_of_an_op():
    string = "captions(2, 'name/en', ops=template('a {}') | lower) | keep('texts')"
    assert ops.parse(string).paths == {"name/en", "a {}", "texts", "image", "text", "example"}
    assert run(string, {"name": {"en": "Cat"}}) == {"texts": ["a cat", ""]}


def test_an_op_may_name_a_tokenizer_of_its_own():
    """A teacher's texts; the tokenizer's name is no path of the record."""
    emoji, clip = tokenizers.build("emoji"), tokenizers.build("clip")
    pipeline = ops.parse(
        "tokenize(6) | tokenize(8, to='taught', tokenizer='clip') | keep('token_ids', 'taught')", emoji
    )
    example = pickle.loads(pickle.dumps(pipeline))({"text": "red fox"}, None)
    np.testing.assert_array_equal(example["token_ids"], emoji(["red fox"], 6)[0])
    np.testing.assert_array_equal(example["taught"], clip(["red fox"], 8)[0])
    assert "clip" not in pipeline.paths
    assert run("tokenize(8, tokenizer='clip')", {"text": "red fox"}, 0, None)["token_ids"].tolist() == [
        *example["taught"]
    ]


def test_an_op_of_ones_own():
    @ops.op
    def invert(image: object, strength: int = 255) -> np.ndarray:
        return strength - image

    try:
        np.testing.assert_array_equal(run("invert", {"image": picture()})["image"], 255 - picture())
    finally:
        del ops.OPS["invert"]
    with pytest.raises(BadExample, match="has no field `image`, which `flip` needs"):
        run("flip", {"text": "x"})


@pytest.mark.parametrize(
    "string",
    [
        " | ".join(["flip"] * 20_000),
        "resize(60000)",
        "tokenize(99999999999)",
        "flip(" * 3000,
        "flip\0",
        "keep('\ud800')",
        "-" * 9000 + "1",
    ],
)
def test_strings_from_elsewhere_fill_no_memory(string):
    with pytest.raises(UserError, match=r"^op (string )?`?") as error:
        ops.parse(string, tokenizer=lambda *_: None)
    assert len(str(error.value)) < 4100
