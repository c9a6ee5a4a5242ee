"""Lets timm and its torchvision be imported beside a CPU build of torch: import this module before them.

PyPI's torchvision wheel is linked against torch for CUDA, so its operators do not load beside torch for CPU; the import
passes all the same once the schemas of the two that it registers Python functions for exist.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "timm"  # where the Makefile puts them, apart from what else is installed
if FOLDER.is_dir():
    sys.path.append(str(FOLDER))

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
