"""The conditioning that a real WebUI samples with, against transformers alone, in every way a prompt can be written.

Conditioning is captured in the host by `probe`; the reference shares nothing with the extension. `BOUND` is what two
builds of torch and two attention kernels differ by: the off cases, which the extension never touches, show the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference, Rows
from safetensors.torch import load_file, save_file
from webui_host import ROOT, Server, host_folder, running

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
    pytest.mark.timeout(1200),  # the first test starts the host: half a minute, or minutes on a busy machine
]
MODEL = ROOT / "apl_train" / "miniworld" / "assets" / "model"
PREFIX = ROOT / "embeddings" / "anonymize-miniature.safetensors"
BOUND = 2e-5
ON = {"alwayson_scripts": {"anonymize": {"args": [{"enabled": True, "prefix": "anonymize-miniature"}]}}}
WIDTH = load_file(PREFIX)["emb_params"].shape[1]
TI = {name: torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)) * 0.02
      for name, count in (("aplthree", 3), ("aplseventy", 75))}


LAYER = "encoder.layers.1.self_attn.q_proj"
LORA = {f"lora_te_text_model_{LAYER.replace('.', '_')}.{part}": torch.randn(*shape, generator=torch.Generator()
                                                                           .manual_seed(len(part))) * 0.3
        for part, shape in (("lora_down.weight", (4, WIDTH)), ("lora_up.weight", (WIDTH, 4)))}
LORA[f"lora_te_text_model_{LAYER.replace('.', '_')}.alpha"] = torch.tensor(4.0)


def words(count: int, word: str = "cat") -> str:
    return " ".join([word] * count)


def text(*parts: Any) -> list:
    return [(part, 1.0) if isinstance(part, str | Rows) and part != "BREAK" else part for part in parts]


@dataclass
class Pass:
    """One sampling: for each part between AND the texts of its schedule, and the negative's texts."""

    positive: list[list[list]]
    negative: list[list] = field(default_factory=lambda: [text("")])
    negative_on: bool = False


@dataclass
class Case:
    payload: dict[str, Any]
    passes: list[Pass]
    options: dict[str, Any] = field(default_factory=dict)


def plain(prompt: str, **fields: Any) -> Case:
    return Case({"prompt": prompt, **fields}, [Pass([[text(prompt)]])])


