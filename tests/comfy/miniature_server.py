"""A ComfyUI with this pack and the miniature under the names that the example workflows use; and its websocket.

The shipped miniature stands for Stable Diffusion 1.5, the miniature SDXL for SDXL, its recogniser for auraface, and a
reference picture of one of its persons for ComfyUI's example.png. So the workflows run as they are.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Any

from comfy_host import ROOT
from enforced_server import HERE, Server
from PIL import Image

from apl_train import shipped
from apl_train.scoring.persons import read_evaluation_set

PERSON = "arthur malket"
SD1, SDXL = "v1-5-pruned-emaonly.safetensors", "sd_xl_base_1.0.safetensors"


def make_base(folder: Path) -> Path:
    """A folder for `--base-directory` with everything that the example workflows name."""
    base = folder / "base"
    for name in ("models/checkpoints", "models/anonymization_prompts", "models/insightface/models/auraface", "input",
                 "output", "custom_nodes", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, pack in (("anonymization-prompt", ROOT), ("miniature_pack", HERE / "miniature_pack")):
        (base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
    model = shipped.locate("base_model", "miniature")
    checkpoints = base / "models/checkpoints"
    for name in (SD1, "miniature-sd1.safetensors"):
        (checkpoints / name).symlink_to(model)
    (checkpoints / SDXL).symlink_to(shipped.locate("base_model", "miniature-sdxl"))
    recogniser = shipped.locate("recogniser", "miniature")
    for part in recogniser.parent.iterdir():
        shutil.copy(part, base / "models/insightface/models/auraface" / part.name)
    people = read_evaluation_set(shipped.locate("persons", "miniature"))
    person = next(p for p in people.persons if p.name == PERSON)
    Image.fromarray(people.references(person)[0]).save(base / "input/example.png")
    return base


class Socket:
    """What the server tells its page: `events` of text frames, and how many pictures came as binary frames."""

    def __init__(self, server: Server) -> None:
        self._stream = socket.create_connection(("127.0.0.1", server.port), timeout=900)
        key = base64.b64encode(os.urandom(16)).decode()
        self._stream.sendall((f"GET /ws?clientId={server.client} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
                              "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                              f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n").encode())
        self._file = self._stream.makefile("rb")
        if b" 101 " not in self._file.readline():
            raise ConnectionError("the server does not take websockets")
        while self._file.readline().strip():
            pass
        self.pictures = 0

    def frame(self) -> dict[str, Any] | None:
        """The next message; None for a binary one, which is counted. Raises OSError when nothing comes."""
        first, second = self._file.read(2)
        size = second & 0x7F
        if size > 125:
            size = struct.unpack(">H" if size == 126 else ">Q", self._file.read(2 if size == 126 else 8))[0]
        data = self._file.read(size)
        if first & 0x0F == 1:
            return json.loads(data)
        self.pictures += first & 0x0F == 2
        return None

    def until(self, prompt_id: str, *kinds: str, seconds: float = 600) -> list[dict[str, Any]]:
        """All messages up to the first of `kinds` for this prompt."""
        self._stream.settimeout(seconds)
        seen = []
        while True:
            message = self.frame()
            if message is None:
                continue
            seen.append(message)
            data = message.get("data", {})
            if message.get("type") in kinds and data.get("prompt_id") in (prompt_id, None):
                return seen

    def close(self) -> None:
        self._stream.close()
