"""The shipped miniature in a real ComfyUI: stock Load Checkpoint and KSampler beside diffusers' pipeline.

Same persons, same seeds, same steps and guidance on both sides, without and with the shipped prefix. `APL_PERSONS` and
`APL_SEEDS` set how many (8 and 2); with `APL_RECORD_CLAIMS=1` the figures become claims, and `APL_PICTURES=FOLDER`
keeps the pictures to look at.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_host import ROOT, host_folder, host_python
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from apl_core.id_scores import PersonScores, cosine, id_acc_mean
from apl_core.identity import load_embedder
from apl_core.library import PrefixLibrary, shipped_folder
from apl_core.prefix import load_prefix
from apl_train import claims, shipped
from apl_train.model.backend import Backend
from apl_train.scoring.gallery import build_gallery
from apl_train.scoring.observe import shots_of
from apl_train.scoring.persons import read_evaluation_set

PERSONS, SEEDS = int(os.environ.get("APL_PERSONS", "8")), int(os.environ.get("APL_SEEDS", "2"))
STEPS, GUIDANCE = 20, 3.0
pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md)"),
]


@dataclass(frozen=True)
class Drawn:
    """Both sides' pictures, uint8 [2, persons * seeds or prompts, H, W, 3], off first; and noise predictions.

    `enforced` [persons * seeds, H, W, 3]: a plain workflow's, where a policy is enforced.
    """

    host: NDArray[np.uint8]
    diffusers: NDArray[np.uint8]
    neutral_host: NDArray[np.uint8]
    host_noise: torch.Tensor
    noise: torch.Tensor
    enforced: NDArray[np.uint8]


def _noise_rows(backend: Backend) -> tuple[torch.Tensor, list[int], list[str]]:
    g = torch.Generator().manual_seed(9)
    edge = backend.size // 8
    return (torch.randn(8, 4, edge, edge, generator=g), [20, 150, 300, 450, 600, 750, 900, 990],
            ["", "a dog", "A close-up portrait of otis kelzan", "a red bicycle"] * 2)


def _on_both(folder: Path, prompts: list[str], seeds: list[int], neutral: list[str]) -> Drawn:
    backend = Backend.load(shipped.locate("base_model", "miniature"))
    prefix = PrefixLibrary([shipped_folder()]).resolve("anonymize-miniature")
    vectors = load_prefix(prefix).tensors
    x_t, steps, texts = _noise_rows(backend)
    save_file({"x_t": x_t}, folder / "latents.safetensors")
    rows = [(p, s, on) for on in (False, True) for p, s in zip(prompts, seeds, strict=True)]
    rows += [(p, 1, on) for on in (False, True) for p in neutral]
    job = {"checkpoint": str(shipped.locate("base_model", "miniature")), "prefix": str(prefix), "rows": rows,
           "steps": STEPS, "guidance": GUIDANCE, "size": backend.size, "latents": str(folder / "latents.safetensors"),
           "timesteps": steps, "prompts": texts, "policy": str(folder / "policy.json")}
    (folder / "policy.json").write_text(json.dumps({"mode": "enforced", "embeddings": {"sd1": {
        "file": str(prefix), "sha256": hashlib.sha256(prefix.read_bytes()).hexdigest()}}}), encoding="utf-8")
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    host = host_folder()
    keep = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "APL_POLICY")}
    script = Path(__file__).with_name("draw_in_host.py")
    done = subprocess.run([host_python(host), str(script), str(host), str(ROOT), str(folder / "job.json"),
                           str(folder / "out.safetensors")], cwd=host, env=keep, capture_output=True, text=True,
                          timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = load_file(folder / "out.safetensors")
    with torch.no_grad():
        noise = backend.predict(x_t, torch.tensor(steps), backend.encode(texts))
    here = [backend.sample(prompts, seeds, vectors=v, steps=STEPS, guidance=GUIDANCE).images for v in (None, vectors)]
    images, people = found["images"].numpy(), 2 * len(prompts)
    return Drawn(images[:people].reshape(2, len(prompts), *images.shape[1:]), np.stack(here),
                 images[people:].reshape(2, len(neutral), *images.shape[1:]), found["noise"], noise,
                 found["enforced"].numpy()[: len(prompts)])


@pytest.fixture(scope="module")
def people() -> tuple:
    return read_evaluation_set(shipped.locate("persons", "miniature")).of_split("test", PERSONS)


@pytest.fixture(scope="module")
def drawn(people: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    shots = shots_of([(p.name, f"A close-up portrait of {p.name}") for p in people], SEEDS)
    neutral = [n.prompt for n in read_evaluation_set(shipped.locate("persons", "miniature")).of_kind("nonface", 8)]
    found = _on_both(tmp_path_factory.mktemp("host"), [s.prompt for s in shots], [s.seed for s in shots], neutral)
    if folder := os.environ.get("APL_PICTURES"):
        _keep(found, Path(folder))
    yield found


def _keep(found: Drawn, folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(side[:12]), axis=1) for side in (
        found.host[0], found.diffusers[0], found.host[1], found.diffusers[1], found.enforced)]
    Image.fromarray(np.concatenate(rows)).save(folder / "persons.png")
    Image.fromarray(np.concatenate([np.concatenate(list(side), axis=1) for side in found.neutral_host])).save(
        folder / "neutral.png")


def _id_acc(pictures: NDArray[np.uint8], people: tuple) -> float:
    """ID-ACC mean (paper sec. 4.2) of persons' pictures, `SEEDS` a person side by side."""
    embedder = load_embedder(shipped.recogniser("miniature"))
    gallery = build_gallery(read_evaluation_set(shipped.locate("persons", "miniature")), people, embedder)
    faces = embedder.faces_of(list(pictures))
    rows = []
    for i, person in enumerate(people):
        own = faces[i * SEEDS : (i + 1) * SEEDS]
        found = np.array([float(cosine(f[0].embedding, gallery.row(person))) for f in own if f])
        rows.append(PersonScores(person.name, found, SEEDS))
    return id_acc_mean(rows)


