"""Lets torchvision be imported beside torch's CPU build where only its CUDA build is to be had.

Python imports this file as it starts, in every process that has this folder on its path, those that vLLM starts too.

Symptom: ``RuntimeError: operator torchvision::nms does not exist`` at any import of a vision-language model.
Cause: the wheel on PyPI is built for CUDA. Its operators do not load beside torch+cpu, which torchvision allows; but
torchvision/_meta_registrations.py (0.28, l.163 and 177) describes two of them without asking whether they are there.
Processors of images use neither.
Delete when: PyPI has a CPU build, or torchvision asks.
"""

from types import ModuleType

import wrapt

OPERATORS = ("nms", "qnms")
_declared: list[object] = []


def declare_missing_operators(extension: ModuleType) -> None:
    """Say of the operators that are described what they take; there is nothing behind them."""
    import torch

    if extension._has_ops():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # what is declared goes with it


wrapt.register_post_import_hook(declare_missing_operators, "torchvision.extension")
