"""Lists the released models that load, and what agrees with the originals.

    vlm-jax models
    vlm-jax models siglip2
    vlm-jax models EVA02 --json

With a name, only what has it in project, family or variant, with every variant.
"""

from collections.abc import Sequence

from absl import flags

from vlm_jax import command
from vlm_jax.errors import UserError
from vlm_jax.zoo.known import Known, list_models


def table(models: Sequence[Known], every: bool) -> str:
    """Returns a paragraph a project; `every`: with all variants, one a line."""
    lines = []
    for project in dict.fromkeys(one.project for one in models):
        lines += ["", project]
        for one in (one for one in models if one.project == project):
            shown = f"{one.variants[0]}{f' and {len(one.variants) - 1} more' if len(one.variants) > 1 else ''}"
            lines.append(f"  {one.family:28}  {'' if every else f'{shown:38}  {one.parity}'}".rstrip())
            if every:
                lines += [f"    {name}" for name in one.variants]
                lines += [
                    f"    agree: {one.parity}",
                    f"    test: {one.test}",
                    f"    written by --format={one.write or '(none)'}",
                ]
    return "\n".join([*lines[1:], "", "vlm-jax models NAME lists the variants" if not every else ""]).rstrip()


def main(argv: Sequence[str], _: flags.FlagValues) -> command.Answer:
    if len(argv) > 2:
        raise UserError(f"models takes one name; got {' '.join(argv[1:])}")
    found = list_models(*argv[1:])
    return command.Answer({"models": [one._asdict() for one in found]}, table(found, len(argv) > 1))


if __name__ == "__main__":
    command.run("models", main)
