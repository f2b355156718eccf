"""`apl make`: from a checkpoint to an installed prefix in one go: generate, validate, cache, train, score, install.

Step checkpoint -> prefix in use. Every stage is one that has a command of its own; what they leave in the run folder
is looked for before they start, so the same command goes on wherever it was interrupted. `make.json` keeps the plan.
Under `accelerate launch` pictures, training and scores are divided; the first process decides, writes and talks.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apl_core.atomic import write_json, write_text
from apl_core.errors import APLError, ConfigError, DatasetError
from apl_core.identity import FaceEmbedder, load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix
from apl_core.sharing import use
from apl_train import shipped
from apl_train.datasets.cast import PUBLIC, CastMember, neutral_prompts, read_cast, table_of
from apl_train.datasets.generate import Drawing, Outcome, Studio, Wanted, wanted_of_cast, wanted_of_prompts
from apl_train.datasets.validate import validate
from apl_train.make import plan as plans
from apl_train.make.assessment import Assessment, next_steps
from apl_train.make.settings import MakeSettings
from apl_train.model.backend import Backend
from apl_train.processes import this_process
from apl_train.report.table import score_table
from apl_train.scoring.command import attribute_reader
from apl_train.scoring.compare import write_pairs
from apl_train.scoring.persons import read_evaluation_set
from apl_train.training.command import ctrl_c, load_training_set, resume, train
from apl_train.training.events import EventLog
from apl_train.training.memory import estimate
from apl_train.training.preflight import dry_run

PLAN = "make.json"
_log = logging.getLogger("apl.make")
Say = Callable[[str], None]


class Making:
    """One `apl make` in one run folder.

    Args:
        run: its folder; a plan that is there already must be the same.
        settings: as the user gave them; None goes on with the plan of the folder.
        say: told what happens, line by line.

    Raises:
        ConfigError: the folder holds another plan, or the prefix's name is taken where it is to go.
    """

    def __init__(self, run: Path, settings: MakeSettings | None, say: Say) -> None:
        self._processes = this_process()
        self.run, self._say = run, say if self._processes.main else lambda _text: None
        stored = self._processes.once(lambda: read_plan(run))
        if settings is None:
            if stored is None:
                raise ConfigError(f"{run} holds no `apl make`.", "Start one with `apl make --checkpoint MODEL`.",
                                  field="run")
            self.settings = stored
        else:
            self.settings = self._processes.once(  # free memory is a part of it, and differs
                lambda: plans.decided(_continued(settings, stored) if stored else settings))
            if stored is not None and stored != self.settings:
                changed = [f.name for f in dataclasses.fields(MakeSettings)
                           if getattr(stored, f.name) != getattr(self.settings, f.name)]
                raise ConfigError(f"{run} was begun with another {', '.join(changed)}.",
                                  f"Go on with `apl make --run {run} --go-on`, or choose another --run.",
                                  field=changed[0])
        self._is_new = stored is None
        self._small = plans.is_miniature(self.settings.checkpoint)
        """Its world is drawn persons and emoji: other prompts than those of photographs."""
        self.s_id, self.s_reg = (shipped.locate(kind, given) if (given := getattr(self.settings, kind)) else run / kind
                                 for kind in ("s_id", "s_reg"))
        self.config = plans.train_config(self.settings, self.s_id, self.s_reg)
        self.seconds: dict[str, float] = {}
        self._log: EventLog | None = None

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def prefix_path(self) -> Path:
        return self.run / "train" / "prefix" / f"{self.settings.name}.safetensors"

    @property
    def _world(self) -> str:
        return shipped.MINIATURE if self._small else PUBLIC

    def _check_names(self) -> None:
        """A name that is taken is better known now than after hours."""
        for folder in plans.folders(self.settings):
            if self._is_new and (folder / f"{self.settings.name}.safetensors").exists():
                raise ConfigError(f"name is {self.settings.name!r}, and {folder} has a prefix of that name.",
                                  "Choose another one with --name.", field="name")

    def _cast(self) -> list[CastMember]:
        people = read_cast(table_of(self.settings.people))
        seen = [p for p in people if p.split == "train"][: self.settings.limit or None]
        return [*seen, *(p for p in people if p.split != "train")]

    # -- the stages ----------------------------------------------------------------------------------------------

    def plan(self, *, only: bool = False) -> dict[str, Any]:
        """Loads the model, measures one step, says what will be done and how long that takes."""
        self._processes.once(self._check_names)
        source = shipped.locate("base_model", self.settings.checkpoint)
        memory = self._processes.once(lambda: estimate(source, self.config))
        self._say(memory.text())
        if memory.available is not None and memory.peak > memory.available:
            raise ConfigError(f"The preset {self.settings.preset} needs {memory.peak / 2**30:.1f} GiB on "
                              f"{memory.device}, {memory.available / 2**30:.1f} GiB are free.",
                              "Choose the preset sd15-8gb, or free memory.", field="preset")
        began = time.monotonic()
        self.embedder = self._recogniser()
        shared_gpu = self._processes.own_device() if self.config.device in ("auto", "cuda") else None
        self.backend = Backend.for_settings(source, self.config, device=shared_gpu)
        measured = dry_run(self.backend, self.config)
        table = plans.lines(self.settings, measured, self.config)
        self._say(plans.text(self.settings, table, self.run, measured))
        self.seconds["load"] = time.monotonic() - began
        found = plans.to_dict(self.settings, table) | {"memory": memory.to_dict(), "measured": measured.to_dict()}
        if not only and self._processes.main:
            write_json(self.run / PLAN, found)
            self._log = EventLog(self.run)
        return found

    def _recogniser(self) -> FaceEmbedder | None:
        if self.settings.recogniser == "none":
            return None
        return load_embedder(shipped.recogniser(self.settings.recogniser))

    def generate(self) -> None:
        """S_ID and S_Reg, unless finished ones were given."""
        if not self.settings.s_id:
            wanted = wanted_of_cast(self._cast(), self.settings.each)
            self._say(self._draw(self.s_id, wanted, "persons").text("S_ID"))
        if not self.settings.s_reg:
            wanted = wanted_of_prompts(neutral_prompts("train", self._world), self.settings.neutral)
            self._say(self._draw(self.s_reg, wanted, "neutral").text("S_Reg"))

    def _draw(self, folder: Path, wanted: list[Wanted], what: str) -> Outcome:
        drawing = Drawing(self.settings.draw_steps, self.settings.guidance, self.settings.seed,
                          batch=16 if self.backend.size <= 128 else 4)
        with tqdm(total=len(wanted), desc=f"draw {what}", unit="picture", dynamic_ncols=True,
                  disable=not self._processes.main) as bar, ctrl_c() as asked:
            def tell(done: int, total: int) -> None:
                bar.update(done - bar.n)
                self._tell("progress", stage="generate", what=what, done=done, total=total)

            return Studio(self.backend, folder, drawing, embedder=self.embedder, progress=tell,
                          stop=asked.is_set).fill(wanted)

    def validate(self) -> None:
        """Raises DatasetError for whatever a training would stop at."""
        verdict = validate(self.s_id, self.s_reg, num_tokens=self.config.num_tokens,
                           tokenize=self.backend.text.tokenize, size=self.backend.size,
                           people=table_of(self.settings.people))
        self._say(verdict.text(10))
        if verdict.errors:
            raise DatasetError(f"The sets have {verdict.errors} errors.",
                               f"See them all with `apl validate --s_id {self.s_id} --s_reg {self.s_reg}`.",
                               field="s_id")

    def cache(self) -> None:
        """Latents and text states, which the training would make otherwise."""
        with ctrl_c() as asked:
            load_training_set(self.backend, self.config, self.run / "cache", stop=asked.is_set)

    def train(self) -> AnonymizationPrompt:
        """The prefix: trained, trained on, or already there."""
        folder, kept = self.run / "train", {"backend": self.backend, "cache": self.run / "cache"}
        done, begun = self._processes.once(lambda: (self.prefix_path.exists(), (folder / "config.yaml").exists()))
        if done:
            return load_prefix(self.prefix_path)
        if begun:
            return resume(folder, **kept)
        return train(folder, self.config, **kept)

    def score(self, prompt: AnonymizationPrompt) -> dict[str, Any] | None:
        """scores.json and report.html; without a recogniser pictures alone."""
        commands = next_steps(self.prefix_path, self.settings.checkpoint)
        if self.embedder is None:
            test = [p.name for p in self._cast() if p.split == "test"][:4]
            files = self._processes.once(lambda: write_pairs(
                [f"A close-up portrait of {name}" for name in test], str(self.prefix_path), self.settings.checkpoint,
                [1, 2, 3, 4], steps=20, guidance=self.settings.guidance, out=self.run / "pictures"))
            self._say(f"not scored: no recogniser is installed. Look at {len(files)} pictures in "
                      f"{self.run / 'pictures'} (upper row without, lower row with the prefix).")
            return None
        if self._processes.once((self.run / "scores.json").exists):
            return json.loads((self.run / "scores.json").read_text(encoding="utf-8"))
        people = read_evaluation_set(self._persons())
        against = "" if self.settings.persons else ", scored against the model's own pictures of each person"
        return Assessment(
            self.run / "train", self.run, self.backend, prompt, people, self.embedder,
            attribute_reader(self.settings.recogniser), self.run / "cache", self.settings.score_persons,
            self.settings.score_seeds, guidance=self.settings.guidance,
            title=f"A prefix for {self.backend.name}{against}", commands=commands,
            miniature=self._small, seconds=self.seconds).measure()

    def _persons(self) -> Path:
        """The folder to score against; made here, from the base model's own pictures, where none was given."""
        if self.settings.persons:
            return shipped.locate("persons", self.settings.persons)
        folder, limit, cast = self.run / "persons", self.settings.score_persons, self._cast()
        chosen = [p for split in ("train", "test") for p in [p for p in cast if p.split == split][:limit]]
        wanted = [Wanted(f"{p.name}/{k}", p.name, f"A close-up photo of {p.name}", p.description, "id")
                  for p in chosen for k in range(plans.REFERENCES)]
        self._say(self._draw(folder / "references", wanted, "references").text("references (the base model's own)"))
        kept = [p for p in chosen if len(list((folder / "references" / p.name).glob("*.png"))) >= 2]
        self._processes.once(lambda: write_people(
            folder, kept, [(n.prompt, "unnamed_face" if n.kind == "face" else "nonface")
                           for n in neutral_prompts("test", self._world)]))
        return folder

    def install(self) -> list[Path]:
        """The prefix and its levels, where prefixes are looked for."""
        files, targets = [self.prefix_path], plans.folders(self.settings)
        done = use(self.prefix_path, targets, self.settings.name, replace=not self._is_new)
        for level in sorted(self.prefix_path.parent.glob(f"{self.settings.name}.step-*.safetensors")):
            files.append(level)
            for folder in targets:
                save_prefix(load_prefix(level), folder / level.name)
                done.append(folder / level.name)
        return done

    # -- all of it -----------------------------------------------------------------------------------------------

    def _tell(self, event: str, **values: Any) -> None:
        if self._log:
            self._log.write(event, **values)

    def _stage(self, name: str, work: Callable[[], Any]) -> Any:
        self._say(f"== {name}")
        self._tell("stage", stage=name)
        began = time.monotonic()
        try:
            found = work()
        except APLError as error:
            self._tell("error", stage=name, message=str(error))
            raise
        self.seconds.setdefault(name, time.monotonic() - began)
        return found

    def everything(self) -> tuple[dict[str, Any], str]:
        """All stages; returns plain values and what is said at the end. Raises APLError; the same command goes on."""
        self.plan()
        self._stage("generate", self.generate)
        self._stage("validate", self.validate)
        self._stage("cache", self.cache)
        prompt = self._stage("train", self.train)
        scores = self._stage("score", lambda: self.score(prompt))
        files = self._stage("install", lambda: self._processes.once(self.install))
        self._tell("done", files=[str(f) for f in files], content_hash=prompt.content_hash)
        result = {"prefix": str(self.prefix_path), "content_hash": prompt.content_hash,
                  "installed": [str(f) for f in files], "scores": scores,
                  "report": str(self.run / "report.html") if scores else None,
                  "seconds": {k: round(v, 1) for k, v in self.seconds.items()}}
        return result, self._last_words(scores, files)

    def _last_words(self, scores: dict[str, Any] | None, files: list[Path]) -> str:
        report = f"report:    {self.run / 'report.html'}   (open it in a browser)"
        lines = [score_table(scores), report] if scores else []
        lines += [f"prefix:    {self.prefix_path}", *(f"installed: {f}" for f in files if ".step-" not in f.name)]
        took = ", ".join(f"{k} {plans.words(v)}" for k, v in self.seconds.items() if v >= 1)
        lines += [f"time:      {took}", "", "next:"]
        return "\n".join([*lines, *(f"  {command}\n      {what}" for what, command in
                                    next_steps(self.prefix_path, self.settings.checkpoint))])


