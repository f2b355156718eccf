"""`apl baselines`: every baseline tuned on listed persons, measured on listed and unseen ones beside the prefix.

Results are kept method by method in benchmarks/results/baselines.json, tuning point by tuning point; a second run goes
on where the first one ended. They belong to one model, one set of persons and one plan: with another, all is measured
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apl_core.atomic import write_json
from apl_core.errors import ConfigError
from apl_core.identity import load_embedder
from apl_core.prefix import AnonymizationPrompt, load_prefix
from apl_train import claims, shipped
from apl_train.baselines import BASELINES, Prepared
from apl_train.baselines.measure import Ground, Instruments, ground, measure, score
from apl_train.baselines.tuning import tune
from apl_train.datasets.dataset import read_dataset
from apl_train.model.backend import Backend, Samples
from apl_train.model.edited import Edited
from apl_train.scoring.command import attribute_reader
from apl_train.scoring.persons import EvaluationSet, NeutralPrompt, read_evaluation_set

RESULTS = claims.FILE.parent / "results" / "baselines.json"
VERSION = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        persons, seeds: pictured persons of each group, and pictures of each.
        prompts, prompt_seeds: neutral prompts of each kind, and pictures of each.
        tuning_persons, tuning_seeds, tuning_steps: of the development split: the last of the list.
        tuning_prompts: training captions of each kind that drift is tuned on; no method is told to keep them.
        tuning_impostors: further listed persons, unpictured, whom the threshold of recognition is set with.
    """

    persons: int = 12
    seeds: int = 2
    prompts: int = 6
    prompt_seeds: int = 2
    tuning_persons: int = 12
    tuning_seeds: int = 1
    tuning_steps: int = 10
    tuning_prompts: int = 3
    tuning_impostors: int = 24

    def __post_init__(self) -> None:
        for name, low in (("persons", 2), ("seeds", 1), ("prompts", 1), ("prompt_seeds", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{name} is {value!r}, not a whole number of {low} or more.", f"Raise {name}.",
                                  field=name)


class _Prefixed(Edited):
    """A model whose prompts carry a prefix."""

    def __init__(self, base: Backend, prompt: AnonymizationPrompt) -> None:
        super().__init__(base)
        self._prompt = prompt

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> Samples:
        return super().sample(prompts, seeds, **options | {"vectors": self._prompt})


class Comparison:
    """The miniature model, its persons and instruments, and what is known of every method so far."""

    def __init__(self, plan: Plan, *, cache: Path | None, results: Path, say: Say,
                 backend: Backend | None = None) -> None:
        self.plan, self.say, self._results = plan, say, results
        self.backend = backend or Backend.load(shipped.locate("base_model", shipped.MINIATURE))
        people: EvaluationSet = read_evaluation_set(shipped.locate("persons", shipped.MINIATURE))
        self.prompt = load_prefix(shipped.prefix_file(shipped.PREFIX))
        self.tools = Instruments(people, load_embedder(shipped.recogniser(shipped.MINIATURE)),
                                 attribute_reader(shipped.MINIATURE), cache=cache)
        self.on_list = people.of_split("train")
        most = len(self.on_list) - plan.tuning_persons
        if plan.persons > most:
            raise ConfigError(f"persons is {plan.persons}; {most} are left beside those for tuning.",
                              f"Use {most} or fewer.", field="persons")
        self.listed, self.unseen = self.on_list[: plan.persons], people.of_split("test", plan.persons)
        self.neutral = tuple(n for kind in ("unnamed_face", "nonface") for n in people.of_kind(kind, plan.prompts))
        self.keep, self.tuning_neutral = _captions(plan.tuning_prompts)
        self.setup = {"version": VERSION, "plan": vars(plan) | {}, "model": self.backend.sha256,
                      "recogniser": self.tools.embedder.sha256, "evaluation_set": people.sha256,
                      "steps": self.tools.steps, "guidance": self.tools.guidance,
                      "template": self.tools.template, "sampler": "DDIM", "on_list": len(self.on_list)}
        self.state = self._read()
        self._ground: Ground | None = None
        self._tuning_ground: Ground | None = None

    def _read(self) -> dict[str, Any]:
        """What was measured under the same plan, or tuned under the same one. Raises ConfigError for a damaged file."""
        if self._results.exists():
            try:
                state = json.loads(self._results.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{self._results} is not JSON: {error}", "Remove it; all is measured again.",
                                  field="results") from error
            mine = json.loads(json.dumps(self.setup))
            if state.get("setup") == mine:
                return state
            if _of_tuning(state.get("setup", {})) == _of_tuning(mine):  # the best settings stay the best
                return {"setup": self.setup, "tuning": state.get("tuning", {}), "methods": {}}
        return {"setup": self.setup, "tuning": {}, "methods": {}}

    def _save(self) -> None:
        write_json(self._results, self.state)

    @property
    def base(self) -> Ground:
        """The model's own figures on the persons and prompts of the final measurement."""
        if self._ground is None:
            self._ground = ground(self.backend, self.tools, self.listed, self.unseen, self.neutral, self.plan.seeds,
                                  self.plan.prompt_seeds)
        return self._ground

    def tune(self, name: str) -> tuple[Mapping[str, Any], Prepared | None]:
        """A method's best settings, and its model where it was made just now."""
        method, plan = BASELINES[name], self.plan
        known = self.state["tuning"].get(name, [])
        tools = Instruments(self.tools.people, self.tools.embedder, steps=plan.tuning_steps,
                            guidance=self.tools.guidance, template=self.tools.template, cache=self.tools.cache)
        if self._tuning_ground is None:
            dev = self.on_list[-plan.tuning_persons :]
            self._tuning_ground = ground(self.backend, tools, dev, (), self.tuning_neutral, plan.tuning_seeds,
                                         impostors=self.on_list[: -plan.tuning_persons][-plan.tuning_impostors :])

        def keep_rows(rows: list[dict[str, Any]]) -> None:
            self.state["tuning"][name] = rows
            self._save()
            row = rows[-1]
            self.say(f"{name} {row['settings']}: joint success {row['joint_success']:.3f} - drift {row['drift']:.3f} = "
                     f"{row['objective']:.3f} ({row['seconds']} s to prepare)")

        tuned = tune(self.backend, method, self.on_list, tools, self._tuning_ground, keep=self.keep, known=known,
                     done=keep_rows)
        return tuned.settings, tuned.prepared

    def method(self, name: str, look: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        """One method's figures, measured unless they are known. `look` is handed its model."""
        if name in self.state["methods"]:
            return self.state["methods"][name]
        settings, prepared = self.tune(name)
        if prepared is None:
            prepared = BASELINES[name].prepare(self.backend, self.on_list, settings, keep=self.keep)
        try:
            found = measure(self.backend, prepared, self.listed, self.unseen, self.plan.seeds, instruments=self.tools,
                            on_list=self.on_list, base=self.base)
            if look is not None:
                look(name, prepared)
        finally:
            prepared.close()
        method = BASELINES[name]
        facts = {"title": method.title, "paper": method.paper, "changes": method.changes, "settings": dict(settings)}
        return self._keep(name, facts | found)

    def reference(self, name: str, look: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        """The row of the model alone ("base") or of the shipped prefix ("apl")."""
        known = self.state["methods"].get(name)
        if known and known.get("prefix", self.prompt.content_hash) == self.prompt.content_hash:
            return known
        source: Any = self.backend if name == "base" else _Prefixed(self.backend, self.prompt)
        if name == "apl":  # what it shows depends on the prefix, so it must not be cached as the model's own
            source = Prepared("apl", 0.0, {}, self.prompt.content_hash, source)
        found = score(source, "off" if name == "base" else name, self.tools, self.base)
        if look is not None:
            look(name, source)
        facts = {"title": "No method"} if name == "base" else {"title": "APL", "prefix": self.prompt.content_hash}
        return self._keep(name, {"method": name} | facts | found)

    def _keep(self, name: str, found: dict[str, Any]) -> dict[str, Any]:
        self.state["methods"][name] = found
        self.state["threshold"] = self.base.threshold.value
        self._save()
        return found


def _of_tuning(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a setup that tuning depends on."""
    plan = {k: v for k, v in setup.get("plan", {}).items() if k.startswith("tuning_")}
    return {**setup, "plan": plan}


def _captions(held: int) -> tuple[tuple[str, ...], tuple[NeutralPrompt, ...]]:
    """S_Reg's captions for methods to keep, and `held` of each kind that they are not told of."""
    records = read_dataset(shipped.locate("s_reg", shipped.MINIATURE), expect="reg").records
    kinds = {r.c1: "unnamed_face" if r.kind == "face" else "nonface" for r in records}
    tuning = [NeutralPrompt(caption, wanted) for wanted in ("unnamed_face", "nonface")
              for caption in [c for c, kind in kinds.items() if kind == wanted][-held:]]
    own = {n.prompt for n in tuning}
    return tuple(c for c in kinds if c not in own), tuple(tuning)


def settle(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, Sequence[float] | None, int]]:
    """The claims that a complete table decides: how near list methods come on unseen persons, and to APL there."""
    rivals = [row["unseen"] for name, row in methods.items() if name in BASELINES]
    apl = methods["apl"]["unseen"]
    found = {"baselines-joint": (apl["joint_success"] - max(r["joint_success"] for r in rivals), None,
                                 apl["n_images"])}
    faces = [r for r in rivals if r["ratio_to_base"] is not None]  # a method may leave nobody a face
    if faces:
        near = min(faces, key=lambda r: r["ratio_to_base"])
        found["baselines-unseen"] = (near["ratio_to_base"], near["ratio_ci95"], near["n_persons"])
    return found


def table(state: Mapping[str, Any]) -> str:
    """The figures as text: L is for listed persons, U for unseen ones."""
    plan = state["setup"]["plan"]
    lines = [f"{plan['persons']} listed and {plan['persons']} unseen persons, {plan['seeds']} pictures each; drift as "
             "a share of two seeds' distance; tuned on other listed persons",
             f"{'':24}{'ID-ACC L':>9}{'/ base':>8}{'ID-ACC U':>10}{'/ base':>8}{'joint L':>9}{'joint U':>9}"
             f"{'faces U':>9}{'attr U':>8}{'faces ~':>9}{'things ~':>10}{'prepare s':>11}"]

    def cell(value: float | None, width: int) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{width}}"

    for row in state["methods"].values():
        listed, unseen, drift = row["listed"], row["unseen"], row["drift"]
        seconds = row.get("seconds", {}).get("prepare")
        lines.append(
            f"{row['title']:24}{cell(listed['id_acc_mean'], 9)}{cell(listed['ratio_to_base'], 8)}"
            f"{cell(unseen['id_acc_mean'], 10)}{cell(unseen['ratio_to_base'], 8)}{cell(listed['joint_success'], 9)}"
            f"{cell(unseen['joint_success'], 9)}{cell(unseen['face_rate'], 9)}{cell(unseen['attr_acc'], 8)}"
            f"{cell(drift['unnamed_faces']['ratio_to_two_seeds'], 9)}"
            f"{cell(drift['nonfaces']['ratio_to_two_seeds'], 10)}{'' if seconds is None else f'{seconds:11.1f}'}")
        if row.get("settings"):
            lines.append(f"{'':4}{', '.join(f'{k} {v}' for k, v in row['settings'].items())}")
    return "\n".join(lines)
