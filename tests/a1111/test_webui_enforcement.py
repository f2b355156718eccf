"""What users of an enforced server can try, on a real host: each attempt is protected or refused; prints the table.

"Protected" is measured: the conditioning that the host samples with is the reference's with the prefix, to `BOUND`.
`APL_ATTEMPTS=FILE` writes the table as Markdown, which docs/hosting.md shows.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prompt_cases import BOUND, MODEL, PREFIX, Case, Pass, difference, inversions, passes_of, surroundings, text, words
from reference import Reference, Rows
from safetensors.torch import load_file
from webui_host import Server, host_folder, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.timeout(1200),
]
NAME = "a photo of a tall man"
MINE = [Pass([[text(NAME)]])]
ROWS: list[tuple[str, str, str]] = []


def picture() -> str:
    held = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 90, 80)).save(held, "PNG")
    return base64.b64encode(held.getvalue()).decode()


def case(passes: list[Pass] = MINE, *, options: dict[str, Any] | None = None, **payload: Any) -> Case:
    return Case({"prompt": NAME, **payload}, passes, options or {})


def args(*values: Any) -> dict[str, Any]:
    return {"alwayson_scripts": {"anonymize": {"args": list(values)}}}


def override(**settings: Any) -> dict[str, Any]:
    return {"override_settings": settings}


def negative(prompt: str, **payload: Any) -> Case:
    """A name in a negative prompt that guidance adds."""
    parts = [[text(part.rpartition(":")[0].rstrip() if ":" in part else part.rstrip())]
             for part in prompt.split("AND")]
    parts = [[[(piece[0].lstrip(), 1.0) for piece in each] for each in schedule] for schedule in parts]
    return Case({"prompt": prompt, "negative_prompt": NAME, **payload}, [Pass(parts, [text(NAME)], True)])


ATTEMPTS: dict[str, Case] = {
    "no arguments at all": case(),
    "`args: [false]`": case(**args(False)),
    "`args: [null]`": case(**args(None)),
    "`args: [{\"enabled\": false}]`": case(**args({"enabled": False})),
    "another prefix in the arguments": case(**args(True, "test", "step 1")),
    "arguments of the wrong kind": case(**args([], {"a": 1}, 7)),
    "an unknown key in the arguments": case(**args({"enabled": False, "off": True})),
    "the title in other letters": case(alwayson_scripts={"ANONYMIZE": {"args": [False]}}),
    "infotext without our key": case(infotext=f"{NAME}\nSteps: 1, Seed: 7, Size: 64x64"),
    "infotext with an unknown prefix": case(infotext=f"{NAME}\nSteps: 1, APL: none [00000000]"),
    "old emphasis implementation": case(**override(use_old_emphasis_implementation=True)),
    "clip skip 2": case(options={"skip": 2}, **override(CLIP_stop_at_last_layers=2)),
    "emphasis off": case(options={"emphasis": "None"}, **override(emphasis="None")),
    "no comma backtrack": case(options={"backtrack": 0}, **override(comma_padding_backtrack=0)),
    "no persistent cond cache": case(**override(persistent_cond_cache=False)),
    "padding of short prompts": case(**override(pad_cond_uncond=True)),
    "our own settings switched off": case(**override(apl_default_enabled=False)),
    "a late wildcard": case([Pass([[text("a photo of a tall man")]])], prompt="a __late__ man"),
    "a detailer's inner job": case([*MINE, *MINE], inner=True),
    "a selectable script's own job": case(script_name="apl test own jobs", script_args=[]),
    "hires fix with prompts of its own": case(
        [*MINE, Pass([[text(f"{words(66)} man")]], [text("ugly")])], enable_hr=True, hr_scale=2,
        hr_second_pass_steps=2, denoising_strength=0.6, hr_upscaler="Latent", hr_prompt=f"{words(66)} man",
        hr_negative_prompt="ugly"),
    "the name in the fifth chunk": case([Pass([[text(*["x", "BREAK"] * 4, NAME)]])],
                                        prompt="x BREAK x BREAK x BREAK x BREAK " + NAME),
    "the name after 70 tokens": case([Pass([[text(f"{words(70)} man")]])], prompt=f"{words(70)} man"),
    "the name in the second AND": case([Pass([[text("x")], [text(NAME)]])], prompt=f"x AND {NAME} :1.3"),
    "prompt editing": case([Pass([[text("x"), text("man")]])], prompt="[x:man:0.5]", steps=2),
    "alternation": case([Pass([[text("x"), text("man")]])], prompt="[x|man]", steps=2),
    "strong emphasis": case([Pass([[[("a ", 1.0), ("man", 1.9)]]])], prompt="a (man:1.9)"),
    "negative emphasis": case([Pass([[[("a ", 1.0), ("man", -1.0)]]])], prompt="a (man:-1)"),
    "the name from a style": case([Pass([[text("a man, in oil on canvas")]], [text("blurry")])], prompt="a man",
                                  styles=["aplstyle"]),
    "a textual inversion": case([Pass([[text("a", Rows("aplthree"), "man")]])], prompt="a aplthree man"),
    "an inversion of a whole chunk": case([Pass([[text("a", Rows("aplseventy"), "man")]])],
                                          prompt="a aplseventy man"),
    "the tokenizer's own special tokens": case([Pass([[text("<|startoftext|> man <|endoftext|> man")]])],
                                               prompt="<|startoftext|> man <|endoftext|> man"),
    "a LoRA that is not there": case(prompt=f"{NAME}<lora:none:1>"),
    "guidance 0, the name in the negative": negative("x", cfg_scale=0),
    "guidance 0.5": negative("x", cfg_scale=0.5),
    "guidance 0.99": negative("x", cfg_scale=0.99),
    "guidance -1": negative("x", cfg_scale=-1),
    "`x :0`": negative("x :0"),
    "`x :-1`": negative("x :-1"),
    "`x :0.1` at guidance 7": negative("x :0.1"),
    "weights that cancel": negative("x :1 AND y :-1"),
    "a hundred thousand in weights": negative("x :-100000 AND y :99999"),
}


@pytest.fixture(scope="module")
def pinned() -> Path:
    """The prefix file of the policy."""
    return PREFIX


@pytest.fixture(scope="module")
def reference(pinned: Path) -> Reference:
    rows = load_file(pinned)["emb_params"]
    return Reference.of(MODEL, rows, inversions(rows.shape[1]))


@contextlib.contextmanager
def enforced(folder: Path, pinned: Path, **more: Any) -> Iterator[Server]:
    """A server with a policy; the table is printed when it ends."""
    policy = folder / "policy.json"
    policy.write_text(json.dumps({"mode": "enforced", "embeddings": {"sd1": {
        "file": str(pinned), "sha256": hashlib.sha256(pinned.read_bytes()).hexdigest()}}}), "utf-8")
    width = load_file(pinned)["emb_params"].shape[1]
    ROWS.clear()
    with running(*surroundings(folder, width), "--apl-policy", str(policy), auth="ann:secret", **more) as host:
        yield host
    _print_table()


@pytest.fixture(scope="module")
def server(pinned: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with enforced(tmp_path_factory.mktemp("enforced"), pinned) as host:
        yield host


def _print_table() -> None:
    lines = ["| attempt | expected | seen |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in ROWS)]
    if where := os.environ.get("APL_ATTEMPTS"):
        Path(where).write_text("\n".join(lines) + "\n", "utf-8")
    else:
        import sys

        sys.stdout.write("\n" + "\n".join(lines) + "\n")


def attempt(server: Server, tried: Case) -> tuple[int, Any]:
    server.clear()
    payload = dict(tried.payload)
    inner = payload.pop("inner", False)
    server.call("/test/orders", {"late": "photo of a tall" if "__late__" in payload["prompt"] else "",
                                 "nested": int(inner)})
    return server.txt2img(**payload)


@pytest.mark.parametrize("name", ATTEMPTS)
def test_an_attempt_is_protected(name: str, server: Server, reference: Reference) -> None:
    tried = ATTEMPTS[name]
    if server.is_forge and "backtrack" in tried.options:  # it looks back 20 tokens, whatever the option says
        tried = replace(tried, options={})
    status, answer = attempt(server, tried)
    if server.is_forge and "parameterized generic" in str(answer):  # its own API trips over the field
        assert status == 500 and "infotext" in tried.payload and not server.conds()
        ROWS.append((name, "protected", "refused (500), by Forge's own fault"))
        return
    assert status == 200, answer
    found = difference(reference, tried, passes_of(server, tried), True)
    ROWS.append((name, "protected", f"protected (largest difference {found:.2g})"))
    assert found <= BOUND
    assert "APL: anonymize-miniature" in json.loads(answer["info"])["infotexts"][0]


def still_protected(server: Server, reference: Reference) -> None:
    status, answer = attempt(server, ATTEMPTS["`args: [false]`"])
    assert status == 200, answer
    assert difference(reference, ATTEMPTS["`args: [false]`"], server.conds(), True) <= BOUND


def _refused(path: str, body: Any) -> Callable[[Server, Reference], str]:
    def act(server: Server, reference: Reference) -> str:
        status, answer = server.call(path, body)
        # The host reports a failed training with 200 and the error in its text.
        told = json.dumps(answer)
        # Forge has no such training any more: no route, or one without anything behind it.
        gone = server.is_forge and (status == 404 or "is not defined" in told)
        assert "Training is switched off" in told or gone, answer
        return f"refused ({status})"

    return act


def _options(**values: Any) -> Callable[[Server, Reference], str]:
    def act(server: Server, reference: Reference) -> str:
        before = server.call("/sdapi/v1/options")[1]
        status, _ = server.call("/sdapi/v1/options", values)
        after = server.call("/sdapi/v1/options")[1]
        assert all(after[key] == before[key] for key in values if key.startswith("disable")), after
        return f"protected, the option is unchanged ({status})"

    return act


def _override(**values: Any) -> Callable[[Server, Reference], str]:
    def act(server: Server, reference: Reference) -> str:
        before = server.call("/sdapi/v1/options")[1]
        server.txt2img(prompt=NAME, override_settings=values)
        after = server.call("/sdapi/v1/options")[1]
        assert all(after[key] == before[key] for key in values)
        return "protected, the option is unchanged"

    return act


def _encode(body: dict[str, Any]) -> Callable[[Server, Reference], str]:
    def act(server: Server, reference: Reference) -> str:
        status, answer = server.call("/test/encode", body)
        assert status == 200, answer
        got = load_file(server.probe / "encode.safetensors")["x"]
        want = reference.encode([text(each) for each in body["texts"]], on=True)
        assert float((got - want).abs().max()) <= BOUND
        return "protected"

    return act


def _reload(server: Server, reference: Reference) -> str:
    for _ in range(2):
        assert server.call("/test/reload_scripts", {})[0] == 200
    return "protected"


def _other_checkpoint(server: Server, reference: Reference) -> str:
    for path in ("/sdapi/v1/unload-checkpoint", "/sdapi/v1/reload-checkpoint"):
        assert server.call(path, {})[0] == 200
    return "protected"


def _images_as_a_start(server: Server, reference: Reference) -> str:
    server.clear()
    status, answer = server.call("/sdapi/v1/img2img", {
        "init_images": [picture()], "prompt": NAME, "steps": 2, "denoising_strength": 0.9, "width": 64, "height": 64,
        "seed": 7, "sampler_name": "Euler", "alwayson_scripts": {"anonymize": {"args": [False]}}})
    assert status == 200, answer
    assert difference(reference, case(), server.conds(), True) <= BOUND
    return "protected"


def _lines_of_a_script(server: Server, reference: Reference) -> str:
    """The host's own "Prompts from file or textbox", whose lines set guidance and negative prompt themselves."""
    server.clear()
    status, answer = server.txt2img(prompt="x", script_name="prompts from file or textbox", script_args=[
        False, False, "start", f'--prompt "x" --cfg_scale 0 --negative_prompt "{NAME}"'])
    assert status == 200, answer
    held = server.conds()
    assert len(held) == 1
    assert float((held[0]["u.0.0"] - reference.encode([text(NAME)], on=True)[0]).abs().max()) <= BOUND
    return "protected"


