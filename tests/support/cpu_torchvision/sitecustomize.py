"""On PYTHONPATH, lets every Python process import torchvision beside a CPU build of PyTorch: the wheels on PyPI contain
operators that load only with CUDA. None of them is needed, but torchvision must find their declarations."""

import torch

if torch.version.cuda is None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
