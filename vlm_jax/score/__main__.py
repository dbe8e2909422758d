"""Scores the examples of a data set for `vlm-jax select`: fit of text and picture, embeddings.

    vlm-jax score --model=hf:openai/clip-vit-base-patch32 --data='wds:data/laion/{00000..00009}.tar' --caption=txt \\
        --out=runs/scores
    vlm-jax score --model=pkg:vlm_jax/zoo/clip_tiny --data=tfds:emoji --split=train --caption=name/en \\
        --fields=concept --embeddings --out=runs/scores

After an interruption the same command continues. On several hosts, run the same command on each with
--distributed=auto.
"""

from collections.abc import Sequence

from absl import flags

from vlm_jax import command, config
from vlm_jax.command.commands import LOADING
from vlm_jax.command.values import data_uri, given
from vlm_jax.evaluate import evaluate
from vlm_jax.params import sharding
from vlm_jax.run import processes
from vlm_jax.zoo.load import load

SECTION = ("split", "where", "batch_size", "memory_share", "caption", "fields", "embeddings")


@processes.joins()
def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer | None:
    mesh = config.call(sharding.make_mesh, given(values, ("mesh",)).get("mesh", {}), "--mesh", devices=None)
    with command.doing(f"loading {values.model}", processes.is_first()):
        pretrained = load(values.model, mesh=mesh, **given(values, [flag.name for flag in LOADING]))
    section = dict(uri=data_uri(values)) | given(values, SECTION)
    with command.doing("scoring", processes.is_first()):
        found = evaluate(pretrained, "pair_scores", values.out, model=values.model, show=True, **section)
    if processes.is_first():
        text = f"{found['pair_scores/examples']:,.0f} examples; choose some: vlm-jax select {values.out} --by=..."
        return command.Answer(found, text)


if __name__ == "__main__":
    command.run("score", main)
