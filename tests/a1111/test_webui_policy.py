"""Enforced mode on fakes of both shapes: where the policy comes from, what cannot be got round, what ends the start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import make_prefix
from fake_host import Host, SdConditioning, fake_host
from test_webui_jobs import carries

SHAPES = ("a1111", "forge")


def write_policy(folder: Path, name: str = "policy.json", **changes: Any) -> Path:
    """An enforcing policy that pins folder/pinned/house.safetensors."""
    file = folder / "pinned" / "house.safetensors"
    policy = {"mode": "enforced", "embeddings": {"sd1": {"file": str(file), "sha256": hashlib.sha256(
        file.read_bytes()).hexdigest()}}, **changes}
    path = folder / name
    path.write_text(json.dumps(policy), "utf-8")
    return path


@contextmanager
def enforced(shape: str, folder: Path, **changes: Any) -> Iterator[Host]:
    house = make_prefix(folder / "pinned", "house", seed=5)
    make_prefix(folder / "prefixes")
    with fake_host(shape, folder, cmd={"apl_policy": str(write_policy(folder, **changes))}) as host:
        host.house = house.vectors()
        model = host.use(host.encoder())
        host.callbacks.fire("on_model_loaded", model)
        yield host


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("args", [
    (), (False,), (None,), ({"enabled": False},), ({"enabled": True, "prefix": "test"},), ("nonsense", 3, []),
    ({"unknown": 1},), (False, "../../x", "y"),
], ids=str)
def test_arguments_change_nothing(shape: str, args: tuple, tmp_path: Path) -> None:
    with enforced(shape, tmp_path) as host:
        p = host.job("a man", args=args)
        assert carries(p.c[0][0], host.house)
        assert p.extra_generation_params["APL"].startswith("house [")
        assert not carries(p.uc[0][0], host.house)


@pytest.mark.parametrize("shape", SHAPES)
def test_whatever_is_encoded_carries_it(shape: str, tmp_path: Path) -> None:
    with enforced(shape, tmp_path) as host:
        inner = []
        host.job("a man", scripts=False, inside=lambda: inner.append(host.job("a face", scripts=False)))
        assert carries(inner[0].c[0][0], host.house)
        model = host.modules["modules.sd_models"].model_data.sd_model
        assert carries(model.get_learned_conditioning(["a man"])[0], host.house)
        # Outside of a job nobody knows the guidance, so a label is no way out.
        assert carries(model.get_learned_conditioning(SdConditioning(["a man"], True))[0], host.house)
        for cfg, expected in ((7.0, False), (0.5, True), (-3.0, True)):
            assert carries(host.job("x", negative_prompt="a man", cfg_scale=cfg).uc[0][0], host.house) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_always_leaves_no_negative_out(shape: str, tmp_path: Path) -> None:
    with enforced(shape, tmp_path, negative="always") as host:
        assert carries(host.job("x", negative_prompt="a man").uc[0][0], host.house)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["sd2", "sd3", "sdxl"])
def test_other_models_are_refused_or_let_through_as_the_policy_says(shape: str, family: str, tmp_path: Path) -> None:
    with enforced(shape, tmp_path) as host:
        host.use(host.encoder(), family=family)
        with pytest.raises(Exception, match="there is none for"):
            host.job("a man")
        with pytest.raises(Exception, match="there is none for"):
            host.modules["modules.sd_models"].model_data.sd_model.get_learned_conditioning(["a man"])
    with enforced(shape, tmp_path, unsupported="allow") as host:
        host.use(host.encoder(), family=family)
        p = host.job("a man")
        assert not carries(p.c[0][0], host.house) and "APL" not in p.extra_generation_params
        assert host.ours("jobs").JOBS.counters["unprotected"] > 0


def test_options_that_would_switch_it_off_are_refused(tmp_path: Path) -> None:
    with enforced("a1111", tmp_path) as host:
        opts = host.shared.opts
        assert opts.set("disabled_extensions", ["anonymization-prompt"], is_api=True) is False
        assert opts.set("disable_all_extensions", "all") is False
        with pytest.raises(RuntimeError, match="cannot be changed"):
            opts.disabled_extensions = ["anonymization-prompt"]
        assert opts.data["disabled_extensions"] == [] and opts.data["disable_all_extensions"] == "none"
        assert opts.set("CLIP_stop_at_last_layers", 2) is True
        assert host.ours("enforce").status(host.ours("register").HOOKS)[1]["counters"]["options_refused"] == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_outlive_a_reload_and_the_policy_is_read_once(shape: str, tmp_path: Path) -> None:
    with enforced(shape, tmp_path) as host:
        (tmp_path / "policy.json").write_text('{"mode": "default_off"}', "utf-8")
        host.callbacks.fire("on_script_unloaded")
        assert carries(host.job("a man").c[0][0], host.house)
        host.load()
        assert carries(host.job("a dog", args=(False,)).c[0][0], host.house)


def test_training_is_locked(tmp_path: Path) -> None:
    with enforced("a1111", tmp_path) as host:
        with pytest.raises(Exception, match="Training is switched off"):
            host.modules["modules.textual_inversion.textual_inversion"].train_embedding("x")
        assert host.ours("register").trainer_tab() is None
    with enforced("a1111", tmp_path, lock_training=False) as host:
        assert host.modules["modules.textual_inversion.textual_inversion"].train_embedding("x") == "trained"


def test_denied_scripts_are_not_offered(tmp_path: Path) -> None:
    with enforced("a1111", tmp_path, deny=["*ControlNet*"]) as host:
        base = host.modules["modules.scripts"].Script
        runner = host.modules["modules.scripts"].ScriptRunner()
        runner.available = [type("ControlNet", (base,), {})(), type("Other", (base,), {})()]
        runner.initialize_scripts(False)
        assert [type(script).__name__ for script in runner.alwayson_scripts] == ["Other"]


def test_persons_who_agreed_pass_by_whole_prompts(tmp_path: Path) -> None:
    consent = {"persons": [{"id": "agreement-1", "name": "Ada Example"}]}
    with enforced("a1111", tmp_path, consent=consent) as host:
        assert not carries(host.job("a photo of Ada Example").c[0][0], host.house)
        for prompt in ("a photo of Ada Example and Ben Other", "a photo of Ada Example AND Ben Other",
                       "(Ada Example:1.1)", "a photo of Ada", "[Ada Example:Ben:0.5]"):
            p = host.job(prompt)
            assert carries(p.c[0][0], host.house), prompt
        # Naming the person in the negative prompt of another's picture opens nothing.
        assert carries(host.job("Ben Other", negative_prompt="Ada Example").c[0][0], host.house)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_self_test_runs_on_every_checkpoint_and_closes_the_server_when_it_fails(shape: str, tmp_path: Path) -> None:
    with enforced(shape, tmp_path) as host:
        enforce, hooks = host.ours("enforce"), host.ours("register").HOOKS
        code, body = enforce.status(hooks)
        assert code == 200 and body["ok"] and body["self_test"]["ok"] is True
        assert body["counters"]["verified_rows"] == 0  # the test's rows are no users' rows
        assert body["embeddings"]["sd1"]["file"] == "house.safetensors"
        encoder = host.encoder()
        kind = type(encoder)
        kept = kind.process_tokens
        kind.process_tokens = kept.__wrapped__
        layer = type(encoder.layer)
        kept_layer, layer.forward = layer.forward, layer.forward.__wrapped__
        try:
            host.callbacks.fire("on_model_loaded", host.use(encoder))
            code, body = enforce.status(hooks)
            assert code == 503 and not body["ok"] and body["self_test"]["ok"] is False
            with pytest.raises(Exception, match="self-test"):
                host.job("a man")
        finally:
            kind.process_tokens, layer.forward = kept, kept_layer


@pytest.mark.parametrize("changes", [
    {"mode": "enforce"}, {"unknown": 1}, {"embeddings": {}}, {"embeddings": {"sd1": {"file": "x", "sha256": "0" * 64}}},
    {"negative": "never"}, {"embeddings": {"sd3": {"file": "x", "sha256": "0" * 64}}},
], ids=str)
def test_a_policy_that_cannot_be_kept_ends_the_start(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended, enforced("a1111", tmp_path, **changes):
        pass
    assert ended.value.code == 78


def test_another_file_in_the_pinned_ones_place_ends_the_start(tmp_path: Path) -> None:
    make_prefix(tmp_path / "pinned", "house", seed=5)
    path = write_policy(tmp_path)
    make_prefix(tmp_path / "pinned", "house", seed=6)
    with pytest.raises(SystemExit) as ended, fake_host("a1111", tmp_path, cmd={"apl_policy": str(path)}):
        pass
    assert ended.value.code == 78


def test_an_unknown_host_does_not_start_enforced(tmp_path: Path) -> None:
    make_prefix(tmp_path / "pinned", "house", seed=5)
    cmd = {"apl_policy": str(write_policy(tmp_path))}
    with pytest.raises(SystemExit) as ended, fake_host("none", tmp_path, cmd=cmd):
        pass
    assert ended.value.code == 78


def test_command_line_before_variable_before_file(tmp_path: Path) -> None:
    make_prefix(tmp_path / "pinned", "house", seed=5)
    write_policy(tmp_path, "apl_policy.json")  # beside the WebUI
    soft = tmp_path / "soft.json"
    soft.write_text('{"mode": "default_on"}', "utf-8")
    off = tmp_path / "off.json"
    off.write_text('{"mode": "default_off"}', "utf-8")
    for cmd, environ, mode in (({}, {}, "enforced"), ({}, {"APL_POLICY": str(soft)}, "default_on"),
                               ({"apl_policy": str(off)}, {"APL_POLICY": str(soft)}, "default_off")):
        with fake_host("a1111", tmp_path, cmd=cmd, environ=environ) as host:
            assert host.ours("enforce").status(host.ours("register").HOOKS)[1]["mode"] == mode
    with pytest.raises(SystemExit), fake_host("a1111", tmp_path, environ={"APL_POLICY": ""}):
        pass


def test_routes_ask_for_the_hosts_password(tmp_path: Path) -> None:
    import base64

    make_prefix(tmp_path / "prefixes")
    with fake_host("a1111", tmp_path) as host:
        allowed = host.ours("api").is_allowed
        both = "ann:secret,bob:other"

        def basic(text: str) -> str:
            return "Basic " + base64.b64encode(text.encode()).decode()

        assert allowed(None, None) and allowed(None, "")
        assert allowed(basic("ann:secret"), both) and allowed(basic("bob:other"), both)
        for wrong in (None, "", "Basic", "Basic ???", basic("ann:other"), basic("ann"), basic("ann:secret,bob:other"),
                      "Bearer " + base64.b64encode(b"ann:secret").decode()):
            assert not allowed(wrong, both)
