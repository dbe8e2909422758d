"""Embeds a data set once, by a locked image tower or by teachers.

    vlm-jax precompute --config=lit:tiny --data=tfds:emoji --split=train --out=runs/lit_images
    vlm-jax precompute --config=reinforced:tiny --views=8 --out=runs/reinforced

The locked tower (LiT, arXiv:2111.07991, section 3.3) is the config's `model.image`. `model_init` names its parameters,
and the config's `preprocess` prepares the pictures. The run then reads `--config.data.uri=precomputed:runs/lit_images`.

With --views, teachers of the config's objective embed so many views of each example of its data, made by its ops
(MobileCLIP, arXiv:2311.17049). The run then reads `--config.data.reinforced=runs/reinforced`.

After an interruption the same command continues: after the last batch if it was Ctrl-C or an error, after the last
shard of 4,096 records if it was a kill. Several hosts share the shards.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from vlm_jax import command, config, models, objectives
from vlm_jax.command.values import data_uri
from vlm_jax.data import loader, tokenizers
from vlm_jax.data.examples import Examples, generator, log_bad, open_examples
from vlm_jax.data.files import write_json
from vlm_jax.data.rows import Batch
from vlm_jax.data.sources import open_source
from vlm_jax.data.sources.precomputed import INDEX, read_shard, shard_names, write_shard
from vlm_jax.errors import UserError
from vlm_jax.objectives.outputs import Taught
from vlm_jax.params import sharding
from vlm_jax.params.table import named_leaves
from vlm_jax.run import processes
from vlm_jax.zoo import model_init
from vlm_jax.zoo.load import load


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
    settings = config.plain(settings)
    given = settings.get("model_init")
    if not isinstance(given, Mapping) or "image" not in given:
        raise UserError("the config lacks model_init.image; expected the checkpoint of the image tower")
    batches = loader.eval_batches(
        uri=uri, split=split, ops=f"{settings['preprocess']} | keep('image')", batch_size=batch_size
    )
    index = dict(uri=uri, split=split, records=batches.num_examples, shard_size=shard_size)
    index |= dict(model=settings["model"]["image"], init=given["image"], preprocess=settings["preprocess"])
    embedder = lambda: _embedder(settings, given["image"], batches[0][0]["image"])
    return _write(Path(out), index, batches, embedder, np.float32)


def reinforce(
    settings: Mapping[str, Any], out: str | Path, *, views: int, batch_size: int = 64, shard_size: int = 4096
) -> dict[str, Any]:
    """Writes what the teachers of a config say of `views` views of each example of its data; returns their index.

    See `data.reinforced`. Both embeddings of each teacher with a `spec` are written.

    Args:
      settings: a config of `vlm_jax.train` with one source of data.
      out: the folder.
      views: of each record of the source.
      batch_size, shard_size: as for `precompute`; a record here is a view.

    Raises:
      UserError: the folder holds embeddings of other settings, the config has no teachers, or several sources.
    """
    settings = config.plain(settings)
    config.check_least(1, "", views=views)
    data, section = settings["data"], settings["objective"].get("teachers", {})
    if "uri" not in data:
        raise UserError("config.data has several `sources`; precompute the views of each from a config of its own")
    section = {name: {**own, "stored": False} for name, own in section.items() if own.get("spec")}
    if not section:
        raise UserError("config.objective.teachers has no checkpoint; expected dict(NAME=dict(spec=...))")
    tokenizer = tokenizers.build(settings["tokenizer"])
    options = {key: data.get(key) for key in ("uri", "ops", "split")}
    seed = int(np.random.SeedSequence((settings.get("seed", 0), views)).generate_state(1)[0])
    one = open_examples(**options, where=None, tokenizer=tokenizer, seed=seed)
    batches = loader.EvalBatches(_Views(one, views), batch_size, range(batch_size), 1, 0.001)
    with command.doing("loading the teachers"):
        fields, embed = _by_teachers(objectives.teachers_of(section, load), batches[0][0])
    index = dict(options, records=batches.num_examples, shard_size=shard_size, views=views, seed=seed, fields=fields)
    index["teachers"] = {name: own["spec"] for name, own in section.items()}
    index["inputs"] = {name: own.get("inputs") for name, own in section.items()}
    index |= dict(
        tokenizer=settings["tokenizer"], fingerprint=open_source(data["uri"], data.get("split")).fingerprint()
    )
    return _write(Path(out), index, batches, lambda: embed, np.float16)


class _Views(Examples):
    """Example j is view j % views of example j // views."""

    def __init__(self, one: Examples, views: int):
        super().__init__(one.source, one.pipeline, None, one.seed, uri=one.uri)
        self.views = views

    def __len__(self) -> int:
        return super().__len__() * self.views

    def key(self, i: int) -> str:
        return super().key(i // self.views)

    def soon(self, numbers: Iterable[int], next_: bool = False) -> None:
        super().soon(sorted({i // self.views for i in numbers}), next_)

    def _finished(self, i: int, draw: int) -> dict[str, Any]:
        return self.pipeline.finish(self._prepared(i // self.views), generator(self.seed, i))


def _write(
    out: Path,
    index: dict[str, Any],
    batches: loader.EvalBatches,
    embedder: Callable[[], Callable[[Batch], Any]],
    dtype: Any,
) -> dict[str, Any]:
    """Writes in shards the rows that `embedder()` returns of all batches; goes on where an earlier call ended."""
    records, shard_size, batch_size = index["records"], index["shard_size"], batches.batch_size
    if shard_size % batch_size:
        raise UserError(f"shard_size={shard_size} should be a multiple of batch_size={batch_size}")
    processes.check_equal({index["uri"]: batches.examples.fingerprint()}, "data")
    out.mkdir(parents=True, exist_ok=True)
    if (out / INDEX).is_file() and json.loads((out / INDEX).read_text()) != index:
        raise UserError(f"{out} holds embeddings of other settings, see its {INDEX}; give another folder")
    if processes.is_first():
        write_json(out / INDEX, index)
    names = shard_names(records, shard_size)
    mine = [k for k in range(len(names)) if k % jax.process_count() == jax.process_index()]
    todo = [k for k in mine if not (out / names[k]).is_file()]
    if not todo:
        return index
    with command.doing("loading what embeds"):
        embed = embedder()
    per_shard = shard_size // batch_size
    parts = {k: range(k * per_shard, min((k + 1) * per_shard, len(batches))) for k in mine}
    total, left = (sum(len(parts[k]) for k in some) for some in (mine, todo))
    with command.doing("embedding"), command.bar(total=total, initial=total - left, desc="embed", unit="batch") as bar:
        for k in todo:
            partial = out / f"{names[k]}.partial"  # of an interrupted run
            rows = read_shard(partial, dtype)
            done = len(rows) // batch_size
            rows = rows[: done * batch_size]
            bar.update(done)
            try:
                for number in parts[k][done:]:
                    batch, bad = batches[number]
                    log_bad(bad)
                    embeddings = np.asarray(embed(batch), dtype)
                    rows += [row if real else None for row, real in zip(embeddings, batch["mask"], strict=True)]
                    bar.update()
                write_shard(out / names[k], rows[: records - k * shard_size])
            except BaseException:
                if len(rows) > done * batch_size:
                    write_shard(partial, rows)
                raise
            partial.unlink(missing_ok=True)
    return index


def _by_teachers(teachers: Mapping[str, objectives.Teacher], example: Batch):
    """Returns ({"<teacher>/<output>": width}, a function: batch -> [B, sum of widths], on this host's devices)."""
    mesh = sharding.make_mesh(devices=jax.local_devices())
    params = {name: teacher.params for name, teacher in teachers.items()}

    def said(params, rows):
        found = {}
        for name, teacher in teachers.items():
            taught = objectives.Outputs(
                None, {}, rows, teachers={name: Taught(teacher.model, params[name], teacher.inputs)}
            )
            for output in ("image_embedding", "text_embedding"):
                if output in getattr(teacher.model, "outputs", {}):
                    found[f"{name}/{output}"] = taught.teacher(name)[output]
        return found

    arrays = lambda batch: {key: rows for key, rows in batch.items() if key not in ("mask", "bad")}
    fields = {name: row.shape[-1] for name, row in jax.eval_shape(said, params, arrays(example)).items()}

    @jax.jit
    def embed(params, rows):
        found = said(params, rows)
        return jnp.concatenate([found[name] for name in fields], axis=-1)

    def run(batch):
        with jax.set_mesh(mesh):
            return embed(params, sharding.to_global(arrays(batch), mesh, len(batch["mask"])))

    return fields, run


def _embedder(settings: Mapping[str, Any], spec: str, images: np.ndarray):
    """Returns a function: batch with pictures [B, H, W, 3] -> fp32 [B, D], on this host's devices."""
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

    def run(batch):
        with jax.set_mesh(mesh):
            return embed(params, sharding.to_global({"image": batch["image"]}, mesh, len(batch["image"]))["image"])

    return run


@processes.joins()
def main(_: Sequence[str], values: flags.FlagValues) -> command.Answer | None:
    settings, size = values.config.to_dict(), values.batch_size
    if values.views is not None and values.data is not None:
        raise UserError("--views are of the config's own data; leave out --data")
    if values.views is None and values.data is None:
        raise UserError("give --data=URI for a locked image tower, or --views=N for teachers")
    if values.views is None:
        uri, option = data_uri(values), f"uri=precomputed:{values.out}"
        index = precompute(settings, values.out, uri=uri, split=values.split, batch_size=size)
    else:
        option = f"reinforced={values.out}"
        index = reinforce(settings, values.out, views=values.views, batch_size=size)
    if processes.is_first():
        text = f"{index['records']:,} records; read them by --config.data.{option}"
        return command.Answer({"out": str(Path(values.out).absolute()), **index}, text)


if __name__ == "__main__":
    command.run("precompute", main)
