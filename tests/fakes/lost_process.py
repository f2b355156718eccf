"""`apl ...` under `accelerate launch` with one process that is ended while it writes its second picture.

    accelerate launch ... lost_process.py INDEX generate id --out FOLDER ...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from apl_train.commands import cli
from apl_train.datasets import generate
from apl_train.processes import this_process


def main(lost: int, argv: list[str]) -> int:
    torch.set_num_threads(1)
    write, written = generate.write_bytes, []

    def halfway(path: Path, data: bytes) -> None:
        written.append(path)
        if this_process().index == lost and len(written) == 2:
            path.with_name(f".{path.name}.0123abcd.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, data)

    generate.write_bytes = halfway
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
