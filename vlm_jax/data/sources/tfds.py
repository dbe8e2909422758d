"""`tfds:`: prepared TFDS data sets, read without TensorFlow."""

import contextlib
import copy
import os
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from vlm_jax.data import confined, emoji
from vlm_jax.data.source import Source
from vlm_jax.errors import UserError, near


class Tfds(Source):
    """A prepared TFDS data set in ArrayRecord files (or another random-access format), images left encoded."""

    def __init__(self, name: str, split: str | None):
        import tensorflow_datasets as tfds  # imports no TensorFlow; 0.7 s, hence here

        try:
            with _known_features():
                if name == "emoji":
                    builder = tfds.builder_from_directory(str(emoji.PREPARED))
                elif name.startswith(("/", ".", "~")):
                    builder = tfds.builder_from_directory(os.path.expanduser(name))
                elif tfds.core.naming.parse_builder_name_kwargs(name)[0].namespace:
                    raise UserError("it would download and run code; give a prepared folder")
                else:
                    builder = tfds.builder(name)
        except ImportError as error:
            raise UserError(
                f"data source `tfds:{name}`: its builder needs {error.name or 'TensorFlow'}, which is not installed; "
                "give the prepared folder instead, `tfds:/.../name/version`"
            ) from None
        except UserError as error:
            raise UserError(f"data source `tfds:{name}` cannot be opened: {error}") from None
        except Exception as error:  # of broken or made-up files, dozens of types
            reason = _first_line(error).rstrip(".")
            if not name.startswith(("/", ".", "~")):
                reason += _nearest(name, ["emoji", *tfds.list_builders(with_community_datasets=False)])
            raise UserError(f"data source `tfds:{name}` cannot be opened: {reason}") from None
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
            self.paths = [str(path) for path in builder.info.splits[split].filepaths]
            for path in self.paths:
                confined.regular(f"tfds:{name}", path)
            raw = tfds.decode.DeserializeMethod.RAW_BYTES
            self.source = builder.as_data_source(split, deserialize_method=raw)
            len(self.source)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"data source `{self.name}` cannot be read: {_first_line(error)}") from None

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

    def fingerprint(self) -> str:
        return confined.fingerprint(self.paths)


_opening = threading.RLock()


@contextlib.contextmanager
def _known_features() -> Iterator[None]:
    """Allows only TFDS's own feature classes: for any other name in features.json, TFDS imports its module."""
    from tensorflow_datasets.core.features.feature import FeatureConnector

    find = FeatureConnector.__dict__["cls_from_name"]

    def known(cls: type, name: str) -> type:
        found = cls._registered_features.get(name)
        if found is None or not found.__module__.startswith("tensorflow_datasets."):
            raise UserError(f"its features.json names `{name:.80}`; expected a feature class of TFDS")
        return found

    with _opening:
        FeatureConnector.cls_from_name = classmethod(known)
        try:
            yield
        finally:
            FeatureConnector.cls_from_name = find


def _nearest(name: str, known: Sequence[str]) -> str:
    """Returns "; did you mean `tfds:...`?" with the known name nearest to one that may have a config or a version."""
    hint = near(re.split("[/:]", name.strip().lower())[0], known)
    return hint and f"; {hint.replace('`', '`tfds:', 1)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
