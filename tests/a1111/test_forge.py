"""Forge over HTTP, with its own text engine and a full-size SD1.5 checkpoint (`make_sd15.py`): the whole table again.

The tests are those of `test_proof_table.py`, with a server and a reference of this file. The checkpoint's UNet is all
zeros, and `probe` answers for it: what is looked at is conditioning.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prompt_cases import MODEL, PREFIX, Case, Pass, difference, inversions, sampled, surroundings, text, words
from reference import Reference
from safetensors import safe_open
from test_proof_table import (  # noqa: F401 - collected here again
    test_a_failed_job_leaves_no_state,
    test_a_lora_on_the_text_encoder_and_plain_again,
    test_a_refiner_keeps_it,
    test_an_encode_outside_any_job_is_the_hosts_own,
    test_script_files_run_again_change_nothing,
    test_the_host_samples_with_the_reference,
)
from webui_host import FORGE_CHECKPOINT, Server, forge_folder, running, why_no_forge

from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, save_prefix

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_no_forge()), reason=why_no_forge() or "-"),
    pytest.mark.timeout(1800),
]


def wide_prefix(folder: Path) -> tuple[Path, torch.Tensor]:
    """A prefix for the full size under the shipped one's name, which a user's own folder comes before; and its rows."""
    rows = torch.randn(10, 768, generator=torch.Generator().manual_seed(2)) * 0.02
    path = folder / PREFIX.name
    save_prefix(AnonymizationPrompt("sd1", {"emb_params": rows}, PrefixMetadata(title="wide")), path)
    return path, rows


def forge_reference(rows: torch.Tensor) -> Reference:
    """transformers with the text encoder of Forge's checkpoint."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    model = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                         num_attention_heads=12, hidden_act="quick_gelu")).eval()
    own, stem, weights = set(model.state_dict()), "cond_stage_model.transformer.text_model.", {}
    with safe_open(forge_folder() / "models/Stable-diffusion" / FORGE_CHECKPOINT, "pt") as held:
        for key in held.keys():  # noqa: SIM118
            if key.startswith(stem) and not key.endswith("position_ids"):
                short = key.removeprefix(stem)
                weights[short if short in own else f"text_model.{short}"] = held.get_tensor(key).float()
    model.load_state_dict(weights)
    return Reference(model, CLIPTokenizer.from_pretrained(MODEL / "tokenizer"), rows, inversions(768))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    return wide_prefix(tmp_path_factory.mktemp("prefixes"))


@pytest.fixture(scope="module")
def server(prefix: tuple[Path, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = tmp_path_factory.mktemp("forge")
    (made / "models").mkdir()
    (made / "models" / "other.safetensors").symlink_to(
        forge_folder() / "models/Stable-diffusion" / FORGE_CHECKPOINT)  # a second checkpoint, for the refiner
    with running("--apl-dir", str(prefix[0].parent), *surroundings(made, 768), "--ckpt-dir", str(made / "models"),
                 forge=True, wait=900) as host:
        yield host


@pytest.fixture(scope="module")
def reference(prefix: tuple[Path, torch.Tensor]) -> Reference:
    return forge_reference(prefix[1])


def test_the_hires_pass_has_its_own_guidance(server: Server, reference: Reference) -> None:
    payload = {"prompt": "x", "negative_prompt": "a man", "enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 1,
               "denoising_strength": 0.6, "hr_upscaler": "Latent", "hr_cfg": 0.5, "hr_prompt": words(66)}
    case = Case(payload, [Pass([[text("x")]], [text("a man")]), Pass([[text(words(66))]], [text("a man")], True)])
    assert difference(reference, case, sampled(server, case, True), True) <= 2e-5


def test_the_toggle_survives_the_hosts_cache(server: Server, reference: Reference) -> None:
    """By what is sampled with: this checkpoint's pictures are all alike."""
    seen = []
    for on in (False, True, False, True):
        seen.append(sampled(server, Case({"prompt": "a man"}, []), on)[0]["c.0.0.0"])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