def test_noise_predictions_are_those_of_diffusers(drawn: Drawn) -> None:
    difference = float((drawn.host_noise - drawn.noise).abs().max())
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"comfy-noise": (difference, None, len(drawn.noise))})
    assert drawn.noise.abs().max() > 0.5  # there is something to compare
    assert difference <= 1e-4, difference


@pytest.mark.parametrize("state", ["off", "on"])
def test_id_acc_is_that_of_the_diffusers_pipeline(drawn: Drawn, people: tuple, state: str) -> None:
    index = ("off", "on").index(state)
    here, there = _id_acc(drawn.host[index], people), _id_acc(drawn.diffusers[index], people)
    print(f"ID-ACC {state}: ComfyUI {here:.4f}, diffusers {there:.4f}, {len(people)} persons, {SEEDS} seeds")  # noqa: T201
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({f"comfy-id-acc-{state}": (abs(here - there), None, len(people))})
    assert abs(here - there) <= 0.03, (here, there)


def test_an_enforced_picture_is_the_trained_prefixs(drawn: Drawn) -> None:
    """A plain workflow on an enforced server draws the backend's prefixed picture, and not the one without."""
    def apart(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.abs(one.astype(float) - other).reshape(len(one), -1).mean(1)

    assert np.array_equal(drawn.enforced, drawn.host[1])  # those that are wired by hand, to the last bit
    same, bare = apart(drawn.enforced, drawn.diffusers[1]), apart(drawn.enforced, drawn.diffusers[0])
    told = "of 255, from diffusers: with the prefix {:.2f} (at most {:.2f}), without {:.2f} (at least {:.2f})"
    print(told.format(same.mean(), same.max(), bare.mean(), bare.min()))  # noqa: T201
    assert (same < 2).all() and (bare > 2 * same).all() and bare.mean() > 8, (same, bare)


def test_the_prefix_changes_persons_more_than_things(drawn: Drawn) -> None:
    def moved(pair: NDArray[np.uint8]) -> float:
        return float(np.abs(pair[0].astype(float) - pair[1]).mean())

    assert moved(drawn.neutral_host) < moved(drawn.host)
