"""What carrying a prefix over costs at full size, 49408 tokens from 768 to 1280 numbers, on made tables.

    python benchmarks/transfer_cost.py map       seconds and peak memory from files on disk to a prefix with its report
    python benchmarks/transfer_cost.py search    the published search beside its closed form, full size; many minutes
    python benchmarks/transfer_cost.py agree     the same at 6000 tokens, 192 to 320, and identity; minutes

Tables: "random", independent normal numbers; "power law", 600 dimensions that both share, of a power-law spectrum, with
noise of 30% of their own. With APL_RECORD_CLAIMS=1 the figures become rows of benchmarks/claims.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from fakes import published_search
from safetensors.torch import save_file
from torch import Tensor

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.relative_maps import Moments, Spectra, unit
from apl_core.table_map import TransferSettings, anchors, fit
from apl_core.token_tables import TokenTable, read_table, read_tables
from apl_core.transfer import transfer

FULL = (49408, 768, 1280, 600)
STUDY = (6000, 192, 320, 160)
KINDS = ("random", "power law")
METHODS = {"auto": {}, "ptfer": {}, "ptfer, masked": {"topk": 8192}}
"""What a user may ask for. PTfer tries its mask, and pays for it once more where it is chosen, or asked for as here."""
VECTORS = 10
SETTLED = 10_000
"""Steps after which the search stands still; of the published 2000 it is still on its way on tables with a spectrum."""
SD1 = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
SGM = {"clip_l": "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
       "clip_g": "conditioner.embedders.1.model.token_embedding.weight"}
Found = dict[str, tuple[float, None, int]]


def tables(kind: str, size: tuple[int, int, int, int], noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """float32 [tokens, ds] and [tokens, dt]."""
    tokens, ds, dt, shared = size
    g = torch.Generator().manual_seed(0)
    if kind == "random":
        return torch.randn(tokens, ds, generator=g), torch.randn(tokens, dt, generator=g)
    common = torch.randn(tokens, shared, generator=g) * torch.arange(1, shared + 1) ** -0.5
    found = []
    for width in (ds, dt):
        rows = common @ torch.randn(shared, width, generator=g) / width**0.5
        found.append(rows.add_(torch.randn(rows.shape, generator=g), alpha=noise * float(rows.std())))
    return found[0], found[1]


def vectors_of(source: Tensor) -> Tensor:
    """Vectors as a training leaves them: tokens, and as much again of noise that no token has."""
    g = torch.Generator().manual_seed(1)
    some = source[torch.linspace(600, len(source) - 600, VECTORS).long()]
    return some + some.std() * torch.randn(some.shape, generator=g)


def written(folder: Path, kind: str) -> None:
    """The files that a user has, of tables alone: an SD1 and an SDXL single file, and a prefix."""
    source, target = tables(kind, FULL)
    save_file({SD1: source}, str(folder / "sd1.safetensors"))
    save_file({SGM["clip_l"]: source, SGM["clip_g"]: target}, str(folder / "sdxl.safetensors"))
    prefix = AnonymizationPrompt("sd1", {"emb_params": vectors_of(source)}, PrefixMetadata(title="made"))
    save_prefix(prefix, folder / "prefix.safetensors")


def carried(folder: Path, method: str) -> dict[str, float]:
    """Seconds and peak memory of this process, from the files to the prefix and its report.

    The files have just been written or read: no disk is waited for.
    """
    import resource

    began = time.perf_counter(), time.process_time()
    settings = TransferSettings(method.split(",")[0], **METHODS[method])
    found = transfer(load_prefix(folder / "prefix.safetensors"), read_table(folder / "sd1.safetensors"),
                     read_tables(folder / "sdxl.safetensors"), settings)
    save_prefix(found.prefix, folder / "carried.safetensors")
    spent = time.perf_counter() - began[0], time.process_time() - began[1]
    chosen = found.report.keys[-1].facts
    return {"seconds": spent[0], "cpu_seconds": spent[1],
            "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "method": chosen["method"], "holdout_cosine": chosen["holdout_cosine"]}


def map_cost(threads: int, rounds: int) -> Found:
    """A process of its own for every turn: memory is that process's, and no cache is warm."""
    seconds, memory = [], []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            written(Path(name), kind)
            for method in [*METHODS] * rounds:
                words = [sys.executable, str(Path(__file__)), "carried", "--folder", name, "--threads", str(threads),
                         "--method", method]
                ran = subprocess.run(words, check=True, capture_output=True, text=True)
                row = json.loads(ran.stdout)
                print(f"{kind:10} {method:13} {row['seconds']:6.2f} s ({row['cpu_seconds']:.2f} s of CPU on {threads} "
                      f"threads), {row['gb']:.2f} GB; {row['method']}, held-out cosine "
                      f"{row['holdout_cosine']:.3f}", flush=True)
                seconds.append(row["seconds"])
                memory.append(row["gb"])
    return {"transfer-seconds": (max(seconds), None, len(seconds)),
            "transfer-memory": (max(memory), None, len(memory))}


