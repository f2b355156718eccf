"""`apl train` and `apl resume`: settings to a run folder, with a progress bar, Ctrl-C that saves, and the loop between.

A run folder holds config.yaml, events.jsonl, state/ (what resume needs) and prefix/ (the levels and the final file).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apl_core.errors import ConfigError, DatasetError
from apl_core.placement import capacity
from apl_core.prefix import AnonymizationPrompt
from apl_train import shipped
from apl_train.datasets.dataset import Dataset, problems, read_dataset
from apl_train.model.backend import Backend
from apl_train.processes import ProcessLost, this_process
from apl_train.training.config import TrainConfig
from apl_train.training.control import obeying
from apl_train.training.events import EventLog
from apl_train.training.previews import beside
from apl_train.training.pseudo_cache import pseudo_folder
from apl_train.training.pseudo_identity import add_words, read_words
from apl_train.training.samples import TrainingSet
from apl_train.training.state import has_state, only_one
from apl_train.training.trainer import Trainer, read_config, write_config


class _Bars:
    """One tqdm bar after another, from callbacks with (done, total)."""

    def __init__(self) -> None:
        self._name, self._bar = "", None

    def of(self, name: str, unit: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            if self._name != name:
                self.close()
                self._name = name
                self._bar = tqdm(total=total, desc=name, unit=unit, leave=False, disable=not this_process().main)
            self._bar.update(done - self._bar.n)

        return tell

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._name, self._bar = "", None


def load_training_set(backend: Backend, config: TrainConfig, cache: Path, *, pseudo_from: Path | None = None,
                      stop: Callable[[], bool] | None = None) -> TrainingSet:
    """S_ID and S_Reg of the settings, with latents and text states cached.

    pseudo_from: folder of the pseudo-identities; by default the one that the settings name, or the one made for them.

    Raises:
        DatasetError: naming the row. TrainingStopped: `stop()` said so; what was computed until then is kept.
    """
    s_id = _checked(shipped.locate("s_id", config.s_id), "id", backend, config)
    s_reg = None if config.no_reg else _checked(shipped.locate("s_reg", config.s_reg), "reg", backend, config)
    pseudo, bars = None, _Bars()
    try:
        folder = pseudo_from or pseudo_folder(backend, config, cache, stop=stop,
                                              progress=bars.of("pseudo-identities", "step"))
        if folder is not None:
            add_words(backend.text, read_words(folder))
            pseudo = _checked(folder, "id", backend, config)
        return TrainingSet(backend, s_id, s_reg, cache, persons=config.persons, stop=stop, pseudo=pseudo,
                           progress=bars.of("latents", "picture"), caption_progress=bars.of("captions", "text"))
    finally:
        bars.close()


def _checked(folder: Path, expect: str, backend: Backend, config: TrainConfig) -> Dataset:
    """The dataset, once nothing is wrong with its table. Raises DatasetError with everything that is."""
    room = capacity(config.num_tokens)
    wrong = problems(folder, expect, encoder_room=lambda text: room - len(backend.text.tokenize(text)),
                     check_images=False)
    if wrong:
        shown = "\n".join(f"  {p}" for p in wrong[:10]) + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise DatasetError(f"{folder} has {len(wrong)} problem(s):\n{shown}",
                           "Mend them and start again; nothing was trained.", field=wrong[0].column)
    return read_dataset(folder, expect=expect)


class Bar:
    """The tqdm bar of a training: L_ID, L_Reg, steps a second and time left, from the trainer's events."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, desc="train", unit="step", dynamic_ncols=True)
        self._means: dict[str, float] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._bar.update(event["step"] - self._bar.n)
            self._bar.start_t, self._bar.initial = self._bar._time(), event["step"]
        elif event["event"] == "step":
            for key in ("l_id", "l_reg"):
                if event[key] is not None:
                    self._means[key] = 0.95 * self._means.get(key, event[key]) + 0.05 * event[key]
            self._bar.set_postfix({k: f"{v:.5f}" for k, v in self._means.items()}, refresh=False)
            self._bar.update(event["step"] - self._bar.n)
        elif event["event"] == "level":
            self._bar.write(f"saved level {event['path']}", file=sys.stderr)  # standard output is for --json

    def close(self) -> None:
        self._bar.close()


