"""What scoring a folder costs beside the usual loop over insightface: `python benchmarks/scoring_cost.py`.

The usual loop reads a picture, calls `FaceAnalysis.get` and goes to the next one. Ours reads ahead and looks at several
pictures at once. Both use the same model files, detector size and modules on the same 500 pictures, in alternating
parts of one run; every box and feature must come out equal. Real packs have licences to agree to, so the networks
here have buffalo_s's sizes (0.6 and 0.5 billion multiplications) and random weights: time does not depend on what
they have learned. Prints the ratio of seconds and of CPU seconds, and records the former as a claim.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
from insightface.app import FaceAnalysis
from onnx import helper, numpy_helper
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apl_core.identity import load_embedder
from apl_train import claims, shipped
from apl_train.face_cache import FaceCache, look
from apl_train.pictures import PictureFolder

EDGE, DETECTOR, PART = 512, 640, 50


class Network:
    """An ONNX graph put together layer by layer, with random weights of a fixed seed."""

    def __init__(self) -> None:
        self.rng, self.nodes, self.weights, self.last = np.random.default_rng(0), [], [], "x"

    def constant(self, value: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, *inputs: str, out: str | None = None, **options: object) -> str:
        self.last = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [self.last], **options))
        return self.last

    def conv(self, into: int, out: int, edge: int = 3, stride: int = 1, group: int = 1) -> None:
        shape = (out, into // group, edge, edge)
        weight = self.rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        self.node("Conv", self.last, self.constant(weight), strides=[stride] * 2, pads=[edge // 2] * 4, group=group)
        self.node("Relu", self.last)

    def save(self, path: Path, shape: list[int | str], outputs: list[tuple[str, list[int | str]]]) -> None:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(self.nodes, "g", [value("x", onnx.TensorProto.FLOAT, shape)],
                                  [value(n, onnx.TensorProto.FLOAT, s) for n, s in outputs], self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def detector(path: Path) -> None:
    """0.6 billion multiplications at 640 x 640; then one face in the middle, whatever was seen."""
    net = Network()
    for into, out, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 64, 2), (64, 64, 2)):
        net.conv(into, out, stride=stride)
    net.node("ReduceMean", net.last, keepdims=0, axes=[0, 1, 2, 3])
    nothing = net.node("Mul", net.last, net.constant(np.zeros((), np.float32)))  # no optimiser may drop what is before
    points = np.array([[262, 280], [378, 280], [320, 346], [270, 408], [370, 408]], np.float32)
    outputs = []
    for kind, width in (("s", 1), ("b", 4), ("k", 10)):
        for stride in (8, 16, 32):
            cells = (DETECTOR // stride) ** 2 * 2
            value = np.zeros((cells, width), np.float32)
            if stride == 32:
                cell, centre = (10 * 20 + 10) * 2, 320
                value[cell] = {"s": 0.9, "b": np.full(4, 150 / 32), "k": ((points - centre) / 32).reshape(-1)}[kind]
            net.node("Add", net.constant(value), nothing, out=f"{kind}{stride}")
            outputs.append((f"{kind}{stride}", [cells, width]))
    net.save(path, [1, 3, "h", "w"], outputs)


def recogniser(path: Path) -> None:
    """MobileFaceNet's way of saving: 1 x 1 and depthwise convolutions, 0.5 billion multiplications at 112 x 112."""
    net = Network()
    net.conv(3, 64, stride=2)
    net.conv(64, 64, stride=2)
    for width, blocks in ((64, 14), (128, 14)):
        if width == 128:
            net.conv(64, 128, stride=2)
        for _ in range(blocks):
            net.conv(width, 2 * width, 1)
            net.conv(2 * width, 2 * width, group=2 * width)
            net.conv(2 * width, width, 1)
    net.node("GlobalAveragePool", net.last)
    net.node("Flatten", net.last)
    net.node("MatMul", net.last, net.constant(net.rng.normal(size=(128, 512)).astype(np.float32)), out="y")
    net.save(path, ["n", 3, 112, 112], [("y", ["n", 512])])


