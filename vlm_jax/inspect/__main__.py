"""Shows what a data set holds, before a run reads it.

    vlm-jax inspect jsonl:data/pairs.jsonl
    vlm-jax inspect 'wds:data/laion/{00000..00009}.tar' --out=laion.html

It prints the number of records, sizes of pictures, what would be bad, and the fields of 1,000 records that are spread
over the set, by the paths that ops take: `name/en`. --out also writes one HTML file, with ten of the examples.
"""

from collections.abc import Sequence

from absl import flags

from vlm_jax import command, inspect
from vlm_jax.errors import UserError


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    if len(argv) != 2:
        raise UserError("inspect needs one data set; vlm-jax inspect --help has examples")
    with command.bar(desc="inspect", unit="record") as bar:
        found, shown = inspect.inspect(argv[1], values.split, values.sample, bar.update)
    text = inspect.text(found)
    if values.out:
        page = str(inspect.page(argv[1], found, shown, values.out))
        found, text = found | {"page": page}, f"{text}\n\npage: {page}"
    return command.Answer(found, text)


if __name__ == "__main__":
    command.run("inspect", main)
