"""Embeds the pictures of a data set once, for runs with a locked image tower.

    vlm-jax precompute --config=lit:tiny --data=tfds:emoji --split=train --out=runs/lit_images

The tower (LiT, arXiv:2111.07991, section 3.3) is the config's `model.image`. `model_init` names its parameters, and the
config's `preprocess` prepares the pictures. The run then reads `--config.data.uri=precomputed:runs/lit_images`. After
an interruption the same command continues: after the last batch if it was Ctrl-C or an error, after the last shard of
4,096 records if it was a kill. Several hosts share the shards.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vlm_jax import command, config, models
from vlm_jax.command.values import data_uri
from vlm_jax.data import loader
from vlm_jax.data.examples import log_bad
from vlm_jax.data.files import write_json
from vlm_jax.data.sources.precomputed import INDEX, read_shard, shard_names, write_shard
from vlm_jax.errors import UserError
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.run import processes
from vlm_jax.zoo import model_init


def precompute(
    settings: Mapping[str, Any],
    out: str | Path,
    *,
    uri: str,
    split: str | None = None,
    batch_size: int = 64,
    shard_size: int = 4096,
) -> dict[str, Any]:
    """Writes the pooled image embeddings of a data set and returns their index.

    Args:
      settings: a config of `vlm_jax.train` with `model_init`; its image tower embeds the pictures.
      out: the folder.
      uri, split: the data set, as for `sources.open_source`.
      batch_size: pictures at a time.
      shard_size: records in a file, a multiple of batch_size.

    Raises:
      UserError: the folder holds embeddings of other settings, or `model_init` does not name the image tower.
    """
    settings, out = config.plain(settings), Path(out)
    if shard_size % batch_size:
        raise UserError(f"shard_size={shard_size} should be a multiple of batch_size={batch_size}")
    given = settings.get("model_init")
    if not isinstance(given, Mapping) or "image" not in given:
        raise UserError("the config lacks model_init.image; expected the checkpoint of the image tower")
    batches = loader.eval_batches(
        uri=uri, split=split, ops=f"{settings['preprocess']} | keep('image')", batch_size=batch_size
    )
    processes.check_equal({uri: batches.examples.fingerprint()}, "data")
    index = dict(uri=uri, split=split, records=batches.num_examples, shard_size=shard_size)
    index |= dict(model=settings["model"]["image"], init=given["image"], preprocess=settings["preprocess"])
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX).is_file() and json.loads((out / INDEX).read_text()) != index:
        raise UserError(f"{out} holds embeddings of other settings, see its {INDEX}; give another folder")
    if processes.is_first():
        write_json(out / INDEX, index)
    names = shard_names(batches.num_examples, shard_size)
    mine = [k for k in range(len(names)) if k % jax.process_count() == jax.process_index()]
    todo = [k for k in mine if not (out / names[k]).is_file()]
    if not todo:
        return index
    with command.doing(f"loading {given['image']}"):
        embed = _embedder(settings, given["image"], batches[0][0]["image"])
    per_shard = shard_size // batch_size
    parts = {k: range(k * per_shard, min((k + 1) * per_shard, len(batches))) for k in mine}
    total, left = (sum(len(parts[k]) for k in some) for some in (mine, todo))
    with command.doing("embedding"), command.bar(total=total, initial=total - left, desc="embed", unit="batch") as bar:
        for k in todo:
            partial = out / f"{names[k]}.partial"  # of an interrupted run
            rows = read_shard(partial)
            done = len(rows) // batch_size
            rows = rows[: done * batch_size]
            bar.update(done)
            try:
                for number in parts[k][done:]:
                    batch, bad = batches[number]
                    log_bad(bad)
                    embeddings = np.asarray(embed(batch["image"]))
                    rows += [row if real else None for row, real in zip(embeddings, batch["mask"], strict=True)]
                    bar.update()
                write_shard(out / names[k], rows[: batches.num_examples - k * shard_size])
            except BaseException:
                if len(rows) > done * batch_size:
                    write_shard(partial, rows)
                raise
            partial.unlink(missing_ok=True)
    return index


def _embedder(settings: Mapping[str, Any], spec: str, images: np.ndarray):
    """Returns a function: pictures [B, H, W, 3] -> fp32 [B, D], on this host's devices."""
    model = models.build(
        dict(image=settings["model"]["image"], text=None, dtype=settings["model"].get("dtype", "float32"))
    )
    if getattr(model.image, "pool", None) == "all":
        raise UserError('config.model.image.pool is "all"; expected a pool that gives one vector for each picture')
    mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(len(images), mesh, "--batch_size")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1], None)["params"]
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))
    shapes = jax.tree.map(place, shapes)
    found = model_init.read({"image": spec}, named_leaves(shapes))
    new = named_leaves(shapes).keys() - found.keys()
    if new:
        raise UserError(f"config.model_init.image: {spec} has no {min(new)}; a locked image tower needs it")
    params = jax.tree.unflatten(jax.tree.structure(shapes), [found[name] for name in named_leaves(shapes)])

    @jax.jit
    def embed(params, images):
        return model.image.apply({"params": params["image"]}, images).pooled.astype(jnp.float32)

    def run(images):
        with jax.set_mesh(mesh):
            return embed(params, sharding.to_global({"image": images}, mesh, len(images))["image"])

    return run


@processes.joins()
def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer | None:
    section = dict(uri=data_uri(values), split=values.split, batch_size=values.batch_size)
    index = precompute(values.config.to_dict(), values.out, **section)
    if processes.is_first():
        text = f"{index['records']:,} records; read them by --config.data.uri=precomputed:{values.out}"
        return command.Answer({"out": str(Path(values.out).absolute()), **index}, text)


if __name__ == "__main__":
    command.run("precompute", main)
