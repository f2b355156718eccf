"""What scoring a folder costs beside the usual loop over insightface: `python benchmarks/scoring_cost.py`.

The usual loop reads a picture, calls `FaceAnalysis.get` and goes to the next one. Ours reads ahead and looks at several
pictures at once. Both use the same model files, detector size and modules on the same 500 pictures, in alternating
parts of one run; every box and feature must come out equal. Real packs have licences to agree to, so the networks
here have buffalo_s's sizes (0.6 and 0.5 billion multiplications) and random weights: time does not depend on what
they have learned. Beside them stands the usual loop with one thing tuned: onnxruntime's threads sleep while they wait
instead of spinning, which is most of the difference. Prints seconds and CPU seconds of all three, and records the
usual loop's ratio as a claim. A busy machine makes spinning dearer: run it on an idle one.
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
import onnxruntime
from insightface.app import FaceAnalysis
from onnx import helper, numpy_helper
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apl_core.identity import load_embedder
from apl_train import claims, shipped
from apl_train.datasets.pictures import PictureFolder
from apl_train.folder_score.face_cache import FaceCache, look

EDGE, DETECTOR, PART = 512, 640, 50  # pixels, pixels, pictures in a row


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


def detector(path: Path, width: int) -> None:
    """0.6 billion multiplications at 640 x 640 with width 1; then one face in the middle, whatever was seen."""
    net, before = Network(), 3
    for channels, stride in ((16, 2), (32, 2), (64, 2), (64, 1), (64, 2), (64, 2)):
        net.conv(before, channels * width, stride=stride)
        before = channels * width
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


def recogniser(path: Path, width: int) -> None:
    """MobileFaceNet's way of saving: 1 x 1 and depthwise convolutions, 0.5 billion multiplications at 112 x 112."""
    net, small, large = Network(), 64 * width, 128 * width
    net.conv(3, small, stride=2)
    net.conv(small, small, stride=2)
    for channels in (small, large):
        if channels == large:
            net.conv(small, large, stride=2)
        for _ in range(14):
            net.conv(channels, 2 * channels, 1)
            net.conv(2 * channels, 2 * channels, group=2 * channels)
            net.conv(2 * channels, channels, 1)
    net.node("GlobalAveragePool", net.last)
    net.node("Flatten", net.last)
    net.node("MatMul", net.last, net.constant(net.rng.normal(size=(large, 512)).astype(np.float32)), out="y")
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
    parser.add_argument("--images", type=int, default=500, help="pictures; the claim is of 500")
    parser.add_argument("--width", type=int, default=1, help="4 is about buffalo_l's cost: 16 times; never a claim")
    parser.add_argument("--no-claim", action="store_true", help="only print")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        pack = root / "models" / "sized"
        pack.mkdir(parents=True)
        detector(pack / "det.onnx", args.width)
        recogniser(pack / "rec.onnx", args.width)
        names = pictures(root / "pictures", args.images)
        sleeping = onnxruntime.SessionOptions()
        sleeping.add_session_config_entry("session.intra_op.allow_spinning", "0")
        loops = []
        for options in ({}, {"sess_options": sleeping}):
            loops.append(FaceAnalysis(name=str(pack), root=str(root), allowed_modules=["detection", "recognition"],
                                      providers=["CPUExecutionProvider"], **options))
            loops[-1].prepare(ctx_id=-1, det_size=(DETECTOR, DETECTOR))
        embedder = load_embedder("sized", root, det_size=DETECTOR)
        store = PictureFolder(root / "pictures")

        def usual(part: list[str], loop: FaceAnalysis) -> dict:
            return {name: loop.get(cv2.imread(str(root / "pictures" / name))) for name in part}

        ways = {"usual loop": lambda part: usual(part, loops[0]), "its threads asleep": lambda part: usual(
            part, loops[1]), "ours": lambda part: look(store, part, embedder, FaceCache(None, embedder))}
        keys, rows = list(ways), []
        for work in ways.values():
            work(names[:4])  # the first calls allocate
        for start in range(0, len(names), PART):
            part, row, found = names[start : start + PART], {}, {}
            turn = start // PART % len(keys)
            for key in keys[turn:] + keys[:turn]:
                wall, cpu = time.perf_counter(), time.process_time()
                found[key] = ways[key](part)
                row[key] = time.perf_counter() - wall, time.process_time() - cpu
            rows.append([row[key] for key in keys])
            for name in part:
                (a,), (b,) = found["usual loop"][name], found["ours"][name].faces
                assert np.allclose(a.bbox, b.box, atol=1e-3) and float(a.normed_embedding @ b.embedding) > 0.99999, name
        wall, cpu = np.array(rows).transpose(2, 1, 0)  # [way, part] each
        ratio = wall[0].sum() / wall[2].sum()
        picks = np.random.default_rng(0).integers(0, wall.shape[1], (4000, wall.shape[1]))
        draws = wall[0][picks].sum(axis=1) / wall[2][picks].sum(axis=1)
        ends = [float(v) for v in np.percentile(draws, (2.5, 97.5))]
        print(f"{len(names)} pictures of {EDGE} x {EDGE}, detector {DETECTOR}, {os.cpu_count()} cores")
        for i, key in enumerate(keys):
            print(f"{key:20}{1000 * wall[i].sum() / len(names):7.1f} ms a picture, CPU "
                  f"{1000 * cpu[i].sum() / len(names):7.1f} ms; ratio to ours {wall[i].sum() / wall[2].sum():.2f}, of "
                  f"CPU seconds {cpu[i].sum() / cpu[2].sum():.2f}")
        print(f"usual loop / ours {ratio:.2f} [{ends[0]:.2f}, {ends[1]:.2f}]")
        if not args.no_claim and args.width == 1 and args.images == 500:
            claims.record({"scoring-speed": (float(ratio), ends, len(names))})


if __name__ == "__main__":
    main()
