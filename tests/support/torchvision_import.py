"""Imports torchvision beside any build of torch: its compiled part fits one build only, and towers do not use it."""

import importlib.util
import sys


def prepare():
    """Makes `import torchvision`, and that of timm and open_clip, work if torchvision is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # "operator torchvision::nms does not exist"
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)  # the definitions live as long as this object


KEPT = []
