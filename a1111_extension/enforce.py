"""Enforced mode: what an operator decided, read once, kept against scripts, options, reloads and training.

Highest first: `--apl-policy FILE`, the variable APL_POLICY, `apl_policy.json` beside the WebUI. The policy is
`apl_core.policy`'s, the same as ComfyUI's; where there is one that cannot be kept, the server does not start.
"""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..apl_core.errors import APLError, PolicyError
from ..apl_core.policy import EXIT_CODE, Policy, load_policy, read_policy
from .hooks import Hooks
from .jobs import JOBS, Choice
from .models import SUPPORTED, encoders_of, family_of

LOCKED_OPTIONS = ("disabled_extensions", "disable_all_extensions")
_TRAINING = (
    ("modules.textual_inversion.textual_inversion", ("create_embedding", "train_embedding")),
    ("modules.hypernetworks.hypernetwork", ("create_hypernetwork", "train_hypernetwork")),
    ("modules.hypernetworks.ui", ("create_hypernetwork",)),
    ("modules.api.api", ("create_embedding", "train_embedding", "create_hypernetwork", "train_hypernetwork")),
)
_log = logging.getLogger("apl")


def refuse_to_start(reason: object) -> NoReturn:
    """End the host with the policy's exit code; a message on its console says why."""
    _log.critical("APL: the policy cannot be kept, so this server does not start. %s", reason)
    raise SystemExit(EXIT_CODE)


def find_policy() -> Policy | None:
    """The operator's policy, or None. Raises `ConfigError`."""
    from modules import paths_internal, shared

    given = getattr(shared.cmd_opts, "apl_policy", None)
    if given is not None:
        return load_policy(given)
    return read_policy(fallback=Path(paths_internal.script_path) / "apl_policy.json")


_decided = False


def switch_on(hooks: Hooks) -> None:
    """Read the policy at the first call and do what it says; later calls (Reload UI) only see to the hooks.

    Raises:
        SystemExit: 78, when there is a policy and it cannot be kept.
    """
    global _decided
    try:
        if not _decided:
            policy = find_policy()
            if policy is not None and policy.enforced:
                JOBS.forced.update(_forced(policy))
            JOBS.policy, _decided = policy, True
            _announce(policy)
        if JOBS.enforced:
            lock(hooks)
    except Exception as error:  # whatever it is: a server that was to be enforced must not start without
        refuse_to_start(error)


def _forced(policy: Policy) -> dict[str, Choice]:
    loaded = {family: prefix for family, prefix in policy.load_prefixes().items() if family in SUPPORTED}
    if not loaded:
        raise PolicyError(f"The policy names no prefix for {' or '.join(SUPPORTED)}, the families of this host.",
                          "Add one to embeddings.", field="embeddings")
    return {family: Choice(policy.embeddings[family].path.stem, None, prefix) for family, prefix in loaded.items()}


def _announce(policy: Policy | None) -> None:
    if policy is None:
        return
    if not policy.enforced:
        _log.info("APL policy %s: mode %s, users decide.", policy.source, policy.mode)
        return
    _log.warning("APL enforced mode is on: %s, policy %s (sha256 %s).", ", ".join(
        f"{family} {choice.name}" for family, choice in JOBS.forced.items()), policy.source, policy.sha256)


def lock(hooks: Hooks) -> None:
    """Hooks that keep users from switching the extension off, from training likenesses, and from denied scripts."""
    from modules import options, scripts

    hooks.wrap(options.Options, "__setattr__", _set_option)
    if JOBS.policy is not None and JOBS.policy.lock_training:
        for module_name, names in _TRAINING:
            # The API takes its names from the first two modules when it is imported; both orders are covered.
            if module_name in sys.modules or module_name != "modules.api.api":
                try:
                    module = importlib.import_module(module_name)
                except ImportError:
                    continue
                for name in names:
                    if hasattr(module, name):
                        hooks.wrap(module, name, _no_training)
    if JOBS.policy is not None and JOBS.policy.deny:
        hooks.wrap(scripts.ScriptRunner, "initialize_scripts", _initialize_scripts)


def _set_option(original: Any, options: Any, key: str, value: Any) -> None:
    if key in LOCKED_OPTIONS and JOBS.enforced:
        JOBS.counters["options_refused"] += 1
        # The host takes a RuntimeError for "may not be changed" and answers so.
        raise RuntimeError(f"{key} cannot be changed: the operator of this server enforces an extension.")
    original(options, key, value)


