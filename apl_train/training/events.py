"""What a training says while it runs: one JSON object a line in `events.jsonl`, for people, interfaces and reports.

Events: `start`, `step` (step, l_id, l_reg, loss, steps_per_s), `level` (step, path), `stopped`, `error`, `done`.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from apl_core.atomic import storage_error, write_text

EVENTS = "events.jsonl"


class EventLog:
    """Appends events to `<folder>/events.jsonl`; every line is flushed, so a reader sees it at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self._whole = False  # not known: an earlier process may have died while it wrote

    def cut(self, step: int) -> None:
        """Drops events after `step`: a resumed training goes through those steps again."""
        if self.path.exists():
            kept = [e for e in read_events(self.path) if e.get("step", 0) <= step]
            write_text(self.path, "".join(json.dumps(e) + "\n" for e in kept))

    def write(self, event: str, **values: Any) -> dict[str, Any]:
        """Appends one event and returns it. NaN becomes null, JSON has none. Raises StorageError."""
        row: dict[str, Any] = {"event": event, "time": round(time.time(), 3)}
        for key, value in values.items():
            row[key] = None if isinstance(value, float) and not math.isfinite(value) else value
        try:
            with self.path.open("a", encoding="utf-8") as out:
                # a line that a crash or a full disk cut off must not swallow this one
                start = "" if self._whole or _ends_in_newline(self.path) else "\n"
                self._whole = False
                out.write(start + json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._whole = True
        except OSError as error:
            raise storage_error(self.path, error) from error
        return row


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return size == 0 or file.read(1) == b"\n"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file or a run folder; a last line that was cut off by a crash is left out."""
    if path.is_dir():
        path = path / EVENTS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