LONG_COMMAS = ", ".join(["one two three four five"] * 16)
CASES: dict[str, Case] = {
    "short": plain("a photo of a man"),
    "empty": plain(""),
    "65 tokens": plain(words(65)),
    "66 tokens": plain(words(66)),
    "75 tokens": plain(words(75)),
    "76 tokens": plain(words(76)),
    "130 tokens": plain(words(130)),
    "131 tokens": plain(words(131)),
    "200 tokens": plain(words(200)),
    "commas": plain(LONG_COMMAS),
    "commas, no backtrack": Case({"prompt": LONG_COMMAS, "override_settings": {"comma_padding_backtrack": 0}},
                                 [Pass([[text(LONG_COMMAS)]])], {"backtrack": 0}),
    "BREAK": Case({"prompt": f"a man BREAK {words(70)} BREAK a dog"},
                  [Pass([[text("a man", "BREAK", words(70), "BREAK", "a dog")]])]),
    "emphasis, Original": Case({"prompt": "a (red:1.4) cat"}, [Pass([[[("a ", 1.0), ("red", 1.4), (" cat", 1.0)]]])]),
    **{f"emphasis, {name}": Case(
        {"prompt": "a (red:1.4) cat", "override_settings": {"emphasis": name}},
        [Pass([[[("a ", 1.0), ("red", 1.4), (" cat", 1.0)]]])], {"emphasis": name}) for name in ("No norm", "Ignore")},
    "emphasis, None": Case({"prompt": "a (red:1.4) cat", "override_settings": {"emphasis": "None"}},
                           [Pass([[text("a (red:1.4) cat")]])], {"emphasis": "None"}),
    "emphasis over two chunks": Case({"prompt": f"a man (({words(80)}))"},
                                     [Pass([[[("a man ", 1.0), (words(80), 1.1 * 1.1)]]])]),
    "old emphasis option": Case({"prompt": "a (red:1.4) cat",
                                 "override_settings": {"use_old_emphasis_implementation": True}},
                                [Pass([[[("a ", 1.0), ("red", 1.4), (" cat", 1.0)]]])]),
    "inversion": Case({"prompt": "a photo of aplthree man"},
                      [Pass([[text("a photo of", Rows(TI["aplthree"]), "man")]])]),
    "inversion at a chunk's edge": Case({"prompt": f"{words(64)} aplthree man"},
                                        [Pass([[text(words(64), Rows(TI["aplthree"]), "man")]])]),
    "inversion, emphasised": Case(
        {"prompt": "a (aplthree:1.3) man"}, [Pass([[[("a", 1.0), (Rows(TI["aplthree"]), 1.3), ("man", 1.0)]]])]),
    "inversion of 75 vectors": Case({"prompt": "a aplseventy man"},
                                    [Pass([[text("a", Rows(TI["aplseventy"]), "man")]])]),
    "clip skip 2": Case({"prompt": "a photo of a man", "override_settings": {"CLIP_stop_at_last_layers": 2}},
                        [Pass([[text("a photo of a man")]], )], {"skip": 2}),
    "style": Case({"prompt": "a man", "styles": ["aplstyle"]},
                  [Pass([[text("a man, in oil on canvas")]], [text("blurry")])]),
    "negative": Case({"prompt": "a man", "negative_prompt": "ugly dog"}, [Pass([[text("a man")]], [text("ugly dog")])]),
    "long negative": Case({"prompt": "a man", "negative_prompt": words(70)},
                          [Pass([[text("a man")]], [text(words(70))])]),
    "prompt editing, one and two chunks": Case(
        {"prompt": f"[a cat:{words(80)}:0.5]", "steps": 2},
        [Pass([[text("a cat"), text(words(80))]])]),
    "alternation": Case({"prompt": "a [cat|dog|man]", "steps": 3},
                        [Pass([[text("a cat"), text("a dog"), text("a man")]])]),
    "AND": Case({"prompt": f"a man AND a dog :0.6 AND {words(70)} :1.2"},
                [Pass([[text("a man")], [text("a dog")], [text(words(70))]])]),
    "late wildcard": Case({"prompt": "a __late__ man"}, [Pass([[text("a photo of a tall man")]])]),
    "hires": Case({"prompt": "a man", "enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 2,
                   "denoising_strength": 0.6, "hr_upscaler": "Latent", "hr_prompt": words(70),
                   "hr_negative_prompt": "ugly"},
                  [Pass([[text("a man")]]), Pass([[text(words(70))]], [text("ugly")])]),
    "detailer's inner job": Case({"prompt": "a photo of a man"},
                                 [Pass([[text("a photo of a man")]]), Pass([[text("a photo of a man")]])]),
    "another script's own job": Case({"prompt": "a photo of a man", "script_name": "apl test own jobs",
                                      "script_args": []}, [Pass([[text("a photo of a man")]])]),
    "guidance 0": Case({"prompt": "x", "negative_prompt": "a man", "cfg_scale": 0},
                       [Pass([[text("x")]], [text("a man")], True)]),
    "guidance 0.5": Case({"prompt": "x", "negative_prompt": "a man", "cfg_scale": 0.5},
                         [Pass([[text("x")]], [text("a man")], True)]),
    "guidance 1": Case({"prompt": "x", "negative_prompt": "a man", "cfg_scale": 1},
                       [Pass([[text("x")]], [text("a man")])]),
    "weight 0": Case({"prompt": "x :0", "negative_prompt": "a man"},
                     [Pass([[text("x")]], [text("a man")], True)]),
    "weight -1": Case({"prompt": "x :-1", "negative_prompt": "a man"},
                      [Pass([[text("x")]], [text("a man")], True)]),
    "two weights that cancel": Case({"prompt": "x :1 AND y :-1", "negative_prompt": "a man"},
                                    [Pass([[text("x")], [text("y")]], [text("a man")], True)]),
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference.of(MODEL, load_file(PREFIX)["emb_params"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = tmp_path_factory.mktemp("webui")
    (made / "embeddings").mkdir()
    for name, vectors in TI.items():
        save_file({"emb_params": vectors}, made / "embeddings" / f"{name}.safetensors")
    (made / "styles.csv").write_text("name,prompt,negative_prompt\naplstyle,\"{prompt}, in oil on canvas\",blurry\n",
                                     "utf-8")
    (made / "lora").mkdir()
    save_file(LORA, made / "lora" / "apllora.safetensors")
    (made / "models").mkdir()
    for name in ("other.safetensors", "other.yaml"):  # a second checkpoint, for the refiner
        source = MODEL / "miniature-sd1.safetensors" if name.endswith("safetensors") else (
            host_folder() / "models" / "Stable-diffusion" / "miniature-sd1.yaml")
        (made / "models" / name).write_bytes(source.read_bytes())
    with running("--embeddings-dir", str(made / "embeddings"), "--styles-file", str(made / "styles.csv"), "--lora-dir",
                 str(made / "lora"), "--ckpt-dir", str(made / "models")) as host:
        yield host


def sampled(server: Server, case: Case, on: bool) -> list[dict[str, Any]]:
    server.clear()
    nested = "inner job" in CASE_NAMES.get(id(case), "")
    server.call("/test/orders", {"late": "photo of a tall" if "__late__" in case.payload["prompt"] else "",
                                 "nested": int(nested)})
    status, answer = server.txt2img(**case.payload, **(ON if on else {}))
    assert status == 200, answer
    held = server.conds()
    assert ("APL: anonymize-miniature" in json.loads(answer["info"])["infotexts"][0]) == on
    return held


CASE_NAMES = {id(case): name for name, case in CASES.items()}


def difference(reference: Reference, case: Case, found: list[dict[str, Any]], on: bool) -> float:
    """Largest absolute difference over everything sampled with."""
    assert len(found) == len(case.passes), [each["notes"] for each in found]
    worst = 0.0
    for held, expected in zip(found, case.passes, strict=True):
        names = {name for name in held if name != "notes"}
        for at, texts in enumerate(expected.positive):
            want = reference.encode(texts, on=on, **case.options)
            for step in range(len(texts)):
                got = held[f"c.0.{at}.{step}"]
                names.discard(f"c.0.{at}.{step}")
                assert got.shape == want[step].shape, (got.shape, want[step].shape)
                worst = max(worst, float((got - want[step]).abs().max()))
        want = reference.encode(expected.negative, on=on and expected.negative_on, **case.options)
        for step in range(len(expected.negative)):
            names.discard(f"u.0.{step}")
            worst = max(worst, float((held[f"u.0.{step}"] - want[step]).abs().max()))
        assert not names, names
    return worst


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("name", CASES)
def test_the_host_samples_with_the_reference(name: str, on: bool, server: Server, reference: Reference) -> None:
    case = CASES[name]
    if name == "old emphasis option" and not on:
        pytest.skip("the host's old code, which the extension does not touch, is not what the reference does")
    if not on and "seventy" in case.payload["prompt"]:
        pytest.skip("a whole chunk of vectors without a prefix is the host's own affair")
    found = difference(reference, case, sampled(server, case, on), on)
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
        assert "Error" in answer["error"] and answer["errors"].strip(), answer
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
    down, up = (next(value for key, value in LORA.items() if key.endswith(f"lora_{part}.weight"))
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
            assert want <= BOUND, (prompt, on, want)
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