def _continued(settings: MakeSettings, stored: MakeSettings) -> MakeSettings:
    """The settings with what was left to be decided as the folder's plan decided it: free memory may differ today."""
    defaults = {f.name: f.default for f in dataclasses.fields(MakeSettings)}
    return dataclasses.replace(settings, **{name: getattr(stored, name) for name, value in defaults.items()
                                            if getattr(settings, name) == value})


def read_plan(run: Path) -> MakeSettings | None:
    """The settings that a run folder was begun with; None where there are none. Raises ConfigError."""
    path = run / PLAN
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return MakeSettings(**values | {"host": tuple(values["host"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}.", "Choose another --run, or delete this one.",
                          field="run") from error


def write_people(folder: Path, people: list[CastMember], neutral: list[tuple[str, str]]) -> None:
    """people.csv and neutral.csv of an evaluation set (see `persons`). Raises StorageError."""
    import csv
    import io

    for name, heading, rows in (
        ("people.csv", ("name", "split", "description", "attributes"),
         [(p.name, p.split, p.description,
           json.dumps({k: v for k, v in (("gender", p.gender), ("race", p.race)) if v})) for p in people]),
        ("neutral.csv", ("prompt", "kind"), neutral),
    ):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(heading)
        writer.writerows(rows)
        write_text(folder / name, out.getvalue())