@contextlib.contextmanager
def ctrl_c(*, patient: bool = False) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM, or a closed terminal) asks the training to save and stop; a second one ends the
    process at once.

    patient: every further signal asks too. `accelerate launch` passes on the Ctrl-C that the terminal already sent.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number: int, _frame: Any) -> None:
        if asked.is_set() and not patient:
            signal.default_int_handler(number, _frame)
        asked.set()

    wanted = [signal.SIGINT, signal.SIGTERM]
    # a process that was told to outlive its terminal (nohup) goes on doing so
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {s: signal.signal(s, handle) for s in wanted}
    try:
        yield asked
    except ProcessLost:
        # the launcher ends what is left of a command of which one process is gone: let this one say why first
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for s, old in before.items():
            signal.signal(s, old)


def _fit(run: Path, config: TrainConfig, backend: Backend | None, *, resume: bool, allow_changed: bool,
         cache: Path | None) -> AnonymizationPrompt:
    cache, processes = cache or run.parent / "cache", this_process()
    with contextlib.ExitStack() as stack:
        processes.once(lambda: stack.enter_context(only_one(run)))
        asked = stack.enter_context(ctrl_c(patient=processes.count > 1))
        shared_gpu = processes.own_device() if config.device in ("auto", "cuda") else None
        backend = backend or Backend.for_settings(shipped.locate("base_model", config.base_model), config,
                                                  device=shared_gpu)
        data = load_training_set(backend, config, cache, stop=asked.is_set)
        second = None
        if config.second_model:
            other = Backend.for_settings(shipped.locate("base_model", config.second_model), config, device=shared_gpu)
            # the words of the first model: both see the same captions
            second = other, load_training_set(other, config, cache, stop=asked.is_set,
                                              pseudo_from=pseudo_folder(backend, config, cache))
        bars = _Bars()
        stack.callback(bars.close)
        bar = Bar(config.steps) if processes.main else None
        if bar:
            stack.callback(bar.close)
        tell = beside(bar, backend, config, run, lambda: trainer.prompt(0)) if bar else None
        stop = obeying(asked.is_set, EventLog(run).write) if bar else asked.is_set
        trainer = Trainer(backend, data, config, run, cache=cache, listener=tell, stop=stop,
                          progress=bars.of("targets", "target"), second=second)
        bars.close()
        if resume and processes.once(lambda: has_state(run)):
            trainer.restore(allow_changed=allow_changed)
        return trainer.fit()


def train(
    run: Path, config: TrainConfig, *, backend: Backend | None = None, cache: Path | None = None
) -> AnonymizationPrompt:
    """A new training in the folder `run`; one that ended before its first step, as over a wrong dataset, may be there.

    Raises:
        ConfigError: the folder already holds a training.
        TrainingStopped: Ctrl-C; everything is saved.
    """
    def begin() -> None:
        if has_state(run) or (run / "prefix").exists():
            raise ConfigError(f"{run} already holds a training.",
                              f"Go on with `apl resume {run}`, or choose another --run.", field="run")
        write_config(run, config)

    this_process().once(begin)
    return _fit(run, config, backend, resume=False, allow_changed=False, cache=cache)


def resume(run: Path, *, allow_changed: bool = False, backend: Backend | None = None,
           cache: Path | None = None) -> AnonymizationPrompt:
    """Goes on with the training of a run folder, bit for bit as if it had not been interrupted (on one thread count).

    Raises:
        ConfigError: there is no training. TrainingError: the model or the data changed since.
    """
    def settings() -> TrainConfig:
        if not (run / "config.yaml").exists():
            raise ConfigError(f"{run} holds no training.", "Start one with `apl train --run FOLDER`.", field="run")
        return read_config(run)

    config = this_process().once(settings)
    return _fit(run, config, backend, resume=True, allow_changed=allow_changed, cache=cache)
