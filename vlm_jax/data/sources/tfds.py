"""`tfds:`: prepared TFDS data sets, read without TensorFlow."""

import copy
import os
from typing import Any, Self

import numpy as np

from vlm_jax.data import emoji
from vlm_jax.data.source import Source
from vlm_jax.errors import UserError


class Tfds(Source):
    """A prepared TFDS data set in ArrayRecord files (or another random-access format), images left encoded."""

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # imports no TensorFlow; 0.7 s, hence here

        try:
            if name == "emoji":
                builder = tfds.builder_from_directory(str(emoji.PREPARED))
            elif name.startswith(("/", ".", "~")):
                builder = tfds.builder_from_directory(os.path.expanduser(name))
            else:
                builder = tfds.builder(name)
        except ImportError as error:
            raise UserError(
                f"data source `tfds:{name}`: its builder needs {error.name or 'TensorFlow'}, which is not installed; "
                "give the prepared folder instead, `tfds:/.../name/version`"
            ) from None
        except (OSError, tfds.core.registered.DatasetNotFoundError, AssertionError) as error:
            raise UserError(f"data source `tfds:{name}` cannot be opened: {str(error).splitlines()[0]}") from None
        self.name = f"tfds:{name}/{split}"
        if not builder.info.splits:
            raise UserError(f"data source `tfds:{name}` is not prepared in {builder.data_dir}; run `tfds build {name}`")
        base = (split or "").split("[")[0]
        if base not in builder.info.splits and base != "all":
            raise UserError(
                f"data source `tfds:{name}` has no split `{split}`; it has {', '.join(builder.info.splits)}"
            )
        self.features, self.decoders = builder.info.features, {"image": tfds.decode.SkipDecoding()}
        try:
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.source = builder.as_data_source(split, deserialize_method=raw)
        except (OSError, NotImplementedError, ValueError) as error:
            raise UserError(f"data source `{self.name}` cannot be read: {str(error).splitlines()[0]}") from None

    def __len__(self) -> int:
        return len(self.source)

    def label_names(self, path: str) -> dict[int, str] | None:
        feature = self.features
        for name in path.split("/"):
            feature = feature[name] if isinstance(feature, type(self.features)) and name in feature else None
        named = getattr(feature, "num_classes", None)  # of a ClassLabel, or of a sequence of them
        return dict(enumerate(feature.names)) if named else None

    def narrow(self, paths: frozenset[str]) -> Self:
        narrowed = copy.copy(self)
        narrowed.features = _subset(self.features, paths)
        return narrowed

    def __getitem__(self, i: int) -> dict[str, Any]:
        decoders = self.decoders if "image" in self.features else None
        return _plain(self.features.deserialize_example_np(self.source[i], decoders=decoders))

    def key(self, i: int) -> str:
        return f"{self.name}[{i}]"


def _subset(features: Any, paths: frozenset[str]) -> Any:
    """The TFDS features at some paths of a (nested) FeaturesDict."""
    chosen = {}
    for name, feature in features.items():
        inner = frozenset(p.removeprefix(f"{name}/") for p in paths if p.startswith(f"{name}/"))
        if name in paths:
            chosen[name] = feature
        elif inner and isinstance(feature, type(features)):
            chosen[name] = _subset(feature, inner)
    return type(features)(chosen)


def _plain(value: Any) -> Any:
    """bytes that are text -> str, arrays of texts -> lists, numpy scalars -> Python numbers; images stay bytes."""
    if isinstance(value, dict):
        return {k: v if k == "image" else _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
