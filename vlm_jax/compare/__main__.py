"""Compares runs and evaluations: results with intervals, curves together, settings that differ.

    vlm-jax compare runs/one runs/two
    vlm-jax compare runs/* --out=comparison.html

A run is a folder that `train`, `evaluate` or `adapt` wrote. The command prints a table of all metrics and one of the
settings that differ; --out also writes one HTML file with figures, which needs no other file.
"""

from collections.abc import Sequence

from absl import flags

from vlm_jax import command, compare


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    runs = compare.read(argv[1:])
    compared = compare.compare(runs)
    text = compare.text(runs, compared)
    if values.out:
        with command.doing("drawing"):
            page = str(compare.page(runs, compared, values.out))
        compared, text = compared | {"page": page}, f"{text}\n\npage: {page}"
    return command.Answer(compared, text)


if __name__ == "__main__":
    command.run("compare", main)
