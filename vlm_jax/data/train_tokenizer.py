"""Learns a tokenizer from the texts of a data set, and writes it as a `tokenizer.json`.

    vlm-jax data.train_tokenizer --uri=tfds:emoji --split=train --fields=name/en,keywords/en \\
        --vocab_size=4096 --out=tokenizer.json

Use it as `tokenizer = "json:tokenizer.json"` in a config.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from vlm_jax import command
from vlm_jax.data import tokenizers
from vlm_jax.data.files import replacing
from vlm_jax.data.source import BadExample, Source, field
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError


def corpus(source: Source, fields: Sequence[str]) -> list[str]:
    """Returns the distinct texts under `fields` of all records, in order. A field may hold a list."""
    source = source.narrow(frozenset(fields))
    texts = {}
    for i in command.bar(range(len(source)), desc="read", unit="record"):
        for path in fields:
            try:
                value = field(source[i], path)
            except BadExample as e:
                raise UserError(f"record {source.key(i)} {e}; --fields takes fields that every record has") from None
            texts |= dict.fromkeys([value] if isinstance(value, str) else map(str, value))
    return list(texts)


def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer:
    texts = corpus(open_source(values.uri, values.split), values.fields)
    if not any(texts):
        raise UserError(f"{values.uri} has no text under {', '.join(values.fields)}")
    out = pathlib.Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with command.doing("learning the tokens"):
        trained = tokenizers.train(texts, values.vocab_size)
    with replacing(out) as file:
        file.write(trained.encode())
    size = tokenizers.build(f"json:{out}").vocab_size
    return command.Answer(
        {"out": str(out), "vocab_size": size, "texts": len(texts)}, f"{out}: {size} tokens from {len(texts)} texts"
    )


if __name__ == "__main__":
    command.run("data.train_tokenizer", main)
