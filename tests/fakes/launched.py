"""The interpreter's command line for one process, or for several of them under `accelerate launch`."""

from __future__ import annotations

import socket
import sys


def launched(processes: int) -> list[str]:
    """What stands ahead of a script, or of -m and a module; several processes meet at a free port."""
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
