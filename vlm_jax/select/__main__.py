"""Chooses the examples of a run by their scores.

    vlm-jax select runs/scores --by="top('similarity', 0.3)" --out=chosen.npz
    vlm-jax select runs/scores --by="least('characters', 5) | unlike(0.95) | cap('concept', 100)" --out=chosen.npz

Rules, one after the other: least, most and among choose by a value, top by a share of the highest values, like by a
classifier of good examples, cap balances, unlike removes near duplicates, weigh sets weights. `vlm_jax/select` has all
of them. The run reads the file as --config.data.index=chosen.npz.
"""

from collections.abc import Sequence

from absl import flags

from vlm_jax import command, select
from vlm_jax.errors import UserError


def main(argv: Sequence[str], values: flags.FlagValues) -> command.Answer:
    if len(argv) != 2:
        raise UserError("select needs the folder of `vlm-jax score`; vlm-jax select --help has examples")
    with command.doing("selecting"):
        before = select.read(argv[1])
        chosen = select.select(before, values.by, values.seed)
        select.write(chosen, values.out)
    found = {"scored": len(before["record"]), "chosen": len(chosen["record"]), "out": values.out}
    text = f"{found['chosen']:,} of {found['scored']:,} examples; read them by --config.data.index={values.out}"
    return command.Answer(found, text)


if __name__ == "__main__":
    command.run("select", main)