def compare(kind: str, size: tuple[int, int, int, int], noise: float, steps: int) -> dict[str, float]:
    """Search and closed form of PTfer on the same anchors and vectors."""
    source, target = tables(kind, size, noise)
    ids, weights = anchors(TokenTable(source), TokenTable(target))
    vectors = vectors_of(source)
    began = time.perf_counter()
    matrix = Spectra(Moments(source, target, ids, weights)).map("ptfer", 1e-6).float()
    closed = unit(vectors) @ matrix.T
    ours = time.perf_counter() - began
    a, b = source[ids], target[ids]
    began = time.perf_counter()
    searched, loss = published_search.search(a, b, vectors, steps)
    theirs = (time.perf_counter() - began) * published_search.STEPS / steps
    codes = unit(vectors) @ unit(a).T
    own = float((1 - torch.cosine_similarity(unit(closed) @ unit(b).T, codes, dim=1)).mean())
    cosine = float(torch.cosine_similarity(closed, searched, dim=1).min())
    print(f"{kind:10} {size[0]} x {size[1]} -> {size[2]}: closed form {ours:.2f} s, loss {own:.5f}; search of {steps} "
          f"steps {theirs:.1f} s{'' if steps == published_search.STEPS else ' (extrapolated)'}, loss {loss:.5f}; "
          f"{theirs / ours:.0f} times faster; least cosine {cosine:.4f}", flush=True)
    return {"ratio": theirs / ours, "loss": own / loss, "cosine": cosine}


def agree() -> Found:
    """Agreement at the size of the study, and identity by every method, raw and centred.

    Both search for one optimum, so they are compared where the search has arrived; the published number of steps is
    printed beside it.
    """
    for kind in KINDS:
        compare(kind, STUDY, 0.05, published_search.STEPS)
    rows = [compare(kind, STUDY, 0.05, SETTLED) for kind in KINDS]
    least = 1.0
    for kind in KINDS:
        source = TokenTable(tables(kind, STUDY, 0.05)[0])
        twin = TokenTable(source.vectors.clone())
        for method in ("ridge", "half", "ptfer", "procrustes"):
            for centred in (False, True):
                found = fit(source, twin, TransferSettings(method, centred=centred, rho=1e-6)).carry(source.vectors)
                least = min(least, float(torch.cosine_similarity(found, source.vectors, dim=1).min()))
    print(f"identity: least cosine {least:.6f}", flush=True)
    return {"transfer-agreement": (min(row["cosine"] for row in rows), None, len(rows) * VECTORS),
            "transfer-identity": (least, None, len(KINDS) * 8)}


def search(steps: int) -> Found:
    """The claims of speed and loss at full size; fewer steps than published give no claim."""
    rows = [compare(kind, FULL, 0.3, steps) for kind in KINDS]
    if steps != published_search.STEPS:
        return {}
    return {"transfer-speed": (min(row["ratio"] for row in rows), None, len(rows)),
            "transfer-loss": (max(row["loss"] for row in rows), None, len(rows))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("map", "search", "agree", "carried"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns a kind of table and method (map)")
    parser.add_argument("--steps", type=int, default=published_search.STEPS, help="of the search (search)")
    parser.add_argument("--method", choices=list(METHODS), default="auto", help="of a turn (carried)")
    parser.add_argument("--folder", type=Path, help="files of a turn (carried)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "carried":
        print(json.dumps(carried(args.folder, args.method)))
        return
    found = {"map": lambda: map_cost(args.threads, args.rounds), "search": lambda: search(args.steps),
             "agree": agree}[args.what]()
    if found and os.environ.get("APL_RECORD_CLAIMS"):
        from apl_train import claims

        claims.record(found)


if __name__ == "__main__":
    main()