def _no_training(original: Any, *args: Any, **kwargs: Any) -> NoReturn:
    JOBS.counters["refused"] += 1
    raise PolicyError("Training is switched off on this server.", "Train on a machine of your own.",
                      field="lock_training")


def _initialize_scripts(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(runner, *args, **kwargs)
    for held in (runner.scripts, runner.alwayson_scripts, runner.selectable_scripts):
        held[:] = [script for script in held if not _denied(script)]
    return result


def _denied(script: Any) -> bool:
    try:
        title = str(script.title())
    except Exception:  # a script without a title is known by its class alone
        title = ""
    names = (title, type(script).__name__, Path(getattr(script, "filename", "") or "").name)
    return JOBS.policy is not None and any(JOBS.policy.denies(name) for name in names if name)


class SelfTest:
    """What the last self-test found; run whenever a checkpoint was loaded."""

    ok: bool | None = None
    detail = "no checkpoint was loaded yet"

    def run(self, model: Any) -> None:
        """Encode through the host's own path and try what has to fail. Never raises: a failure closes the server."""
        if family_of(model) not in JOBS.forced:
            self.ok, self.detail = None, f"no prefix for {family_of(model)}: unsupported is {JOBS.policy.unsupported}"
            return
        before = dict(JOBS.counters)
        try:
            self.ok, self.detail = True, _self_test(model)
        except Exception as error:  # whatever it is, protection is not shown
            self.ok, self.detail = False, f"{type(error).__name__}: {error}"
            _log.error("APL self-test: %s", self.detail)
        JOBS.counters.clear()  # the test's own rows are no users' rows
        JOBS.counters.update(before)

    def check(self) -> None:
        """Raises `PolicyError` when the last test failed."""
        if self.ok is False:
            raise PolicyError(f"The self-test of the enforced mode failed: {self.detail}.",
                              "Turn off extensions that replace the text encoding and restart.", field="self-test")


def _self_test(model: Any) -> str:
    import torch
    from modules import devices, prompt_parser

    from .encoder import Scope, injection_for, opened

    choice = JOBS.forced[family_of(model)]
    texts = prompt_parser.SdConditioning(["a self-test", "a photo of a person in a garden, " * 25])
    with torch.no_grad(), devices.autocast():
        seen = JOBS.counters["verified_rows"]
        prompt_parser.get_learned_conditioning(model, texts, 1)
        rows = JOBS.counters["verified_rows"] - seen
        least = 4 * len(encoders_of(model))
        if rows < least:
            raise PolicyError(f"{rows} rows were verified, {least} expected.", field="self-test")
        for encoder in encoders_of(model):
            held = Scope(injection_for(choice, encoder))
            bare = [encoder.id_start] + [encoder.id_end] * 76
            try:
                with opened(held):
                    encoder.process_tokens([bare], [[1.0] * 77])
            except APLError:
                continue
            raise PolicyError("A chunk without the prefix was not refused.", field="self-test")
    return f"{rows} rows verified, bare chunks refused"


SELF_TEST = SelfTest()


def on_model_loaded(model: Any) -> None:
    """The host's callback."""
    if JOBS.enforced:
        SELF_TEST.run(model)


def status(hooks: Hooks) -> tuple[int, dict[str, Any]]:
    """The HTTP code (200, or 503 where an enforcing policy is not kept) and the JSON of `GET /apl/v1/status`.

    Never a prompt, never a name of a person.
    """
    policy = JOBS.policy
    body: dict[str, Any] = {
        "mode": policy.mode if policy is not None else "artist",
        "counters": {name: JOBS.counters[name] for name in
                     ("jobs", "encodes", "verified_rows", "refused", "options_refused", "unprotected", "consented")},
        "hooks": {hook.label: "in place" if hook.untouched else "wrapped by another extension"
                  for hook in hooks.placed.values()},
    }
    if policy is not None:
        body["policy"] = {"source": Path(policy.source).name, "sha256": policy.sha256, "negative": policy.negative,
                          "unsupported": policy.unsupported, "lock_training": policy.lock_training}
    ok = bool(hooks.placed)
    if policy is not None and policy.enforced:
        body["embeddings"] = {family: {"file": policy.embeddings[family].path.name,
                                       "sha256": policy.embeddings[family].sha256,
                                       "tokens": choice.prefix.num_tokens} for family, choice in JOBS.forced.items()}
        body["self_test"] = {"ok": SELF_TEST.ok, "detail": SELF_TEST.detail}
        ok = ok and SELF_TEST.ok is not False
    body["ok"] = ok
    return (200 if ok else 503), body
