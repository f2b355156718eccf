"""The conditioning that a real WebUI samples with, against transformers alone, in every way a prompt can be written.

Conditioning is captured in the host by `probe`; the reference shares nothing with the extension.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prompt_cases import (
    BOUND,
    CASES,
    LAYER,
    MODEL,
    ON,
    PREFIX,
    Case,
    Pass,
    difference,
    inversions,
    lora,
    sampled,
    surroundings,
    text,
    words,
)
from reference import Reference
from safetensors.torch import load_file
from webui_host import Server, host_folder, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.timeout(1200),  # the first test starts the host: half a minute, or minutes on a busy machine
]


@pytest.fixture(scope="module")
def reference() -> Reference:
    rows = load_file(PREFIX)["emb_params"]
    return Reference.of(MODEL, rows, inversions(rows.shape[1]))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = tmp_path_factory.mktemp("webui")
    (made / "models").mkdir()
    for name in ("other.safetensors", "other.yaml"):  # a second checkpoint, for the refiner
        source = MODEL / "miniature-sd1.safetensors" if name.endswith("safetensors") else (
            host_folder() / "models" / "Stable-diffusion" / "miniature-sd1.yaml")
        (made / "models" / name).write_bytes(source.read_bytes())
    width = load_file(PREFIX)["emb_params"].shape[1]
    with running(*surroundings(made, width), "--ckpt-dir", str(made / "models")) as host:
        yield host


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("name", CASES)
def test_the_host_samples_with_the_reference(name: str, on: bool, server: Server, reference: Reference) -> None:
    case = CASES[name]
    if name == "old emphasis option" and not on and not server.is_forge:
        pytest.skip("the host's old code, which the extension does not touch, is not what the reference does")
    if not on and "seventy" in case.payload["prompt"]:
        pytest.skip("a whole chunk of vectors without a prefix is the host's own affair")
    held = sampled(server, case, on)
    if server.is_forge:  # it looks back 20 tokens for a comma, whatever the option says
        case = replace(case, options={key: value for key, value in case.options.items() if key != "backtrack"})
    found = difference(reference, case, held, on)
    if table := os.environ.get("APL_PROOF_TABLE"):
        with Path(table).open("a", encoding="utf-8") as out:
            out.write(f"{name}\t{'on' if on else 'off'}\t{found:.3g}\n")
    assert found <= BOUND, found


def test_the_toggle_survives_the_hosts_cache(server: Server) -> None:
    seen = []
    for on in (False, True, False, True):
        status, answer = server.txt2img(prompt="a photo of a man", steps=2, **(ON if on else {}))
        assert status == 200
        seen.append(answer["images"][0])
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_script_files_run_again_change_nothing(server: Server, reference: Reference) -> None:
    for _ in range(3):
        assert server.call("/test/reload_scripts", {})[0] == 200
    hooks = server.call("/apl/v1/status")[1]["hooks"]
    assert len(hooks) >= 12
    case = CASES["BREAK"]
    for on in (True, False):
        assert difference(reference, case, sampled(server, case, on), on) <= BOUND


def test_a_failed_job_leaves_no_state(server: Server, reference: Reference) -> None:
    for wrong in ({"enabled": True, "prefix": "../../etc/passwd"}, {"enabled": "yes"}, {"enabled": True, "level": 7},
                  {"enabled": True, "prefix": "anonymize-miniature", "levle": 400}):
        status, answer = server.txt2img(prompt="a man", alwayson_scripts={"anonymize": {"args": [wrong]}})
        assert status == 500, wrong
        assert "Error" in answer["error"] and (answer.get("errors") or answer["message"]).strip(), answer
    case = CASES["short"]
    assert difference(reference, case, sampled(server, case, False), False) <= BOUND


def test_an_encode_outside_any_job_is_the_hosts_own(server: Server, reference: Reference) -> None:
    status, _ = server.call("/test/encode", {"texts": ["a photo of a man"]})
    assert status == 200
    got = load_file(server.probe / "encode.safetensors")["x"]
    assert float((got - reference.encode([text("a photo of a man")], on=False)).abs().max()) <= BOUND


def test_a_lora_on_the_text_encoder_and_plain_again(server: Server, reference: Reference) -> None:
    inner = getattr(reference.model, "text_model", reference.model)
    weight = inner.get_submodule(LAYER).weight
    rows = lora(reference.prefix.shape[1])
    down, up = (next(value for key, value in rows.items() if key.endswith(f"lora_{part}.weight"))
                for part in ("down", "up"))
    for prompt, strength in (("a photo of a man<lora:apllora:0.8>", 0.8), ("a photo of a man", 0.0),
                             (f"{words(70)}<lora:apllora:0.5>", 0.5)):
        plain = prompt.partition("<")[0]
        case = Case({"prompt": prompt}, [Pass([[text(plain)]])])
        for on in (True, False):
            found = sampled(server, case, on)
            before = weight.data.clone()
            weight.data += strength * up @ down
            try:
                want = difference(reference, case, found, on)
            finally:
                weight.data = before
            # Forge adds it to weights in half precision.
            assert want <= (2e-4 if server.is_forge and strength else BOUND), (prompt, on, want)
            if strength:
                assert difference(reference, case, found, on) > 1e-3  # the LoRA is really there


def test_a_refiner_keeps_it(server: Server, reference: Reference) -> None:
    """The second checkpoint encodes in the middle of sampling, when every script has had its turn."""
    assert server.call("/sdapi/v1/refresh-checkpoints", {})[0] == 200
    before = server.call("/apl/v1/status")[1]["counters"]["encodes"]
    status, answer = server.txt2img(prompt="a photo of a man", steps=4, refiner_checkpoint="other.safetensors",
                                    refiner_switch_at=0.5, **ON)
    assert status == 200, answer
    assert "Refiner" in answer["info"]
    assert server.call("/apl/v1/status")[1]["counters"]["encodes"] == before + 2  # once for each checkpoint
    case = CASES["short"]
    for on in (False, True):  # and what the host padded with meanwhile is no prefix's
        assert difference(reference, case, sampled(server, case, on), on) <= BOUND
