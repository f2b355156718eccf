"""A small network as an ONNX model, with any number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

OPSET = 18
IR_VERSION = 9
"""Of the file's form; the exporter writes a newer one, which onnxruntime 1.17 cannot read, and uses nothing of it."""


def exported(module: nn.Module, shape: Sequence[int], outputs: Sequence[str]) -> Any:
    """onnx.ModelProto of a network in eval mode: float32 [n, *shape] "input" to `outputs`, n free.

    Needs onnx and onnxscript. Raises what torch's exporter raises for an operation that it does not know.
    """
    example = torch.zeros(2, *shape)
    found = torch.onnx.export(
        module.to(memory_format=torch.contiguous_format).eval(), (example,), input_names=["input"],
        output_names=list(outputs), dynamic_shapes=({0: torch.export.Dim("n")},), opset_version=OPSET, dynamo=True,
        verbose=False,
    ).model_proto
    found.ir_version = IR_VERSION
    return found
