"""Op strings: `"decode | random_resized_crop(64) | flip | normalize"` becomes a function from a record to an example.

Ops are joined by `|`; their arguments are Python literals; nothing is evaluated. `parse` knows the ops of this package
(image.py, geometry.py, augment.py, corruptions.py, text.py, wording.py, tags.py, regions.py, fields.py, marked.py), and
any other function under `@op`. `cache` is a mark, no function: ops before `cache` run once per record, ops after it
every time.
"""

from vlm_jax.data.ops import (  # noqa: F401 (registers the ops)
    augment,
    corruptions,
    fields,
    geometry,
    image,
    marked,
    regions,
    tags,
    text,
    wording,
)
from vlm_jax.data.ops.pipeline import Pipeline, Step, parse
from vlm_jax.data.ops.registry import INJECTED, OPS, SUBJECTS, op

__all__ = ["INJECTED", "OPS", "SUBJECTS", "Pipeline", "Step", "op", "parse"]
