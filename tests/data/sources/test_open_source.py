"""Sources that cannot be opened."""

import pytest

from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError


@pytest.mark.parametrize(
    ("uri", "split", "message"),
    [
        ("/data/x.tar", None, "has no known scheme; expected one of tfds:, wds:"),
        ("http://x", None, "has no known scheme"),
        ("jsonl:/no/such.jsonl", None, "there is no `/no/such.jsonl`"),
        ("csv:/no/such.csv", None, "there is no `/no/such.csv`"),
        ("folder:/no/such", None, "there is no `/no/such`"),
        ("wds:/no/such.tar", None, "shard `/no/such.tar` is missing"),
        ("wds:/no/such.tar", "train", "has no splits"),
        ("tfds:emoji", "test", "has no split `test`; it has"),
        ("tfds:emoji", None, "has no split `None`; it has"),
        ("tfds:no_such_set_at_all", "train", "cannot be opened: Dataset no_such_set_at_all not found"),
        ("tfds:emojis", "train", "cannot be opened: Dataset emojis not found; did you mean `tfds:emoji`?"),
        ("tfds:Emoji:1.0", "train", "did you mean `tfds:emoji`?"),
        ("tfds:coco_caption", "train", "did you mean `tfds:coco_captions`?"),
        ("tfds:/no/such", "train", "cannot be opened"),
    ],
)
def test_a_source_that_is_not_there_is_one_clear_line(uri, split, message):
    with pytest.raises(UserError) as error:
        open_source(uri, split)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