def _matrix(server: Server, reference: Reference) -> str:
    server.clear()
    status, answer = server.txt2img(prompt="a man|in a hat", script_name="prompt matrix",
                                    script_args=[False, False, "positive", "comma", 0])
    # Some forks cannot draw the captions of the grid with their own Pillow, after everything was generated.
    assert status == 200 or "multiline_textsize" in json.dumps(answer), answer
    held = server.conds()
    texts = ["a man", "a man, in a hat"]
    found = {name: value for each in held for name, value in each.items() if name.startswith("c.")}
    assert found
    for value in found.values():
        near = min(float((value - reference.encode([text(each)], on=True)[0]).abs().max()) for each in texts)
        assert near <= BOUND
    return "protected"


def _no_password(server: Server, reference: Reference) -> str:
    seen = {server.call(path, body, auth="ann:wrong")[0] for path, body in (
        ("/apl/v1/status", None), ("/apl/v1/prefixes", None), ("/apl/v1/score", {}))}
    assert seen == {401}
    return "refused (401)"


OTHERS: dict[str, tuple[str, Callable[[Server, Reference], str]]] = {
    "options: `disabled_extensions`": ("protected", _options(disabled_extensions=["anonymization-prompt"])),
    "options: `disable_all_extensions`": ("protected", _options(disable_all_extensions="all")),
    "options: our settings": ("protected", _options(apl_default_enabled=False, apl_default_prefix="none")),
    "override_settings: `disabled_extensions`": ("protected", _override(disabled_extensions=["anonymization-prompt"])),
    "override_settings: `disable_all_extensions`": ("protected", _override(disable_all_extensions="extra")),
    "script files run again (Reload UI)": ("protected", _reload),
    "checkpoint unloaded and loaded again": ("protected", _other_checkpoint),
    "a picture as a start": ("protected", _images_as_a_start),
    "lines of \"Prompts from file or textbox\"": ("protected", _lines_of_a_script),
    "prompt matrix": ("protected", _matrix),
    "another extension encodes a plain list": ("protected", _encode({"texts": [NAME]})),
    "another extension labels a name as negative": ("protected", _encode({"texts": [NAME], "negative": True})),
    "create an embedding": ("refused", _refused("/sdapi/v1/create/embedding", {"name": "x", "num_vectors_per_token": 1,
                                                                            "init_text": NAME})),
    "train an embedding": ("refused", _refused("/sdapi/v1/train/embedding", {"embedding_name": "aplthree"})),
    "create a hypernetwork": ("refused", _refused("/sdapi/v1/create/hypernetwork", {"name": "x"})),
    "train a hypernetwork": ("refused", _refused("/sdapi/v1/train/hypernetwork", {"hypernetwork_name": "x"})),
    "routes without the host's password": ("refused", _no_password),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_way_round_is_closed(name: str, server: Server, reference: Reference) -> None:
    expected, act = OTHERS[name]
    seen = act(server, reference)
    still_protected(server, reference)
    ROWS.append((name, expected, seen))
    assert seen.startswith(expected)


def test_the_status_tells_a_proxy_what_holds(server: Server, pinned: Path) -> None:
    code, body = server.call("/apl/v1/status")
    assert code == 200 and body["ok"] and body["mode"] == "enforced"
    assert body["self_test"]["ok"] is True
    assert body["embeddings"]["sd1"]["sha256"] == hashlib.sha256(pinned.read_bytes()).hexdigest()
    assert body["counters"]["verified_rows"] > 0 and body["counters"]["unprotected"] == 0
    assert "man" not in json.dumps(body).replace("command", "")
