"""Learns a tokenizer from the texts of a data set, and writes it as a `tokenizer.json`.

    vlm-jax data.train_tokenizer --uri=tfds:emoji --split=train --fields=name/en,keywords/en \\
        --vocab_size=4096 --out=tokenizer.json

Use it as `tokenizer = "json:tokenizer.json"` in a config.
"""

import logging
import pathlib
from collections.abc import Sequence

from absl import flags

from vlm_jax import command
from vlm_jax.data import tokenizers
from vlm_jax.data.files import replacing
from vlm_jax.data.source import BadExample, Source, field
from vlm_jax.data.sources import open_source
from vlm_jax.errors import UserError

log = logging.getLogger(__name__)


def corpus(source: Source, fields: Sequence[str]) -> list[str]:
    """Returns the distinct texts under `fields` of all records, in order. A field may hold a list.

    Records that cannot be read, and values that are no text, are left out; the log says how many.
    """
    source = source.narrow(frozenset(fields))
    texts, left_out = {}, 0
    for i in command.bar(range(len(source)), desc="read", unit="record"):
        try:
            record = source[i]
        except Exception:  # of any odd record
            left_out += 1
            continue
        for path in fields:
            try:
                value = field(record, path)
            except BadExample as e:
                raise UserError(f"record {source.key(i)} {e}; --fields takes fields that every record has") from None
            values = value if isinstance(value, list | tuple) else [value]
            found = [text for text in values if isinstance(text, str)]
            left_out += len(values) - len(found)
            texts |= dict.fromkeys(found)
    if left_out:
        log.warning("left out %d records that cannot be read and values that are no text", left_out)
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
