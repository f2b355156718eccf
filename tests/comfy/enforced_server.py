"""A ComfyUI with this pack, a test pack and a policy, as a process of its own; and a client for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from comfy_host import ROOT, host_folder, host_python

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix

WIDTH_L, WIDTH_G, M = 64, 80, 10
# The last: one of the packs leaves its nodes out where it sees this name.
_NOT_THE_HOSTS = ("PYTHONPATH", "PYTHONHOME", "APL_POLICY", "PYTEST_CURRENT_TEST")
HERE = Path(__file__).parent


def write_policy(folder: Path, *, width_sd1: int = WIDTH_L, **changes: Any) -> Path:
    """A policy for the small models of the test pack, with random prefixes beside it. `changes` go over its keys."""
    prefixes = folder / "prefixes"
    prefixes.mkdir(parents=True, exist_ok=True)
    entries = {}
    for seed, (family, widths) in enumerate({"sd1": {"emb_params": width_sd1},
                                             "sdxl": {"clip_l": WIDTH_L, "clip_g": WIDTH_G}}.items()):
        generator = torch.Generator().manual_seed(40 + seed)
        tensors = {key: torch.randn(M, width, generator=generator) for key, width in widths.items()}
        path = prefixes / f"{'ab'[seed]}-{family}.safetensors"
        save_prefix(AnonymizationPrompt(family, tensors, PrefixMetadata(title=f"test {family}")), path)
        entries[family] = {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"mode": "enforced", "embeddings": entries} | changes), encoding="utf-8")
    return policy


def make_base(folder: Path, packs: Sequence[Path] = ()) -> Path:
    """A folder for `--base-directory`: empty but for this pack, the test pack and others given."""
    base = folder / "base"
    for name in ("models/embeddings", "models/anonymization_prompts", "models/loras", "input", "output",
                 "custom_nodes"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for pack in (ROOT, HERE / "enforcement_pack", *packs):
        link = base / "custom_nodes" / ("anonymization-prompt" if pack == ROOT else pack.name)
        if not link.exists():
            link.symlink_to(pack, target_is_directory=True)
    return base


class Server:
    """One running ComfyUI. `log` is the file of everything it says; `path` a folder of further Python packages."""

    def __init__(self, folder: Path, base: Path, policy: str | None, extra: Sequence[str] = (),
                 stand_ins: Sequence[str] = (), api_nodes: bool = False, path: Path | None = None) -> None:
        host = host_folder()
        if host is None:
            raise FileNotFoundError("no ComfyUI")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / f"server-{self.port}.log"
        self.client = uuid.uuid4().hex
        env = {key: value for key, value in os.environ.items() if key not in _NOT_THE_HOSTS}
        env |= {"OMP_NUM_THREADS": "1", "SPY_PREFIXES": str(folder / "prefixes"), "HF_HUB_OFFLINE": "1",
                "PIP_NO_INDEX": "1"}  # one of the packs would install libraries as it is imported
        if policy is not None:
            env["APL_POLICY"] = policy
        if path is not None:
            env["PYTHONPATH"] = str(path)
        frontend = folder / "frontend"
        frontend.mkdir(exist_ok=True)
        (frontend / "index.html").write_text("<html></html>", encoding="utf-8")
        argv = [host_python(host), str(HERE / "run_host.py"), str(host),
                *(word for name in stand_ins for word in ("--stand-in", name)), "--cpu", "--listen", "127.0.0.1",
                "--port", str(self.port), "--use-pytorch-cross-attention", "--disable-auto-launch",
                "--dont-print-server", *([] if api_nodes else ["--disable-api-nodes"]), "--database-url", "sqlite:///:memory:",
                "--base-directory", str(base), "--front-end-root", str(frontend), *extra]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, cwd=host, env=env, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, seconds: float = 400) -> None:
        """Until it answers. Raises RuntimeError with its log when it ends or stays silent."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ended with {self.process.returncode}:\n{self.text()[-4000:]}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.3)
        raise RuntimeError(f"silent for {seconds} s:\n{self.text()[-4000:]}")

    def ended(self, seconds: float = 400) -> int:
        """The exit code of a server that is expected to end by itself."""
        return self.process.wait(seconds)

    def text(self) -> str:
        """What it said so far."""
        return self.log.read_text("utf-8", errors="replace")

    def stop(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)

    def memory(self) -> float:
        """Resident memory in MB."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    # -- HTTP

    def get(self, path: str) -> Any:
        """JSON of a GET. Raises OSError."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """(code, JSON or text) of a POST of JSON, or of bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                code, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            code, text = error.code, error.read()
        try:
            return code, json.loads(text)
        except ValueError:
            return code, text.decode("utf-8", "replace")

    def queue(self, graph: Any, path: str = "/prompt", **more: Any) -> tuple[int, Any]:
        """Queue a graph."""
        return self.post(path, {"prompt": graph, "client_id": self.client} | more)

    def result(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """A finished prompt's history: "status" and "outputs"."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.get(f"/history/{prompt_id}"):
                return found[prompt_id]
            time.sleep(0.05)
        raise TimeoutError(prompt_id)

    def run(self, graph: Any, **more: Any) -> tuple[str, Any]:
        """("ok", outputs), ("error", message) while it ran, or ("refused", message) before it was queued."""
        code, answer = self.queue(graph, **more)
        if code != 200:
            error = answer.get("error", {}) if isinstance(answer, dict) else answer
            details = json.dumps(answer.get("node_errors", {})) if isinstance(answer, dict) else ""
            return "refused", f"{code} {error.get('message') if isinstance(error, dict) else error} {details}"[:600]
        found = self.result(answer["prompt_id"])
        if found["status"]["status_str"] == "success":
            return "ok", found["outputs"]
        for kind, data in found["status"]["messages"]:
            if kind == "execution_error":
                return "error", f"{data['node_type']}: {data['exception_message']}".strip()
        return "error", json.dumps(found["status"])


@contextlib.contextmanager
def serving(folder: Path, base: Path, policy: str | None, extra: Sequence[str] = (),
            stand_ins: Sequence[str] = (), api_nodes: bool = False) -> Iterator[Server]:
    """A server that answers; stopped at the end."""
    server = Server(folder, base, policy, extra, stand_ins, api_nodes)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
