"""The training loop: equations 2-7 with one learnable tensor per text encoder, resumable bit for bit.

Bit for bit on a CPU with one thread: several add up in an order of their own, some 1e-8 apart from run to run.

Everything but the prefix is frozen. The loop talks through events, obeys a `stop` callable (Ctrl-C, a user interface)
and leaves after every save a folder from which `resume` goes on. Under `accelerate launch` the rows of a batch are
divided among the processes and one sum of gradients a step brings them together; the first process writes.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apl_core.atomic import write_text
from apl_core.errors import ConfigError, StorageError, TrainingError, TrainingStopped
from apl_core.library import safe_name
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix
from apl_train.model.backend import Backend
from apl_train.processes import Processes, ProcessLost, this_process
from apl_train.seeds import seed_of
from apl_train.training.bank import Batch, FreshTargets, TargetBank, Targets, draw_scales
from apl_train.training.config import TrainConfig, from_dict
from apl_train.training.events import EventLog
from apl_train.training.losses import apl_loss, guided_alpha, id_loss, reg_loss, released_loss
from apl_train.training.samples import TrainingSet
from apl_train.training.state import TrainState, load_state, save_state
from apl_train.training.surface import disturb

Listener = Callable[[dict[str, Any]], None]


def initial_vectors(backend: Backend, config: TrainConfig) -> dict[str, Tensor]:
    """[AP] = [V_1]...[V_m] before training (equation 2), on the token manifold: float32 [m, width] for each encoder.

    "vocabulary": embeddings of m random whole words; "text": embeddings of the tokens of `init_text`, repeated to m;
    "uniform": numbers from 0 to 1, as the released code starts, far off the manifold.
    """
    g = torch.Generator().manual_seed(seed_of("apl-init", config.seed))
    if config.init == "uniform":
        return {key: torch.rand(config.num_tokens, width, generator=g) for key, width in backend.text.widths.items()}
    if config.init == "text":
        tokens = backend.text.tokenize(config.init_text)
        if not tokens:
            raise ConfigError("init_text has no token.", "Write a few words.", field="init_text")
        ids = (tokens * config.num_tokens)[: config.num_tokens]
    else:
        # 512.. are the merged words of CLIP's vocabulary; before them stand single bytes, after them BOS and EOS
        ids = torch.randint(512, 49406, (config.num_tokens,), generator=g).tolist()
    # on the CPU wherever the model is: state files, sums over processes and the optimizer's moments are there
    return {key: backend.text.embedding_table(key)[ids].detach().to("cpu", torch.float32, copy=True)
            for key in backend.text.widths}


@dataclass(frozen=True)
class Course:
    """One base model with the sets as it sees them, and the targets it gives."""

    backend: Backend
    data: TrainingSet
    targets: Targets


class Trainer:
    """One training in one run folder. Raises ConfigError for settings that do not fit the data or the model.

    second: another base model with its sets; odd steps then learn on it (field study, section 8: joint training).
    """

    def __init__(self, backend: Backend, data: TrainingSet, config: TrainConfig, run: Path, *,
                 cache: Path | None = None, listener: Listener | None = None, stop: Callable[[], bool] | None = None,
                 progress: Callable[[int, int], None] | None = None, processes: Processes | None = None,
                 second: tuple[Backend, TrainingSet] | None = None) -> None:
        safe_name(config.name)
        self.backend, self.data, self.config, self.run = backend, data, config, run
        self.processes = processes or this_process()
        if config.batch_size < self.processes.count:
            raise ConfigError(f"batch_size is {config.batch_size}, for {self.processes.count} processes.",
                              f"Set batch_size to {self.processes.count} or a multiple: it is that of all together.",
                              field="batch_size")
        self._listener, self._stop, self._asked = listener, stop or (lambda: False), False
        if second and second[0].text.widths != backend.text.widths:
            raise ConfigError(f"second_model has text widths {second[0].text.widths}, not {backend.text.widths}.",
                              "Use two models of one family.", field="second_model")

        def course(backend: Backend, data: TrainingSet) -> Course:
            return Course(backend, data, TargetBank(
                backend, data, config, cache or run / "cache", progress=progress, stop=stop, processes=self.processes)
                if config.bank else FreshTargets(backend, data, config, processes=self.processes))

        self._courses = [course(backend, data), *([course(*second)] if second else [])]
        self._log = EventLog(run)
        self.hashes = {"model": backend.sha256, "data": data.sha256}
        if second:
            self.hashes["second_model"] = second[0].sha256
        self.step = 0
        self.vectors = {k: torch.nn.Parameter(v) for k, v in initial_vectors(backend, config).items()}
        self.optimizer = torch.optim.Adam(self.vectors.values(), lr=config.learning_rate)

    # -- state ----------------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for key, vector in self.vectors.items():
            moments = self.optimizer.state.get(vector, {})
            tensors[f"vectors.{key}"] = vector.detach().clone()
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{key}"] = moments.get(name, torch.zeros_like(vector)).detach().clone()
        return tensors

    def save(self) -> None:
        """Writes the state that `restore` reads. Raises StorageError; the state before it stays."""
        if not self.processes.main:
            return
        save_state(self.run, TrainState(self._tensors(), self.step, self.config.to_dict(), self.hashes))

    def restore(self, *, allow_changed: bool = False) -> None:
        """Goes back to the newest whole state of the run folder.

        Raises:
            TrainingError: there is no state, or the model or the data changed since (and `allow_changed` is not set).
        """
        state = self.processes.once(lambda: load_state(self.run))
        for what, then in state.hashes.items():
            if self.hashes.get(what) != then and not allow_changed:
                raise TrainingError(f"The {what} changed since this training was saved at step {state.step}.",
                                    "Bring back the old one, or pass --allow-changed to go on regardless.", field=what)
        self.step = state.step
        for key, vector in self.vectors.items():
            with torch.no_grad():
                vector.copy_(state.tensors[f"vectors.{key}"])
            self.optimizer.state[vector] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"exp_avg.{key}"].clone(),
                "exp_avg_sq": state.tensors[f"exp_avg_sq.{key}"].clone(),
            }
        if self.processes.main:
            self._log.cut(self.step)

    def prompt(self, level: int | None = None) -> AnonymizationPrompt:
        """The vectors as they are now, with what a reader of the file needs to know."""
        c = self.config
        meta = PrefixMetadata(
            title=c.name, family=self.backend.family, num_tokens=c.num_tokens, alpha=c.alpha,
            base_model=self.backend.name, base_model_sha256=self.backend.sha256, steps=c.steps, level=level,
            seed=c.seed, dataset_sha256=self.data.sha256, date=time.strftime("%Y-%m-%d"), placement=c.placement,
            extra={"apl.second_model_sha256": self.hashes["second_model"]} if len(self._courses) > 1 else {},
            description="Anonymization Prompt Learning: reduces recognisable likeness of named persons in tested "
                        "prompts.",
        )
        tensors = {k: v.detach().clone() for k, v in self.vectors.items()}
        return AnonymizationPrompt(self.backend.family, tensors, meta)

    def _save_level(self) -> None:
        if not self.processes.main:
            return
        path = self.run / "prefix" / f"{self.config.name}.step-{self.step}.safetensors"
        save_prefix(self.prompt(self.step), path)
        self._tell("level", step=self.step, path=str(path.relative_to(self.run)))

    def _tell(self, event: str, **values: Any) -> None:
        if not self.processes.main:
            return
        row = self._log.write(event, **values)
        if self._listener:
            self._listener(row)

    # -- the loop -------------------------------------------------------------------------------------------------

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        c = self.config
        rise = min(1.0, (step + 1) / c.warmup) if c.warmup else 1.0
        fall = 0.5 + 0.5 * math.cos(math.pi * step / c.steps) if c.schedule == "cosine" else 1.0
        return c.learning_rate * rise * fall

    def _places(self, batch: Batch) -> list[int]:
        """Where this process's S_ID rows stand in the batch of all: what is drawn for a row does not depend on who
        computes it."""
        return list(self.processes.share(range(batch.total)))[: batch.n_id]

    def _prompts(self, data: TrainingSet, batch: Batch) -> list[str]:
        """c1 of the batch's rows, with some names written in another way where the settings say so."""
        c, rows = self.config, batch.rows.tolist()
        prompts = [data.c1[r] for r in rows]
        if c.name_noise:
            for i, place in enumerate(self._places(batch)):
                rng = random.Random(seed_of("apl-names", c.seed, self.step, place))
                if data.kinds[rows[i]] == "id" and rng.random() < c.name_noise:
                    prompts[i] = disturb(prompts[i], data.names[rows[i]], rng)
        return prompts

    def _alpha(self, batch: Batch) -> float | Tensor:
        """alpha of equation 5: one number, or one for each S_ID row where some are judged under guidance."""
        c = self.config
        if not c.guided_share:
            return c.alpha
        return guided_alpha(c.alpha, draw_scales(c, self.step, batch.total)[self._places(batch)])

    def one_step(self) -> dict[str, float | None]:
        """One optimizer step (equations 3, 5-7). Returns l_id, l_reg (None where the batch has no such row) and loss.

        Raises:
            TrainingError: loss or gradient are not finite; vectors and optimizer are left as they were.
            ProcessLost: another process ended; the same.
        """
        course = self._courses[self.step % len(self._courses)]
        batch = course.targets.batch(self.step)
        states = course.backend.encode(self._prompts(course.data, batch), self.vectors,
                                       position=self.config.placement, overflow="trim")
        eps = course.backend.predict(batch.x_t, batch.t, states).to(batch.eps_c1.device)
        n = batch.n_id
        if self.config.loss == "released":
            l_id, l_reg = (released_loss(eps[rows], batch.eps_c2[rows], self.config.alpha)
                           for rows in (slice(n), slice(n, None)))
        else:
            l_id = id_loss(eps[:n], batch.eps_c1[:n], batch.eps_c2[:n], self._alpha(batch))
            l_reg = reg_loss(eps[n:], batch.eps_c1[n:])
        # this process's part of the mean over the whole batch
        loss = apl_loss(l_id, l_reg, self.config.reg_weight) * (len(batch.rows) / batch.total)
        self.optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()
        seen = self._together(l_id.detach(), l_reg.detach(), loss.detach())
        if not math.isfinite(seen["loss"]):
            raise TrainingError(f"The loss is {seen['loss']} at step {self.step}.",
                                "The last saved state is kept; resume with a lower learning_rate.", field="loss")
        if not all(bool(torch.isfinite(v.grad).all()) for v in self.vectors.values()):
            raise TrainingError(f"The gradient is not finite at step {self.step}.",
                                "The last saved state is kept; resume with a lower learning_rate, or train in bf16 or "
                                "fp32.", field="loss")
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.step += 1
        return seen

    def _together(self, l_id: Tensor, l_reg: Tensor, loss: Tensor) -> dict[str, Any]:
        """The losses over all processes; their gradients and wishes to stop are brought together in one exchange."""
        if self.processes.count == 1:
            return {"l_id": float(l_id.mean()) if len(l_id) else None,
                    "l_reg": float(l_reg.mean()) if len(l_reg) else None, "loss": float(loss)}
        grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in self.vectors.values()]
        own = torch.tensor([float(l_id.sum()), len(l_id), float(l_reg.sum()), len(l_reg), float(loss),
                            float(self._stop())], dtype=torch.float64)
        whole = self.processes.total(torch.cat([*(g.flatten().double() for g in grads), own]))
        parts = whole[: -len(own)].split([g.numel() for g in grads])
        for vector, part in zip(self.vectors.values(), parts, strict=True):
            vector.grad = part.reshape(vector.shape).to(vector.dtype)
        id_sum, id_count, reg_sum, reg_count, loss_sum, asked = whole[-len(own):].tolist()
        self._asked = asked > 0
        return {"l_id": id_sum / id_count if id_count else None, "l_reg": reg_sum / reg_count if reg_count else None,
                "loss": loss_sum}

    def _stopping(self) -> bool:
        """Whether to stop after this step: several processes do so together, or the others would wait for ever."""
        return self._stop() if self.processes.count == 1 else self._asked

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Failures of the loop become events, and their messages say how to go on."""
        way_on = f"Go on with `apl resume {self.run}`."
        try:
            yield
        except TrainingStopped:
            self._tell("stopped", step=self.step)
            raise
        except ProcessLost as error:
            with contextlib.suppress(StorageError):
                self.save()
                self._tell("error", step=self.step, message=str(error))
            raise TrainingError(f"At step {self.step}: {error.message}", f"{error.hint} {way_on}",
                                field="processes") from error
        except TrainingError as error:
            self._tell("error", step=self.step, message=str(error))
            raise
        except StorageError as error:
            with contextlib.suppress(StorageError):
                self._tell("error", step=self.step, message=str(error))
            raise StorageError(f"At step {self.step}: {error.message}", f"{error.hint} Then: {way_on}",
                               field=error.field) from error
        except torch.cuda.OutOfMemoryError as error:
            raise TrainingError(f"The device ran out of memory at step {self.step}.",
                                f"Lower batch_size, or use the preset for 8 GB. What was saved is kept. {way_on}",
                                field="batch_size") from error

    def fit(self) -> AnonymizationPrompt:
        """Runs to the end, saving states and levels on the way; returns the prefix, which is also in `<run>/prefix/`.

        Raises:
            TrainingStopped: `stop()` said so; the state is saved.
            TrainingError: NaN loss, a lost process; StorageError: a full disk. The last good state is kept.
        """
        with self._told():
            return self._fit()

    def _fit(self) -> AnonymizationPrompt:
        c = self.config
        if self.step == 0:
            self.save()
        self._tell("start", step=self.step, steps=c.steps, model=self.backend.name, persons=self.data.persons)
        began, first = time.monotonic(), self.step
        while self.step < c.steps:
            losses = self.one_step()
            pace = (self.step - first) / max(time.monotonic() - began, 1e-9)
            self._tell("step", step=self.step, **losses, steps_per_s=round(pace, 4))
            if c.levels_every and self.step % c.levels_every == 0 and self.step < c.steps:
                self._save_level()
            if self.step % c.save_every == 0 or self.step == c.steps:
                self.save()
            if self._stopping() and self.step < c.steps:
                self.save()
                raise TrainingStopped(
                    f"Stopped at step {self.step} of {c.steps}; everything is saved in {self.run}.",
                    f"Go on with `apl resume {self.run}`.",
                )
        prompt = self.prompt()
        path = self.run / "prefix" / f"{c.name}.safetensors"
        if self.processes.main:
            save_prefix(prompt, path)
        self._tell("done", step=self.step, path=str(path.relative_to(self.run)), content_hash=prompt.content_hash)
        return prompt


def write_config(run: Path, config: TrainConfig) -> None:
    """The effective settings beside what they made: `<run>/config.yaml`."""
    import yaml

    write_text(run / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))


def read_config(run: Path) -> TrainConfig:
    """The settings of a run folder. Raises ConfigError."""
    from apl_train.training.config import read_yaml

    return from_dict(read_yaml(run / "config.yaml"), origin=str(run / "config.yaml"))
