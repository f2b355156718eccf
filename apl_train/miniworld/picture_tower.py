"""The miniature CLIP's picture tower and text projection as ONNX files, for the CLIP score of the miniature world.

They come out of the contrastive training of the text tower (`text_tower.py`); the text encoder itself is the shipped
checkpoint's. Its UNet's training went on teaching that encoder, so names and things are found again a little less
surely than right after the contrastive training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from apl_core.atomic import write_bytes, write_json
from apl_train.miniworld.onnx_export import exported
from apl_train.miniworld.render import SIZE
from apl_train.miniworld.text_tower import Head, Look


class _Projection(nn.Module):
    """The head's projection for states with two more axes, as picture models take them: [N, w, 1, 1] -> [N, w]."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.project = head.project

    def forward(self, states: Tensor) -> Tensor:
        return self.project(states.flatten(1))


def write_clip(folder: Path, look: Look, head: Head) -> None:
    """clip.json, clip.onnx and clip_text.onnx; the tower's weights take a byte each."""
    width = head.project.weight.shape[1]
    write_bytes(folder / "clip.onnx", _packed(exported(look, (3, SIZE, SIZE), ["embedding"])))
    write_bytes(folder / "clip_text.onnx", _packed(exported(_Projection(head), (width, 1, 1), ["embedding"])))
    write_json(folder / "clip.json", {"pictures": "clip.onnx", "texts": "clip_text.onnx", "frame": SIZE})


def _packed(model) -> bytes:
    """Large weights as int8 with one scale for each slice of their first axis, widened again at load: a quarter of the
    size, and embeddings whose cosines move in the fifth decimal."""
    from onnx import helper, numpy_helper

    widen = []
    for tensor in list(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size <= 1024:
            continue
        flat = values.reshape(len(values), -1)
        scale = np.maximum(np.abs(flat).max(1), 1e-12).astype(np.float32) / 127
        small = np.rint(flat / scale[:, None]).astype(np.int8).reshape(values.shape)
        name = tensor.name
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend([
            numpy_helper.from_array(small, f"{name}.int8"), numpy_helper.from_array(scale, f"{name}.scale"),
            numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}.zero")])
        widen.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale", f"{name}.zero"], [name],
                                      f"widen.{name}", axis=0))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(widen + nodes)
    return model.SerializeToString()
