"""Every way a prompt can be written, what it comes to, and how far a host's conditioning is from the reference's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from reference import Reference, Rows
from safetensors.torch import save_file
from webui_host import ROOT, Server

MODEL = ROOT / "apl_train" / "miniworld" / "assets" / "model"
PREFIX = ROOT / "embeddings" / "anonymize-miniature.safetensors"
BOUND = 2e-5
"""What two builds of torch and two attention kernels differ by; the cases that are off show the same."""
ON = {"alwayson_scripts": {"anonymize": {"args": [{"enabled": True, "prefix": "anonymize-miniature"}]}}}
LAYER = "encoder.layers.1.self_attn.q_proj"


def inversions(width: int) -> dict[str, torch.Tensor]:
    """Textual inversions by name, [n, width] each: a short one, and one that fills a chunk."""
    return {name: torch.randn(count, width, generator=torch.Generator().manual_seed(count)) * 0.02
            for name, count in (("aplthree", 3), ("aplseventy", 75))}


def lora(width: int) -> dict[str, torch.Tensor]:
    """A LoRA of one layer of the text encoder, as its file holds it."""
    stem = f"lora_te_text_model_{LAYER.replace('.', '_')}"
    return {f"{stem}.alpha": torch.tensor(4.0)} | {
        f"{stem}.{part}": torch.randn(*shape, generator=torch.Generator().manual_seed(len(part))) * 0.3
        for part, shape in (("lora_down.weight", (4, width)), ("lora_up.weight", (width, 4)))}


def surroundings(folder: Path, width: int) -> list[str]:
    """Write inversions, a style and a LoRA; the host's arguments that name them."""
    for name in ("embeddings", "lora"):
        (folder / name).mkdir()
    for name, vectors in inversions(width).items():
        save_file({"emb_params": vectors}, folder / "embeddings" / f"{name}.safetensors")
    (folder / "styles.csv").write_text("name,prompt,negative_prompt\naplstyle,\"{prompt}, in oil on canvas\",blurry\n",
                                       "utf-8")
    save_file(lora(width), folder / "lora" / "apllora.safetensors")
    return ["--embeddings-dir", str(folder / "embeddings"), "--styles-file", str(folder / "styles.csv"), "--lora-dir",
            str(folder / "lora")]


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
                      [Pass([[text("a photo of", Rows("aplthree"), "man")]])]),
    "inversion at a chunk's edge": Case({"prompt": f"{words(64)} aplthree man"},
                                        [Pass([[text(words(64), Rows("aplthree"), "man")]])]),
    "inversion, emphasised": Case(
        {"prompt": "a (aplthree:1.3) man"}, [Pass([[[("a", 1.0), (Rows("aplthree"), 1.3), ("man", 1.0)]]])]),
    "inversion of 75 vectors": Case({"prompt": "a aplseventy man"},
                                    [Pass([[text("a", Rows("aplseventy"), "man")]])]),
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


def sampled(server: Server, case: Case, on: bool) -> list[dict[str, Any]]:
    """What the host samples a case with, pass by pass."""
    server.clear()
    nested = "inner job" in CASE_NAMES.get(id(case), "")
    server.call("/test/orders", {"late": "photo of a tall" if "__late__" in case.payload["prompt"] else "",
                                 "nested": int(nested)})
    status, answer = server.txt2img(**case.payload, **(ON if on else {}))
    assert status == 200, answer
    info = json.loads(answer["info"])["infotexts"][0]
    assert ("APL: anonymize-miniature" in info) == on
    assert "TI: APL" not in info  # Forge lists what it takes for a textual inversion
    return passes_of(server, case)


def passes_of(server: Server, case: Case) -> list[dict[str, Any]]:
    """What was captured of a case."""
    held = server.conds()
    # Forge tells scripts of its hires pass twice.
    return [held[0], held[-1]] if server.is_forge and case.payload.get("enable_hr") else held


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
        if case.payload.get("cfg_scale") == 1 and not any(name.startswith("u.") for name in names):
            assert not names, names  # Forge computes no negative that guidance will not use
            continue
        want = reference.encode(expected.negative, on=on and expected.negative_on, **case.options)
        for step in range(len(expected.negative)):
            names.discard(f"u.0.{step}")
            worst = max(worst, float((held[f"u.0.{step}"] - want[step]).abs().max()))
        assert not names, names
    return worst
