"""Torchvision, and open_clip and timm with it, is of the machine: its wheels fit one build of torch each."""

import importlib

import pytest

REASON = "needs a torchvision built for this torch: pip install open_clip_torch timm torchvision"


@pytest.fixture(scope="session")
def torchvision():
    return pytest.importorskip("torchvision", reason=REASON, exc_type=Exception)


@pytest.fixture(scope="session")
def open_clip(torchvision):
    pytest.importorskip("open_clip", reason=REASON, exc_type=Exception)
    importlib.import_module("open_clip.transform")
    return importlib.import_module("open_clip")
