"""The events of a running training, read as they grow: `events.jsonl` is looked at once, then only what came since."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "events.jsonl"


@dataclass
class _Seen:
    identity: tuple[int, int] = (0, 0)
    offset: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Events:
    """Reads event files from any thread. A file that was replaced or cut (as `apl resume` does) is read anew."""

    def __init__(self, keep: int = 16) -> None:
        self._seen: dict[Path, _Seen] = {}
        self._lock = threading.Lock()
        self._keep = keep

    def of(self, run: Path) -> list[dict[str, Any]]:
        """All whole lines of `<run>/events.jsonl` so far."""
        path = run / FILE
        with self._lock:
            seen = self._seen.pop(path, _Seen())
            self._seen[path] = seen  # newest last
            while len(self._seen) > self._keep:
                self._seen.pop(next(iter(self._seen)))
            try:
                with path.open("rb") as handle:
                    self._read(handle, seen, path)
            except OSError:
                seen.identity, seen.offset, seen.rows = (0, 0), 0, []
            return list(seen.rows)

    @staticmethod
    def _read(handle: Any, seen: _Seen, path: Path) -> None:
        stat = path.stat()
        identity = (stat.st_dev, stat.st_ino)
        if identity != seen.identity or stat.st_size < seen.offset:
            seen.identity, seen.offset, seen.rows = identity, 0, []
        handle.seek(seen.offset)
        data = handle.read()
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                seen.rows.append(row)
        seen.offset += whole
