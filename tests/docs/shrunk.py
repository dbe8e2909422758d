"""Runs a command of a page as it stands there, with further flags where it would take hours or a pod.

    python -m tests.docs.shrunk -m vlm_jax train --config=configs/clip.py:B/32 --workdir=runs/b32
    python -m tests.docs.shrunk -m experiments.same_concept.run

`TABLE` says which commands are given which flags, and why. The page's own flags are read and checked with them: a flag
that is there twice counts as it is the second time, and what the table does not name is as on the page.
"""

import os
import re
import runpy
import shlex
import sys
import tomllib

TWO_STEPS = (
    "--config.batch_size=16 --config.duration='2 steps' --config.optimizer.schedule.warmup='1 steps'"
    " --config.log.every='1 steps' --config.data.workers=0 --config.model.dtype=float32 "
)
LAION = "wds:{data}/data/laion/{{00000..00001}}.tar"
SHARDS = f"--config.data.uri={LAION} "
IMAGE, TEXT = "--config.model.image.variant=mu/32 ", "--config.model.text.variant=mu --config.model.text.out_dim=32 "
C4 = "--config.tokenizer=sentencepiece:{data}/c4_en.model "
TABLE = (  # what the command matches; the flags that it is given; why
    (r"\btrain .*[/=](\w*cap|cappa|clip|coca|lit)(\.py)?:tiny", "--config.duration='4 steps'", "minutes of training"),
    (
        r"\btrain .*[/=](\w*cap|cappa|clip|coca|filip|lit)(\.py)?:(tiny|smoke)",
        "--config.evals.unseen_style.split=unseen_style[800:832]"
        " --config.evals.unseen_concepts.split=unseen_concepts[300:332]",
        "minutes of evaluating",
    ),
    (
        r"\btrain .*[/=](\w*cap|cappa|clip|coca|filip)(\.py)?:(tiny|smoke)",
        "--config.evals.pixel_neighbour.split=unseen_style[800:832]"
        " --config.evals.pixel_neighbour.train_split=train[3600:3856]",
        "a minute of comparing pixels",
    ),
    (
        r"\btrain .*[/=](\w*cap|cappa)(\.py)?:tiny",
        "--config.evals.unseen_style.split=unseen_concepts[300:332] --config.evals.unseen_style.classes=emoji:held_out",
        "the likelihood of 129 names, not of 732",
    ),
    (
        r"\btrain .*[/=](clip|filip)(\.py)?:(tiny|smoke)",
        "--config.evals.unseen_style.every=100%",
        "once, not four times",
    ),
    (r"\btrain .*lit\.py:tiny", "--config.batch_size=32", "as many pictures as precompute is given"),
    (r"\badapt .*(lora|coop)", "--seeds=1", "a minute of training for each draw"),
    (r"\bprecompute ", "--split=train[:64]", "minutes of embedding"),
    (
        r"\btrain .*/clip\.py:(B|L)/",
        TWO_STEPS + SHARDS + IMAGE + TEXT + "--config.model.image.out_dim=32",
        "weeks of training; one block a tower",
    ),
    (
        r"\btrain .*siglip\.py:(B|L|So400m)/",
        TWO_STEPS + "--config.optimizer.schedule.cooldown='1 steps' " + SHARDS + IMAGE + TEXT + C4,
        "weeks of training; as above",
    ),
    (
        r"\btrain .*cap(pa)?\.py:(B|L)/",
        TWO_STEPS + SHARDS + IMAGE + C4 + "--config.model.decoder.variant=mu --config.model.decoder.depth=1",
        "weeks of training; as above",
    ),
    (
        r"\btrain .*lit_vit\.py:B/16",
        TWO_STEPS + SHARDS + TEXT + C4 + "--config.model.image.variant=mu/16",
        "weeks of training; the tower of the small hub",
    ),
    (
        r"\btrain .*ul2\.py:base",
        TWO_STEPS + C4 + "--config.model.encoder.variant=small --config.model.decoder.variant=small"
        ' --config.data.ops=\'caption("text") | denoise(32, 32, 32128) | keep("input_ids", "token_ids", "denoiser")\''
        " --config.model.decoder.length=32 --config.batch_size=8",
        "weeks of training; T5's smallest, texts of 32 tokens",
    ),
    (
        r"\btrain .*ul2\.py:(prefix-)?smoke",
        "--config.duration='8 steps' --config.evals.unseen_concepts.split=unseen_concepts[:64]",
        "a minute of evaluating seven denoisers",
    ),
    (r"\btrain .*--config\.mesh\.fsdp=(8|16)\b", "--config.mesh.fsdp=1", "eight and more chips; a CPU is one"),
    (r"\btrain .*finetune", TWO_STEPS, "minutes of training"),
    (r"\bevaluate .*--mesh=data=8\b", "--mesh=data=1", "eight chips; as above"),
    (r"\btrain .*--workdir=/mnt/shared", "--workdir=runs/shared", "a disk of the reader's"),
    (
        r"\bplan .*--search",
        "--topology=v5e:2x2 --config.batch_size=64 --config.model.image.variant=mu/32 --config.model.text.variant=mu",
        "many minutes of compiling",
    ),
    (r"^-m pytest .* tests$", "--collect-only -n0 --ignore-glob=tests/*/*", "the suite has its own run"),
    (
        r"^-m pytest .* tests/(docs|notebooks|parity)$",
        "--version",
        "these tests, the notebooks, and those that need torch",
    ),
    (r"^-m experiments\.", "--variant=smoke --seeds=0", "half an hour of training"),
)


def flags(command: str) -> list[str]:
    """The flags that the table adds to a command; a config's name stands for its path."""
    command = re.sub(r"--config=(\w+)(?=[: ]|$)", r"--config=configs/\1.py", command)
    found = [text for pattern, text, _ in TABLE if re.search(pattern, command)]
    return [flag for text in found for flag in shlex.split(text.format(data=os.environ["DOCS_DATA"]))]


def shards(words: list[str]) -> list[str]:
    """In place of 41,456 shards that a command indexes: the sandbox's two."""
    small = LAION.format(data=os.environ["DOCS_DATA"])
    indexes = words[:3] == ["-m", "vlm_jax", "index"]
    return [small if indexes and word == "wds:data/laion/{00000..41455}.tar" else word for word in words]


def install(words: list[str]) -> None:
    """In place of pip: nothing is installed, the extras that are asked for must be there."""
    with open("pyproject.toml", "rb") as file:
        known = tomllib.load(file)["project"]["optional-dependencies"]
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        if unknown := set(extras.split(",")) - set(known):
            sys.exit(f"error: pyproject.toml has no extra {', '.join(unknown)}; it has: {', '.join(known)}")


def main(words: list[str]) -> None:
    command = " ".join(words)
    if command.startswith("-m vlm_jax plan"):
        os.environ.pop("XLA_FLAGS", None)  # of the tests, for CPUs; libtpu does not know them
    sys.argv = [*shards(words), *flags(command)]
    if words[0] == "-m":
        del sys.argv[0]
    if sys.argv[0] == "pip":
        install(sys.argv)
    elif words[0] == "-m":
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