def pictures(folder: Path, count: int) -> list[str]:
    """PNG files of a generated picture's usual size, from the shipped references: enlarged, with grain; all differ."""
    folder.mkdir()
    rng, names = np.random.default_rng(0), []
    with zipfile.ZipFile(shipped.ASSETS / "references.zip") as archive:
        stored = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        for i in range(count):
            small = Image.open(io.BytesIO(archive.read(stored[i % len(stored)]))).convert("RGB")
            large = np.asarray(small.resize((EDGE, EDGE), Image.Resampling.BICUBIC)).astype(np.int16)
            grain = rng.integers(-3, 4, large.shape, dtype=np.int16)
            names.append(f"{i:04}.png")
            Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8)).save(folder / names[-1], compress_level=4)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--no-claim", action="store_true", help="only print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pack = root / "models" / "sized"
        pack.mkdir(parents=True)
        detector(pack / "det.onnx")
        recogniser(pack / "rec.onnx")
        names = pictures(root / "pictures", args.images)
        plain = FaceAnalysis(name=str(pack), root=str(root), allowed_modules=["detection", "recognition"],
                             providers=["CPUExecutionProvider"])
        plain.prepare(ctx_id=-1, det_size=(DETECTOR, DETECTOR))
        embedder = load_embedder("sized", root, det_size=DETECTOR)
        store = PictureFolder(root / "pictures")

        def usual(part: list[str]) -> dict:
            return {name: plain.get(cv2.imread(str(root / "pictures" / name))) for name in part}

        def ours(part: list[str]) -> dict:
            return look(store, part, embedder, FaceCache(None, embedder))

        seconds = np.zeros((2, 0, 2))
        usual(names[:4]), ours(names[:4])  # the first calls allocate
        for start in range(0, len(names), PART):
            part, row, found = names[start : start + PART], np.zeros((2, 1, 2)), [{}, {}]
            order = (0, 1) if start // PART % 2 == 0 else (1, 0)
            for which in order:
                wall, cpu = time.perf_counter(), time.process_time()
                found[which] = (usual, ours)[which](part)
                row[which, 0] = time.perf_counter() - wall, time.process_time() - cpu
            seconds = np.concatenate([seconds, row], axis=1)
            for name in part:
                (a,), (b,) = found[0][name], found[1][name].faces
                assert np.allclose(a.bbox, b.box, atol=1e-3) and float(a.normed_embedding @ b.embedding) > 0.99999, name
        wall, cpu = seconds[..., 0], seconds[..., 1]
        ratio = wall[0].sum() / wall[1].sum()
        picks = np.random.default_rng(0).integers(0, wall.shape[1], (4000, wall.shape[1]))
        draws = wall[0][picks].sum(axis=1) / wall[1][picks].sum(axis=1)
        ends = [float(v) for v in np.percentile(draws, (2.5, 97.5))]
        print(f"{len(names)} pictures of {EDGE} x {EDGE}, detector {DETECTOR}, {os.cpu_count()} cores\n"
              f"usual loop  {1000 * wall[0].sum() / len(names):7.1f} ms a picture, CPU "
              f"{1000 * cpu[0].sum() / len(names):7.1f} ms\n"
              f"ours        {1000 * wall[1].sum() / len(names):7.1f} ms a picture, CPU "
              f"{1000 * cpu[1].sum() / len(names):7.1f} ms\n"
              f"ratio {ratio:.2f} [{ends[0]:.2f}, {ends[1]:.2f}], of CPU seconds {cpu[0].sum() / cpu[1].sum():.2f}")
        if not args.no_claim:
            claims.record({"scoring-speed": (float(ratio), ends, len(names))})


if __name__ == "__main__":
    main()
