"""The order in which jobs run, one at a time, in `<runs>/index.sqlite`: survives restarts, rebuilt from run folders.

The database holds no truth of its own but the order and which run is looked at; what a job is and how it stands is read
from its folder. Several pages (a host's tab and `apl ui`) may share one: a job is claimed inside a transaction.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from . import jobs
from .jobs import QUEUED, RUNNING, Job
from .place import Place

FILE = "index.sqlite"
TICK = 1.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (path TEXT PRIMARY KEY, position REAL NOT NULL, ended INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_log = logging.getLogger("apl.ui")


class Queue:
    """Jobs of all runs below `place.runs`. Every method may be called from any thread."""

    _serving: ClassVar[set[Path]] = set()

    def __init__(self, place: Place) -> None:
        self.place = place
        self._ended = threading.Event()

    # -- the database ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a transaction; a damaged file is put aside and made again from the run folders."""
        self.place.runs.mkdir(parents=True, exist_ok=True)
        path = self.place.runs / FILE
        fresh = not path.exists()
        connection = sqlite3.connect(path, timeout=10, isolation_level=None)
        try:
            try:
                connection.executescript(_SCHEMA)
            except sqlite3.DatabaseError as error:
                connection.close()
                _log.warning("%s is damaged (%s); it is made again from the run folders", path.name, error)
                path.unlink(missing_ok=True)
                fresh, connection = True, sqlite3.connect(path, timeout=10, isolation_level=None)
                connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            if fresh:
                self._scan(connection)
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            connection.close()

    def _scan(self, database: sqlite3.Connection) -> None:
        for path in self.place.runs.glob("*/jobs/[0-9][0-9][0-9][0-9]-*"):
            if (job := jobs.read(path)) is not None:
                database.execute("INSERT OR IGNORE INTO jobs VALUES (?, ?, ?)",
                                 (self._key(path), job.created, job.state not in (QUEUED, RUNNING)))

    def _key(self, folder: Path) -> str:
        return folder.relative_to(self.place.runs).as_posix()

    def rescan(self) -> None:
        """Takes in jobs whose folders were copied here or made by another version."""
        with self._database() as database:
            self._scan(database)

    def _open(self, database: sqlite3.Connection) -> list[Job]:
        """Jobs that wait or run, in order; what has ended or is gone is noted as such."""
        found = []
        for (key,) in database.execute("SELECT path FROM jobs WHERE NOT ended ORDER BY position").fetchall():
            job = jobs.read(self.place.runs / key)
            if job is None:
                database.execute("DELETE FROM jobs WHERE path = ?", (key,))
            elif job.state in (QUEUED, RUNNING):
                found.append(job)
            else:
                database.execute("UPDATE jobs SET ended = 1 WHERE path = ?", (key,))
        return found

    # -- what people do with it -----------------------------------------------------------------------------------

    def add(self, folder: Path) -> None:
        """Puts a created job at the end."""
        with self._database() as database:
            last = database.execute("SELECT MAX(position) FROM jobs").fetchone()[0] or 0.0
            job = jobs.read(folder)
            position = max(last + 1e-3, job.created if job else 0.0)
            database.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, 0)", (self._key(folder), position))

    def first(self, folder: Path) -> None:
        """Moves a waiting job ahead of all others."""
        with self._database() as database:
            least = database.execute("SELECT MIN(position) FROM jobs").fetchone()[0] or 0.0
            database.execute("UPDATE jobs SET position = ? WHERE path = ?", (least - 1e-3, self._key(folder)))

    def waiting(self) -> list[Job]:
        """Jobs that run or wait, in the order in which they run."""
        if not (self.place.runs / FILE).exists() and not self.place.runs.is_dir():
            return []
        with self._database() as database:
            return sorted(self._open(database), key=lambda job: job.state != RUNNING)

    def remember(self, key: str, value: str) -> None:
        """Keeps a choice of the page, such as which run is looked at."""
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, value))

    def recall(self, key: str) -> str:
        """A kept choice, "" for none."""
        if not (self.place.runs / FILE).exists():
            return ""
        with self._database() as database:
            row = database.execute("SELECT value FROM settings WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    # -- running --------------------------------------------------------------------------------------------------

    def tick(self) -> Job | None:
        """Starts the next job when none runs, and returns it; a job that runs unwatched is watched again."""
        with self._database() as database:
            found = self._open(database)
            for job in found:
                if job.state == RUNNING:
                    jobs.adopt(job)
            if any(job.state == RUNNING for job in found) or not found:
                return None
            jobs.start(found[0])  # inside the transaction: no other page can start a second one
            return found[0]

    def serve(self) -> None:
        """Runs jobs from now on, in a thread that ends with the process; running jobs do not end with it.

        One thread a folder, however often a host builds the page anew.
        """
        if self.place.runs in self._serving:
            return
        self._serving.add(self.place.runs)

        def loop() -> None:
            while not self._ended.wait(TICK):
                try:
                    if self.place.runs.is_dir():
                        self.tick()
                except Exception as error:  # a full disk now may have room in a second; the thread must live
                    _log.warning("the queue could not go on: %s", error)

        threading.Thread(target=loop, name="apl-queue", daemon=True).start()

    def close(self) -> None:
        """Ends the thread; for tests."""
        self._ended.set()
        self._serving.discard(self.place.runs)
