"""A policy says what it means or is refused; its files are pinned; consent covers whole prompts only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apl_core import policy as module
from apl_core.consent import Consent, Person
from apl_core.errors import ConfigError, PrefixFileError
from apl_core.metadata import PrefixMetadata
from apl_core.policy import EXIT_CODE, Policy, load_policy, parse_policy, read_policy
from apl_core.prefix import AnonymizationPrompt, save_prefix


@pytest.fixture
def pinned(tmp_path: Path) -> dict[str, str]:
    """A policy's entry for a prefix file beside it; the hash is hashlib's own, of the bytes on disk."""
    vectors = {"emb_params": torch.arange(40, dtype=torch.float32).reshape(4, 10)}
    save_prefix(AnonymizationPrompt("sd1", vectors, PrefixMetadata(title="t")), tmp_path / "ap.safetensors")
    digest = hashlib.sha256((tmp_path / "ap.safetensors").read_bytes()).hexdigest()
    return {"file": "ap.safetensors", "sha256": digest}


def text(pinned: dict[str, str], **changes: Any) -> str:
    return json.dumps({"mode": "enforced", "embeddings": {"sd1": pinned}} | changes)


def put(folder: Path, content: str) -> Path:
    path = folder / "policy.json"
    path.write_text(content, encoding="utf-8")
    return path


def test_defaults_fail_closed(tmp_path: Path, pinned: dict[str, str]) -> None:
    policy = load_policy(put(tmp_path, text(pinned)))
    assert (policy.enforced, policy.negative, policy.unsupported) == (True, "auto", "refuse")
    assert policy.strict is True and policy.lock_training is True and not policy.consent and policy.deny == ()
    assert policy.embeddings["sd1"].path == tmp_path / "ap.safetensors"
    assert policy.sha256 == hashlib.sha256((tmp_path / "policy.json").read_bytes()).hexdigest()
    assert EXIT_CODE == 78


def test_the_file_that_was_pinned_loads(tmp_path: Path, pinned: dict[str, str]) -> None:
    prefixes = load_policy(put(tmp_path, text(pinned))).load_prefixes()
    assert torch.equal(prefixes["sd1"].vectors(), torch.arange(40, dtype=torch.float32).reshape(4, 10))
    upper = pinned | {"sha256": "0x" + pinned["sha256"].upper()}
    assert load_policy(put(tmp_path, text(upper))).load_prefixes()


def test_another_file_is_refused(tmp_path: Path, pinned: dict[str, str]) -> None:
    policy = load_policy(put(tmp_path, text(pinned)))
    # Same vectors, another place in the chunk: only the hash of the whole file sees that.
    prefix = policy.load_prefixes()["sd1"]
    moved = AnonymizationPrompt("sd1", prefix.tensors, prefix.meta.with_fields(placement="suffix"))
    save_prefix(moved, tmp_path / "ap.safetensors")
    with pytest.raises(ConfigError, match="is not the file that the policy names"):
        policy.load_prefixes()
    (tmp_path / "ap.safetensors").unlink()
    with pytest.raises(PrefixFileError, match="does not exist"):
        policy.load_prefixes()


def test_a_file_of_another_family_is_refused(tmp_path: Path, pinned: dict[str, str]) -> None:
    policy = load_policy(put(tmp_path, json.dumps({"mode": "enforced", "embeddings": {"sd2": pinned}})))
    with pytest.raises(ConfigError, match="is for sd1"):
        policy.load_prefixes()


def test_relative_names_fall_back_to_the_shipped_folder(
    tmp_path: Path, pinned: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "shipped_folder", lambda: tmp_path)
    assert parse_policy(text(pinned)).load_prefixes()


WRONG = {
    "mode": ({"mode": "on"}, "mode is 'on'"),
    "mode's type": ({"mode": True}, "mode is True"),
    "negative": ({"negative": "never"}, "negative is 'never'"),
    "unsupported": ({"unsupported": "warn"}, "unsupported is 'warn'"),
    "strict": ({"strict": "no"}, "strict is 'no'"),
    "strict as a number": ({"strict": 0}, "strict is 0"),
    "lock_training": ({"lock_training": None}, "lock_training is None"),
    "unknown key": ({"strct": False}, "unknown key 'strct'"),
    "no prefix": ({"embeddings": {}}, "names no prefix file"),
    "embeddings' type": ({"embeddings": ["a"]}, "embeddings is not an object"),
    "family": ({"embeddings": {"sd9": {"file": "a", "sha256": "0" * 64}}}, "unknown family 'sd9'"),
    "no hash": ({"embeddings": {"sd1": {"file": "a"}}}, "has no 'sha256'"),
    "short hash": ({"embeddings": {"sd1": {"file": "a", "sha256": "0" * 63}}}, "sha256 is"),
    "hash's type": ({"embeddings": {"sd1": {"file": "a", "sha256": 5}}}, "sha256 is 5"),
    "file's type": ({"embeddings": {"sd1": {"file": 5, "sha256": "0" * 64}}}, "file is 5"),
    "deny": ({"deny": "LoadImage"}, "deny is not a list"),
    "empty pattern": ({"deny": [""]}, "deny is not a list of texts"),
    "padded pattern": ({"deny": ["LoadImage "]}, "deny is not a list of texts"),
    "consent": ({"consent": ["Ada Example"]}, "consent is list"),
    "consent without persons": ({"consent": {"words": []}}, "has no 'persons'"),
    "person without id": ({"consent": {"persons": [{"name": "Ada Example"}]}}, "has no 'id'"),
    "bad id": ({"consent": {"persons": [{"id": "a b", "name": "Ada Example"}]}}, "has the id 'a b'"),
    "plain name": ({"consent": {"persons": [{"id": "a", "name": "the man"}]}}, "everyday words"),
    "no name": ({"consent": {"persons": [{"id": "a", "name": " , "}]}}, "no usable name"),
    "two words": ({"consent": {"persons": [], "words": ["two words"]}}, "consent.words holds"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named_with_the_way_out(pinned: dict[str, str], name: str) -> None:
    changes, says = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        parse_policy(text(pinned, **changes))
    assert says in caught.value.message, caught.value.message
    assert caught.value.hint and caught.value.field


@pytest.mark.parametrize("broken", ["", "[]", "null", "{", '{"mode": "enforced", "mode": "default_off"}', "[" * 9999,
                                    '{"embeddings": {}}', "'mode'"])
def test_what_is_no_policy_is_refused(broken: str) -> None:
    with pytest.raises(ConfigError):
        parse_policy(broken)


def test_typing_errors_are_guessed() -> None:
    with pytest.raises(ConfigError, match="Did you mean negative"):
        parse_policy('{"mode": "enforced", "negativ": "auto"}')


def test_where_a_policy_comes_from(tmp_path: Path, pinned: dict[str, str]) -> None:
    path = put(tmp_path, text(pinned))
    assert read_policy({}) is None and read_policy({}, tmp_path / "absent.json") is None
    assert read_policy({}, path).source == str(path)
    assert read_policy({"APL_POLICY": str(path)}).mode == "enforced"
    assert read_policy({"APL_POLICY": ' {"mode": "default_off"}'}, path).mode == "default_off"
    for value, says in (("", "set but empty"), ("  ", "set but empty"), (str(tmp_path / "absent.json"), "No such file"),
                        (str(tmp_path), "cannot be read"), ("a\0b", "cannot be read")):
        with pytest.raises(ConfigError, match=says):
            read_policy({"APL_POLICY": value}, path)


def test_unreadable_files(tmp_path: Path, pinned: dict[str, str]) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(b"\xef\xbb\xbf" + text(pinned).encode())  # what Windows editors put in front
    assert load_policy(path).enforced
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(path)
    path.write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_policy(path)


def test_it_is_read_once(tmp_path: Path, pinned: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module._read_once.cache_clear()
    path = put(tmp_path, text(pinned))
    monkeypatch.setenv("APL_POLICY", str(path))
    first = module.current_policy()
    path.write_text('{"mode": "default_off"}', encoding="utf-8")
    monkeypatch.delenv("APL_POLICY")
    assert module.current_policy() is first and first.enforced
    module._read_once.cache_clear()
    monkeypatch.setenv("APL_POLICY", "")
    for _ in range(2):
        with pytest.raises(ConfigError):
            module.current_policy()
        monkeypatch.delenv("APL_POLICY", raising=False)  # an error stays one: nobody gets in by asking twice
    module._read_once.cache_clear()


def test_deny_patterns() -> None:
    policy = Policy("default_off", deny=("LoadImage", "*IPAdapter*", "Lora?oader"))
    denied = {"LoadImage", "IPAdapterApply", "XIPAdapterY", "LoraLoader"}
    allowed = {"LoadImageMask", "loadimage", "Ipadapter", "LoraLoaderModelOnly", ""}
    assert all(map(policy.denies, denied)) and not any(map(policy.denies, allowed))


ADA = Consent((Person("agreement-1", "Ada Example"), Person("agreement-2", "Ada Maria Example")),
              frozenset({"zeppelin"}))


@pytest.mark.parametrize(("prompt", "ids"), [
    ("a photo of Ada Example", ("agreement-1",)),
    ("A portrait of ADA   EXAMPLE, smiling.", ("agreement-1",)),
    ("Ada Maria Example in a zeppelin", ("agreement-2",)),
    ("Ada Example and Ada Maria Example", ("agreement-1", "agreement-2")),
    ("Ada Example and ada example", ("agreement-1",)),
])
def test_prompts_of_persons_who_agreed(prompt: str, ids: tuple[str, ...]) -> None:
    assert ADA.match(prompt) == ids


@pytest.mark.parametrize("prompt", [
    "", "a photo of a man", "a photo of Ada", "a photo of Example Ada", "Ada, photo, Bertram Other", "Ada Maria",
    "Ada Example and Bertram Other", "a photo of Bertram Other", "(Ada Example:1.2)", "[Ada Example]",
    "Ada Example:1.1", "Ada Example embedding:other", "Ada Example AND Bertram", "Аda Example", "Ada\u200b Example",
    "Ada_Example", "AdaExample", "<lora:bertram:1> Ada Example", "{Ada Example|Bertram}",
    "Ada Example " + "photo " * 100, "Ada Example \\(Bertram\\)",
])
def test_anything_else_keeps_the_prefix(prompt: str) -> None:
    assert ADA.match(prompt) == ()


def test_the_list_is_off_by_default() -> None:
    assert not Consent() and Consent().match("a photo of Ada Example") == ()
    with pytest.raises(ConfigError, match="same id twice"):
        Consent((Person("a", "Ada Example"), Person("a", "Bertram Other")))
