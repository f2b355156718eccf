"""One evaluation at work: its settings, models, measuring models, runner and camera, shared by all tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import shipped
from apl_train.model.backend import Backend
from apl_train.model.precision import chosen
from apl_train.processes import Processes, this_process
from apl_train.scoring.persons import PersonRecord
from apl_train.tables.cells import Runner
from apl_train.tables.instruments import Instruments
from apl_train.tables.looks import Camera
from apl_train.tables.settings import EvaluateSettings, Size


class Evaluation:
    """What tables ask for; models are loaded when they are first needed and one other than the base is kept at a time.

    Args:
        run: folder of the cells, trainings and caches.
        stop: asked between two cells.
        base: a model that is loaded already.
    """

    def __init__(self, settings: EvaluateSettings, run: Path, *, stop: Callable[[], bool] | None = None,
                 quiet: bool = False, base: Backend | None = None, processes: Processes | None = None) -> None:
        self.settings, self.run = settings, run
        self.processes = processes or this_process()
        self.runner = Runner(run / "cells", processes=self.processes, stop=stop, quiet=quiet)
        self._base, self._other = base, ("", None)

    @property
    def cache(self) -> Path:
        """Latents, captions and target banks of trainings."""
        return self.run / "cache"

    @cached_property
    def base(self) -> Backend:
        """The model that prefixes are learned on."""
        return self._base or self._load(self.settings.checkpoint)

    def backend(self, checkpoint: str) -> Backend:
        """A model of Table 1. Raises ModelError, ConfigError."""
        if checkpoint == self.settings.checkpoint:
            return self.base
        if self._other[0] != checkpoint:
            self._other = ("", None)  # first let go of the one before: two of full size may not fit
            self._other = (checkpoint, self._load(checkpoint))
        return self._other[1]

    def _load(self, checkpoint: str) -> Backend:
        asked = chosen(self.settings.device, self.settings.dtype)
        return Backend.load(shipped.locate("base_model", checkpoint),
                            device=self.processes.own_device() or asked.device, dtype=asked.dtype)

    @cached_property
    def tools(self) -> Instruments:
        return Instruments(self.settings, self.base if self.settings.checkpoint == shipped.MINIATURE else None)

    @cached_property
    def camera(self) -> Camera:
        return Camera(self.settings, self.tools, self.runner)

    @cached_property
    def prompt(self) -> AnonymizationPrompt:
        """The prefix that is measured."""
        return load_prefix(shipped.prefix_file(self.settings.prefix))

    @property
    def prefix_words(self) -> str:
        p = self.prompt
        return f"{p.name}, m {p.num_tokens}, alpha {p.meta.alpha}, {p.meta.steps} steps; {p.content_hash[:12]}"

    def groups(self, size: Size) -> dict[str, tuple[PersonRecord, ...]]:
        """The first persons of every split that has some."""
        found = {split: self.tools.people.of_split(split, size.persons) for split in size.splits}
        return {split: group for split, group in found.items() if group}

    def conventions(self, size: Size, groups: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Of the instruments, and how much was taken."""
        base = self.base
        return {**self.tools.conventions(), "model": f"{base.name}; sha256 {base.sha256[:12]}",
                "n": {split: {"persons": len(group), "pictures_each": size.seeds} for split, group in groups.items()},
                **more}
