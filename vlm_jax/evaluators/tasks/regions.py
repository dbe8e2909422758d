"""Regions by their texts: does the patch that fits a text best lie in its region, and does the map cover it?"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.catalogue import method
from vlm_jax.errors import UserError
from vlm_jax.evaluators import metrics
from vlm_jax.evaluators.one_pass import Batch, Columns, Pass, field_ops
from vlm_jax.evaluators.progress import Progress, Table, memory_limit
from vlm_jax.evaluators.result import Result
from vlm_jax.pretrained import attention_maps


@method(
    family="evaluators",
    paper="arXiv:2112.01071",
    where="section 3",
    differs="pointing and segmentation by the similarity of patches and a region's text",
)
def regions(
    *,
    uri: str,
    split: str | None = None,
    text: str = "regions/text",
    box: str = "regions/box",
    object: str = "regions/object",
    mask: str = "objects/mask",
    where: Mapping[str, Sequence] | None = None,
    ops: str | None = None,
    batch_size: int = 256,
    memory_share: float = 0.25,
) -> Callable[..., Result]:
    """Returns an evaluator `(pretrained, progress=None) -> Result` of two towers whose image tower has patches.

    A map is the cosine of a region's text with each patch, see `attention_maps.patch_embeddings`. Boxes and masks pass
    through the model's preprocessing. Metrics: `pointing`, the share of regions whose highest patch has its centre in
    the box (pointing game, arXiv:1608.00507; of equal highest patches, the share); `chance`, the mean share of patches
    whose centre is in the box; `mean_iou`, the mean over regions of intersection / union of the region's mask and of
    the patches above the map's mean over this picture, in pixels of the model's input; `regions`; `examples`;
    `left_out` (pictures without regions); `left_out_regions` (the preprocessing cuts them off). The regions of one
    picture are drawn together for the intervals.

    Args:
      uri: the data set, as for `sources.open_source`.
      split: its split.
      text: the record's field with the texts of n regions.
      box: the field with their boxes (x0, y0, x1, y1), pixels [n, 4].
      object: the field with the index of each region's mask, [n].
      mask: the field with masks, as COCO's uncompressed run lengths.
      where: field -> values; other records are left out.
      ops: op string from record to `image`; defaults to the model's preprocessing.
      batch_size: pictures at a time; the metrics do not depend on the batch size.
      memory_share: share of the free memory for the regions; more regions go to a file.
    """
    limit = memory_limit(memory_share)

    def evaluate(pretrained: Any, progress: Progress | None = None) -> Result:
        prepare = ops or pretrained.preprocess
        drawn = attention_maps.ops_of_places(prepare, "regions")
        patch = getattr(getattr(pretrained.model, "image", None), "patch", None)
        if patch is None:
            raise UserError("regions needs patches; the image tower of this model has none")
        paths = ", ".join(map(json.dumps, (box, object, mask)))
        string = f'decode | {field_ops(text)} | seen_regions({drawn}, {paths}, to="seen") | {prepare}'
        data = Pass(
            pretrained, progress, uri=uri, split=split, where=where, batch_size=batch_size, memory=limit,
            ops=f'{string} | keep("image", "fields", "seen")',
        )  # fmt: skip
        pretrained = data.pretrained
        data.begin("regions")

        def about(fields: list, seen: list) -> list[list] | None:
            if not seen or len(fields[0]) != len(seen):
                return None
            return [[said, *_on_patches(of_region, patch)] for said, of_region in zip(fields[0], seen, strict=True)]

        def rows(batch: Batch) -> Mapping[str, Columns]:
            patches = attention_maps.patch_embedding_batch(pretrained, batch.inputs)[batch.kept]
            said = [text for own in batch.about for text, *_ in own]
            filled = said + said[:1] * (-len(said) % data.batch_size)  # so that few shapes are compiled
            words = attention_maps.text_vectors(pretrained.embed_texts(filled))[: len(said)]
            places = np.repeat(np.arange(len(batch.about)), list(map(len, batch.about)))
            maps = [patches[i].astype(np.float64) @ word for i, word in zip(places, words, strict=True)]
            found = [_compared(*pair) for pair in zip(maps, (r for own in batch.about for r in own), strict=True)]
            names = ("pointing", "chance", "iou", "seen")
            columns = dict(zip(names, np.array(found).T, strict=True))
            return {"regions": columns | {"position": batch.position[places]}}

        if not data.run(rows, about, columns=("fields", "seen")):
            raise UserError(f"{data.about}: no picture has regions under {text}")
        return data.result(lambda tables: _result(tables["regions"], data.counts["examples"]), "left_out")

    return evaluate


def _on_patches(seen: np.ndarray, patch: int) -> tuple[list, list]:
    """Of a box and a mask, bool [2, H, W]: whether each patch has its centre in the box, and the share of the patch in
    the mask, [h, w] each."""
    h, w = (side // patch for side in seen.shape[1:])
    tiles = seen[:, : h * patch, : w * patch].reshape(2, h, patch, w, patch)
    return tiles[0, :, patch // 2, :, patch // 2].tolist(), tiles[1].mean((1, 3)).tolist()


def _compared(scores: np.ndarray, region: Sequence) -> tuple[float, float, float, bool]:
    """Of a map [h, w]: the share of its highest patches in the box, that of all patches, the IoU with the mask; and
    whether the region is seen at all."""
    inside, covered = np.array(region[1]), np.array(region[2])
    above = scores > scores.mean()
    shared = covered[above].sum()
    union = above.sum() + covered.sum() - shared
    return inside[scores == scores.max()].mean(), inside.mean(), shared / max(union, 1e-9), covered.any()


def _result(table: Table, examples: int) -> Result:
    seen = table.read("seen").astype(bool)
    pointing, chance, iou, position = (table.read(name)[seen] for name in ("pointing", "chance", "iou", "position"))
    numbers = {"regions": float(len(iou)), "examples": float(examples), "left_out_regions": float(np.sum(~seen))}
    if not seen.any():
        return Result(numbers, {}, notes=["the preprocessing cuts all regions off"])
    numbers |= {"pointing": float(pointing.mean()), "chance": float(chance.mean()), "mean_iou": float(iou.mean())}
    intervals = metrics.intervals({"pointing": pointing, "mean_iou": iou}, units=position)
    artifacts = {"regions": {"position": position, "pointing": pointing, "iou": iou}}
    return Result(numbers, artifacts, intervals)
