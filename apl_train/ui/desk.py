"""Everything the page can do, without any toolkit: start, queue, stop, pause, resume, check, look, use, publish.

Each action returns what to tell the person; errors are told, never raised into the page. What starts processes or
takes folders is refused here, whatever a button looks like, where others can reach the page.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import commands, jobs, runs
from .commands import MINIATURE, Wish
from .core import core
from .job_queue import Queue
from .jobs import FAILED, LOST, QUEUED, RUNNING, STOPPED, Job
from .place import NOT_ALLOWED, ROOT, Place
from .runs import PAUSED, Run
from .tail import Events

GOOD, BAD, NOTE = "good", "bad", "note"
TRAINING = ("train", "resume", "make")
SELECTED = "run"
NOT_DRAWN = "There are no pictures yet: draw them first, or make everything."


@dataclass(frozen=True)
class Said:
    """What an action has to say: `tone` is "good", "bad" or "note"; `run` the run that it is about, or ""."""

    text: str
    tone: str = GOOD
    run: str = ""


Action = TypeVar("Action", bound=Callable[..., Said])


def _told(action: Action) -> Action:
    """Turns errors that are meant for people into what the action says."""

    @functools.wraps(action)
    def safe(self: Desk, *args: Any, **kwargs: Any) -> Said:
        try:
            return action(self, *args, **kwargs)
        except core("errors").APLError as error:
            return Said(str(error), BAD)
        except OSError as error:
            return Said(f"{error.strerror or error}: {error.filename or ''}. Check the path and try again.", BAD)

    return safe  # type: ignore[return-value]


def _guarded(action: Action) -> Action:
    """Refuses where the page may start nothing."""

    @functools.wraps(action)
    def safe(self: Desk, *args: Any, **kwargs: Any) -> Said:
        return action(self, *args, **kwargs) if self.place.may_start else Said(NOT_ALLOWED, BAD)

    return safe  # type: ignore[return-value]


class Desk:
    """The actions of one page in one place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.events = Events()
        self.queue = Queue(place)
        self._chosen = ""

    # -- runs -----------------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        return runs.all_runs(self.place, self.events)

    def names(self) -> list[str]:
        return [run.name for run in self.runs()]

    def run(self, name: str | None) -> Run | None:
        """The run of that name; None where there is none."""
        if not name:
            return None
        try:
            return runs.read_run(core("library").resolve_within(self.place.runs, name), self.events)
        except core("errors").APLError:
            return None

    @property
    def selected(self) -> str:
        """The run that is looked at: what was chosen last, over restarts too; else the one that runs, or the newest."""
        chosen = self._chosen or self.queue.recall(SELECTED)
        if chosen and (self.place.runs / chosen).is_dir():
            return chosen
        waiting = self.queue.waiting()
        if waiting:
            return waiting[0].run.name
        return next(iter(self.names()), "")

    def select(self, name: str | None) -> None:
        if name and self.run(name) is not None:
            self._chosen = name
            self.queue.remember(SELECTED, name)

    # -- starting -------------------------------------------------------------------------------------------------

    def folder_for(self, name: str) -> Path:
        """The folder that a new run of this name gets. Raises LibraryError for a name that is no file name."""
        core("library").safe_name(name)
        number = 1
        while (path := core("library").resolve_within(self.place.runs, f"{name}-{number:02d}")).exists():
            number += 1
        return path

    @_told
    @_guarded
    def start(self, wish: Wish) -> Said:
        """Puts a training into the queue; it begins at once when nothing else runs."""
        run = self.folder_for(wish.name)
        return self._enqueue(run, "train", commands.train(wish, run))

    @_told
    @_guarded
    def make(self, wish: Wish) -> Said:
        """Everything in one go: draw, check, train, score, install. A taken name is told now, not at the end."""
        run = self.folder_for(wish.name)
        taken = [folder for folder in self.folders() if (folder / f"{wish.name}.safetensors").exists()]
        if taken:
            return Said(f"{taken[0]} has a prefix named {wish.name} already. Choose another name.", BAD)
        return self._enqueue(run, "make", commands.make(wish, run, self.place.embeddings, self.place.host_embeddings))

    @_told
    @_guarded
    def draw(self, wish: Wish) -> Said:
        """Lets the checkpoint draw both sets, to be looked at before a training."""
        run = self.folder_for(f"{wish.name}-pictures")
        first, second = commands.generate(wish, run)
        said = self._enqueue(run, "generate", first)
        self.queue.add(jobs.create(self.place, run, "generate", run.name, second))
        return said

    @_told
    @_guarded
    def resume(self, name: str) -> Said:
        """Goes on with a run that was stopped, failed or was interrupted."""
        run = self._run(name)
        if run.state in (QUEUED, RUNNING, PAUSED):
            return Said(f"{run.name} is {run.state} already.", NOTE, run.name)
        whole = [job for job in run.jobs if job.kind in ("make", "generate")]
        if not whole:
            return self._enqueue(run.folder, "resume", commands.resume(run.folder))
        said = Said("")
        for kind, argv in dict.fromkeys((job.kind, job.argv) for job in whole):  # each goes on where it was interrupted
            said = self._enqueue(run.folder, kind, list(argv[3:]))
        return said

    def _enqueue(self, run: Path, kind: str, arguments: list[str]) -> Said:
        busy = [job for job in self.queue.waiting() if job.state == RUNNING]
        folder = jobs.create(self.place, run, kind, run.name, arguments)
        self.queue.add(folder)
        self.select(run.name)
        self.queue.tick()
        wait = f" It waits until {busy[0].title} is done." if busy else " It starts now."
        return Said(f"{run.name} is in the queue.{wait} Closing this page changes nothing.", GOOD, run.name)

    # -- while it runs --------------------------------------------------------------------------------------------

    @_told
    @_guarded
    def stop(self, name: str) -> Said:
        """Saves and ends a run; takes one that waits out of the queue. A second stop ends it without saving."""
        run = self._run(name)
        job = self._live(run)
        if job is None:
            return Said(f"{run.name} is not running.", NOTE, run.name)
        if job.state == QUEUED:
            jobs.end(job, 130)
            return Said(f"{run.name} was taken out of the queue.", GOOD, run.name)
        if job.control == "stop":
            jobs.tell(job, "kill")
            return Said(f"{run.name} is ended now. What was saved last stays; resume goes on from there.", NOTE,
                        run.name)
        jobs.tell(job, "stop")
        return Said(f"{run.name} saves and stops. Press again to end it at once, without saving.", GOOD, run.name)

    @_told
    @_guarded
    def pause(self, name: str) -> Said:
        """Holds a training, with the model in memory, or lets it go on."""
        run = self._run(name)
        job = self._live(run)
        if job is None or job.state == QUEUED:
            return Said(f"{run.name} is not running.", NOTE, run.name)
        if job.control == "pause":
            jobs.tell(job, "")
            return Said(f"{run.name} goes on.", GOOD, run.name)
        if job.kind not in TRAINING or job.control or run.stage not in ("", "train"):
            return Said(f"{run.name} can be paused while it trains; stop saves what there is.", NOTE, run.name)
        jobs.tell(job, "pause")
        return Said(f"{run.name} pauses after this step; the model stays in memory. Stop frees it.", GOOD, run.name)

    @_told
    @_guarded
    def hasten(self, name: str) -> Said:
        """Lets a waiting run be the next."""
        run = self._run(name)
        job = self._live(run)
        if job is None or job.state != QUEUED:
            return Said(f"{run.name} does not wait.", NOTE, run.name)
        self.queue.first(job.folder)
        return Said(f"{run.name} is next.", GOOD, run.name)

    def _run(self, name: str) -> Run:
        found = self.run(name)
        if found is None:
            raise core("errors").ConfigError(f"There is no run named {name!r}.", "Choose one from the list.",
                                             field="run")
        return found

    @staticmethod
    def _live(run: Run) -> Job | None:
        return next((job for job in reversed(run.jobs) if job.state in (QUEUED, RUNNING)), None)

    # -- before and after -----------------------------------------------------------------------------------------

    def apl(self, *arguments: str, timeout: float = 600.0) -> tuple[int, dict[str, Any], str]:
        """Runs `apl ... --json` to its end: exit code, what it printed as JSON, and its words for people."""
        packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        argv = [self.place.python, "-m", "apl_train", *arguments, "--json"]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False,
                                  stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": packages})
        except subprocess.TimeoutExpired:
            return 1, {}, f"It took longer than {timeout:.0f} seconds."
        except OSError as error:
            return 127, {}, f"{self.place.python} cannot be started: {error.strerror}."
        try:
            value = json.loads(done.stdout)
        except ValueError:
            value = {}
        words = re.sub(r"^(error|usage): ", "", done.stderr.strip())
        return done.returncode, value if isinstance(value, dict) else {}, words

    def data_folder(self, kind: str, value: str) -> Path:
        """The folder of "s_id" or "s_reg". Raises ConfigError where folders may not be named."""
        if value == MINIATURE:
            return commands.shipped(value, kind)
        if not self.place.may_start:
            raise core("errors").ConfigError(NOT_ALLOWED, "", field=kind)
        if not value.strip():
            raise core("errors").ConfigError(f"{kind} names no folder.", "Paste the path of a folder.", field=kind)
        return Path(value.strip()).expanduser()

    @_told
    @_guarded
    def check(self, wish: Wish) -> Said:
        """What is wrong with both sets, by `apl validate`."""
        if not wish.s_id and not wish.s_reg:
            return Said(NOT_DRAWN, NOTE)
        arguments = commands.validate(wish)
        code, found, words = self.apl(*arguments)
        listed = [row for row in found.get("findings") or () if isinstance(row, dict)]
        if not listed:
            held = ", ".join(f"{n} {what}" for what, n in dict(found.get("counts") or {}).items())
            return Said(f"Nothing is wrong with these sets: {held}." if code == 0 else
                        words or f"apl validate ended with code {code}.", GOOD if code == 0 else BAD)
        lines = [f"{row.get('level')}: {row.get('set')}, row {row.get('row')}: {row.get('message')} {row.get('hint')}"
                 for row in sorted(listed, key=lambda row: row.get("level") != "error")]
        more = f"\nand {len(lines) - 12} more" if len(lines) > 12 else ""
        errors = sum(row.get("level") == "error" for row in listed)
        head = f"{errors} errors, {len(listed) - errors} warnings" + ("" if errors else ": a training can start")
        return Said(f"{head}\n" + "\n".join(lines[:12]) + more, BAD if errors else NOTE)

    def prefixes(self) -> list[str]:
        """"run @ step" of every prefix that can be used, newest run first, the finished one first in each."""
        return [f"{run.name} @ {step}" for run in self.runs() for step in sorted(run.levels, reverse=True)]

    def newest_prefix(self) -> str | None:
        """The finished prefix of the newest run that has one: a level is used only when somebody chooses it."""
        return next((f"{run.name} @ {run.steps}" for run in self.runs() if run.final is not None), None)

    def prefix_file(self, choice: str | None) -> Path:
        """The file behind a choice of `prefixes`. Raises ConfigError."""
        name, _, step = str(choice or "").rpartition(" @ ")
        run = self.run(name)
        if run is None or not step.isdigit() or int(step) not in run.levels:
            if not self.prefixes():
                raise core("errors").ConfigError("There is no prefix yet.", 'Make one under "New prefix".',
                                                 field="prefix")
            raise core("errors").ConfigError("No prefix is chosen.", "Choose one from the list.", field="prefix")
        return run.levels[int(step)]

    def folders(self) -> list[Path]:
        """Where "use this prefix" copies to."""
        return [self.place.embeddings, *([self.place.host_embeddings] if self.place.host_embeddings else [])]

    @_told
    @_guarded
    def use(self, choice: str, name: str, replace: bool) -> Said:
        """Copies a prefix into embeddings/ and the host's folder."""
        files = core("sharing").use(self.prefix_file(choice), self.folders(), name.strip(), replace=replace)
        host = f" {self.place.host} finds it after refreshing its list." if self.place.host else ""
        return Said("Copied to:\n" + "\n".join(map(str, files)) + (f"\n{host.strip()}" if host else ""), GOOD)

    @_told
    @_guarded
    def publish(self, choice: str, title: str, author: str, licence: str, description: str) -> Said:
        """Writes a copy for others, with its metadata filled in, beside the run."""
        source = self.prefix_file(choice)
        out = core("sharing").publish(source, self.published(choice, title), title=title, author=author,
                                      license=licence, description=description)
        return Said(f"Written: {out}\nThis file is complete: tools that read embeddings load it, and its scores and "
                    "settings are in it. It holds no names.", GOOD)

    def published(self, choice: str, title: str) -> Path:
        """The file that `publish` writes. Raises ConfigError and LibraryError."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.") or "prefix"
        folder = self.place.runs / str(choice).rpartition(" @ ")[0] / "published"
        return core("library").resolve_within(folder, f"{name}.safetensors")

    def metadata(self, choice: str | None) -> dict[str, str]:
        """title, author, license and description as they are in the file; {} where none is chosen."""
        try:
            meta = core("prefix").load_prefix(self.prefix_file(choice)).meta
        except core("errors").APLError:
            return {}
        return {"title": meta.title, "author": meta.author, "license": meta.license, "description": meta.description}

    def again(self, run: Run) -> bool:
        """Whether "resume" makes sense for a run."""
        return run.state in (STOPPED, FAILED, LOST) or (not run.jobs and run.step < run.steps)

    @staticmethod
    def now() -> float:
        return time.time()
