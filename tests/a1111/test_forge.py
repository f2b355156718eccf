"""Forge over HTTP, with its own text engine and a full-size SD1.5 checkpoint (`make_sd15.py`): the table again.

`FORGE_DIR` (and `FORGE_PYTHON`) name the checkout, which must have models/Stable-diffusion/random-sd15.safetensors and
this repository linked into extensions/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference
from safetensors import safe_open
from test_proof_table import CASES, MODEL, Case, Pass, difference, text, words
from webui_host import Server, forge_folder, running

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix

FORGE = forge_folder()
CHECKPOINT = "random-sd15.safetensors"
BOUND = 2e-5
ON = {"alwayson_scripts": {"anonymize": {"args": [{"enabled": True, "prefix": "wide"}]}}}
NAMES = ("short", "empty", "65 tokens", "66 tokens", "76 tokens", "131 tokens", "commas", "BREAK", "emphasis, Original",
         "emphasis, No norm", "emphasis over two chunks", "negative", "prompt editing, one and two chunks",
         "AND", "detailer's inner job", "another script's own job", "guidance 0", "weight 0")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FORGE is None, reason="no Forge: set FORGE_DIR (tests/a1111/README.md)"),
    pytest.mark.skipif(FORGE is not None and not (FORGE / "models/Stable-diffusion" / CHECKPOINT).is_file(),
                       reason=f"no {CHECKPOINT}: see make_sd15.py"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    folder = tmp_path_factory.mktemp("prefixes")
    rows = torch.randn(10, 768, generator=torch.Generator().manual_seed(2)) * 0.02
    save_prefix(AnonymizationPrompt("sd1", {"emb_params": rows}, PrefixMetadata(title="wide")),
                folder / "wide.safetensors")
    return folder, rows


@pytest.fixture(scope="module")
def server(prefix: tuple[Path, torch.Tensor]) -> Iterator[Server]:
    options = {"sd_model_checkpoint": CHECKPOINT}
    with running("--apl-dir", str(prefix[0]), forge=True, wait=900, options=options) as host:
        yield host


@pytest.fixture(scope="module")
def reference(prefix: tuple[Path, torch.Tensor]) -> Reference:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    model = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                         num_attention_heads=12, hidden_act="quick_gelu")).eval()
    own, stem, weights = set(model.state_dict()), "cond_stage_model.transformer.text_model.", {}
    with safe_open(FORGE / "models/Stable-diffusion" / CHECKPOINT, "pt") as held:
        for key in held.keys():  # noqa: SIM118
            if key.startswith(stem) and not key.endswith("position_ids"):
                short = key.removeprefix(stem)
                weights[short if short in own else f"text_model.{short}"] = held.get_tensor(key).float()
    model.load_state_dict(weights)
    return Reference(model, CLIPTokenizer.from_pretrained(MODEL / "tokenizer"), prefix[1])


def sampled(server: Server, name: str, case: Case, on: bool) -> list[dict[str, Any]]:
    server.clear()
    server.call("/test/orders", {"late": "", "nested": int("inner" in name)})
    status, answer = server.txt2img(**case.payload, **(ON if on else {}))
    assert status == 200, answer
    info = json.loads(answer["info"])["infotexts"][0]
    assert ("APL: wide [" in info) == on
    assert "TI: APL" not in info  # Forge lists what it takes for a textual inversion
    return server.conds()


@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("name", NAMES)
def test_forge_samples_with_the_reference(name: str, on: bool, server: Server, reference: Reference) -> None:
    found = difference(reference, CASES[name], sampled(server, name, CASES[name], on), on)
    print(f"{name}, {'on' if on else 'off'}: {found:.3g}")  # noqa: T201
    assert found <= BOUND


def test_the_hires_pass_has_its_own_guidance(server: Server, reference: Reference) -> None:
    payload = {"prompt": "x", "negative_prompt": "a man", "enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 1,
               "denoising_strength": 0.6, "hr_upscaler": "Latent", "hr_cfg": 0.5, "hr_prompt": words(66),
               "hr_additional_modules": ["Use same choices"]}
    case = Case(payload, [Pass([[text("x")]], [text("a man")]), Pass([[text(words(66))]], [text("a man")], True)])
    held = sampled(server, "hires", case, True)  # Forge tells scripts of its hires pass twice
    assert difference(reference, case, [held[0], held[-1]], True) <= BOUND


def test_the_toggle_survives_the_hosts_cache(server: Server) -> None:
    seen = []
    for on in (False, True, False, True):
        server.clear()
        assert server.txt2img(prompt="a man", **(ON if on else {}))[0] == 200
        seen.append(server.conds()[0]["c.0.0.0"])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
