"""Do two one-thread processes generate and score nearly twice as fast as one? `python benchmarks/two_processes.py`

The same pictures of the miniature, drawn and then looked at by one process and by two under `accelerate launch`, each
on one thread. A process waits until all have loaded their models, takes its share, and counts its own CPU seconds: the
busiest one's are what a clock on the wall would show on a machine with a core for each. Wall seconds are printed too;
they say little while other programs run. With APL_RECORD_CLAIMS=1 both ratios become rows of benchmarks/claims.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from apl_train import claims, shipped
from apl_train.processes import this_process

MARK = "two_processes: "


def inside(count: int, looks: int) -> None:
    """One process: its share of `count` pictures drawn, then looked at `looks` times; the first one tells of all."""
    from apl_core.identity import load_embedder
    from apl_train.model.backend import Backend
    from apl_train.scoring.command import attribute_reader
    from apl_train.scoring.persons import read_evaluation_set

    torch.set_num_threads(1)
    processes = this_process()
    backend = Backend.load(shipped.locate("base_model", shipped.MINIATURE))
    embedder, attributes = load_embedder(shipped.recogniser(shipped.MINIATURE)), attribute_reader(shipped.MINIATURE)
    people = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE)).persons
    shots = [(f"A close-up portrait of {people[i % len(people)].name}", i) for i in range(count)]
    mine = processes.share(shots)
    warm = backend.sample([mine[0][0]], [0], steps=2).images
    embedder.faces_of(list(warm))
    attributes.read(warm)

    def draw() -> Any:
        return backend.sample([text for text, _ in mine], [seed for _, seed in mine], batch=4).images

    def look() -> list[int]:
        seen = []
        for _ in range(looks):
            seen = [len(found) for found in embedder.faces_of(list(images))]
            attributes.read(images)
        return seen

    def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        processes.wait()
        began, wall = time.process_time(), time.perf_counter()
        made = work()
        spent = time.process_time() - began
        everybody = processes.everyone(spent)  # all are done
        return made, {"cpu": max(everybody), "wall": time.perf_counter() - wall}

    images, generate = timed(draw)
    faces, score = timed(look)
    if len(processes.merge(faces)) != count:
        raise SystemExit("a picture was left out")
    if processes.main:
        sys.stdout.write(f"{MARK}{json.dumps({'generate': generate, 'score': score, 'processes': processes.count})}\n")


def run(processes: int, count: int, looks: int) -> dict[str, dict[str, float]]:
    """Seconds of so many processes for the same work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # without a GPU, --multi_gpu starts CPU processes; --cpu would start one, whatever their number
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--num_processes", str(processes), "--main_process_port", str(port)]
    argv = [sys.executable, *(launch if processes > 1 else ()), __file__, "--inside", "--pictures", str(count),
            "--looks", str(looks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
           "ACCELERATE_USE_CPU": "true",
           "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(argv, env=env, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or not lines:
        raise SystemExit(f"{processes} process(es) failed:\n{done.stderr[-2000:]}")
    told = json.loads(lines[0].partition(MARK)[2])
    if told.pop("processes") != processes:
        raise SystemExit(f"{processes} process(es) were asked for, others were started: nothing to compare")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--looks", type=int, default=10, help="times that every picture is looked at")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.pictures, args.looks)
        return
    one, two = (run(n, args.pictures, args.looks) for n in (1, 2))
    found = {}
    for what in ("generate", "score"):
        found[what] = one[what]["cpu"] / two[what]["cpu"]
        sys.stdout.write(f"{what:10}{args.pictures} pictures: one {one[what]['cpu']:.2f} s, busier of two "
                         f"{two[what]['cpu']:.2f} s: {found[what]:.2f} x  (wall {one[what]['wall']:.2f} and "
                         f"{two[what]['wall']:.2f} s: {one[what]['wall'] / two[what]['wall']:.2f} x)\n")
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({f"two-{what}": (ratio, None, args.pictures) for what, ratio in found.items()})


if __name__ == "__main__":
    main()
