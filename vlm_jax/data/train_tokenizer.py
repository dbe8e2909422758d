"""Learns a tokenizer from the texts of a data set, and writes it as a `tokenizer.json`.

    python -m vlm_jax.data.train_tokenizer --uri=tfds:emoji --split=train --fields=name/en,keywords/en \
        --vocab_size=4096 --out=tokenizer.json

Use it as `tokenizer = "json:tokenizer.json"` in a config.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from vlm_jax import command
from vlm_jax.data import registry, sources, tokenizers
from vlm_jax.errors import UserError

URI = flags.DEFINE_string("uri", None, "The data set, as in config.data.uri.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Its split, where it has splits.")
FIELDS = flags.DEFINE_list("fields", None, "Text fields, nested ones as name/en.", required=True)
VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 4096, "Tokens at most, 256 bytes and 3 specials among them.")
OUT = flags.DEFINE_string("out", None, "The file to write.", required=True)


def corpus(source: sources.Source, fields: Sequence[str]) -> list[str]:
    """Returns the distinct texts under `fields` of all records, in the order they come. A field may hold a list."""
    source = source.narrow(frozenset(fields))
    texts = {}
    for i in range(len(source)):
        for path in fields:
            try:
                value = registry.field(source[i], path)
            except registry.BadExample as e:
                raise UserError(f"record {source.key(i)} {e}; --fields takes fields that every record has") from None
            texts |= dict.fromkeys([value] if isinstance(value, str) else map(str, value))
    return list(texts)


def main(argv: Sequence[str]) -> None:
    del argv
    texts = corpus(sources.open_source(URI.value, SPLIT.value), FIELDS.value)
    if not any(texts):
        raise UserError(f"{URI.value} has no text under {', '.join(FIELDS.value)}")
    out = pathlib.Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(tokenizers.train(texts, VOCAB_SIZE.value), encoding="utf-8")
    print(f"{out}: {tokenizers.build(f'json:{out}').vocab_size} tokens from {len(texts)} texts")


if __name__ == "__main__":
    command.run(main)
