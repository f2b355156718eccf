"""The shipped miniature in a real WebUI, over HTTP, beside diffusers' pipeline: predictions, pictures, ID-ACC.

Same persons, seeds, steps and guidance on both sides. `APL_PERSONS` and `APL_SEEDS` set how many (8 and 2); with
`APL_RECORD_CLAIMS=1` the figures become claims, and `APL_PICTURES=FOLDER` keeps the pictures to look at.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from webui_host import Server, host_folder, running

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
    pytest.mark.skipif(host_folder() is None, reason="no WebUI: set WEBUI_DIR (tests/a1111/README.md)"),
]


@dataclass(frozen=True)
class Drawn:
    """Both sides' pictures, uint8 [2, persons * seeds or prompts, H, W, 3], off first."""

    host: NDArray[np.uint8]
    diffusers: NDArray[np.uint8]
    neutral_host: NDArray[np.uint8]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as host:
        yield host


@pytest.fixture(scope="module")
def backend() -> Backend:
    return Backend.load(shipped.locate("base_model", "miniature"))


@pytest.fixture(scope="module")
def people() -> tuple:
    return read_evaluation_set(shipped.locate("persons", "miniature")).of_split("test", PERSONS)


def draw(server: Server, prompt: str, seed: int, size: int, on: bool) -> NDArray[np.uint8]:
    arguments = [{"enabled": on, "prefix": "anonymize-miniature"}]
    status, answer = server.txt2img(prompt=prompt, seed=seed, steps=STEPS, cfg_scale=GUIDANCE, width=size, height=size,
                                    sampler_name="DDIM", alwayson_scripts={"anonymize": {"args": arguments}})
    assert status == 200, answer
    return np.array(Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).convert("RGB"))


@pytest.fixture(scope="module")
def drawn(server: Server, backend: Backend, people: tuple) -> Drawn:
    shots = shots_of([(p.name, f"A close-up portrait of {p.name}") for p in people], SEEDS)
    neutral = [n.prompt for n in read_evaluation_set(shipped.locate("persons", "miniature")).of_kind("nonface", 8)]
    vectors = load_prefix(PrefixLibrary([shipped_folder()]).resolve("anonymize-miniature")).tensors
    prompts, seeds = [s.prompt for s in shots], [s.seed for s in shots]
    host = np.stack([[draw(server, p, s, backend.size, on) for p, s in zip(prompts, seeds, strict=True)]
                     for on in (False, True)])
    here = [backend.sample(prompts, seeds, vectors=v, steps=STEPS, guidance=GUIDANCE).images for v in (None, vectors)]
    plain = np.stack([[draw(server, p, 1, backend.size, on) for p in neutral] for on in (False, True)])
    found = Drawn(host, np.stack(here), plain)
    if folder := os.environ.get("APL_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        rows = [np.concatenate(list(side[:12]), axis=1)
                for side in (found.host[0], found.diffusers[0], found.host[1], found.diffusers[1])]
        Image.fromarray(np.concatenate(rows)).save(Path(folder) / "persons.png")
        rows = [np.concatenate(list(side), axis=1) for side in found.neutral_host]
        Image.fromarray(np.concatenate(rows)).save(Path(folder) / "neutral.png")
    return found


def id_acc(pictures: NDArray[np.uint8], people: tuple) -> float:
    """ID-ACC mean (paper sec. 4.2) of persons' pictures, `SEEDS` a person side by side."""
    embedder = load_embedder(shipped.recogniser("miniature"))
    gallery = build_gallery(read_evaluation_set(shipped.locate("persons", "miniature")), people, embedder)
    faces, rows = embedder.faces_of(list(pictures)), []
    for i, person in enumerate(people):
        own = faces[i * SEEDS : (i + 1) * SEEDS]
        found = np.array([float(cosine(f[0].embedding, gallery.row(person))) for f in own if f])
        rows.append(PersonScores(person.name, found, SEEDS))
    return id_acc_mean(rows)


def test_predictions_and_pictures_are_those_of_diffusers(server: Server, backend: Backend, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    edge = backend.size // 8
    latents = torch.randn(8, 4, edge, edge, generator=generator)
    steps = torch.tensor([20, 150, 300, 450, 600, 750, 900, 990])
    with torch.no_grad():
        cond = backend.encode(["", "a dog", "A close-up portrait of otis kelzan", "a red bicycle"] * 2)
        noise = backend.predict(latents, steps, cond)
        picture = backend.vae.decode(latents / 0.18215).sample
    save_file({"latent": latents, "timestep": steps, "cond": cond.states.contiguous()}, tmp_path / "in.safetensors")
    status, answer = server.call("/test/predict", {"file": str(tmp_path / "in.safetensors"),
                                                   "out": str(tmp_path / "out.safetensors")})
    assert status == 200, answer
    found = load_file(tmp_path / "out.safetensors")
    difference = float((found["noise"] - noise).abs().max())
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({"webui-noise": (difference, None, len(noise))})
    assert noise.abs().max() > 0.5  # there is something to compare
    assert difference <= 1e-4, difference
    assert float((found["picture"] - picture).abs().max()) <= 1e-3


@pytest.mark.parametrize("state", ["off", "on"])
def test_id_acc_is_that_of_the_diffusers_pipeline(drawn: Drawn, people: tuple, state: str) -> None:
    index = ("off", "on").index(state)
    here, there = id_acc(drawn.host[index], people), id_acc(drawn.diffusers[index], people)
    print(f"ID-ACC {state}: WebUI {here:.4f}, diffusers {there:.4f}, {len(people)} persons, {SEEDS} seeds")  # noqa: T201
    if os.environ.get("APL_RECORD_CLAIMS"):
        claims.record({f"webui-id-acc-{state}": (abs(here - there), None, len(people))})
    assert abs(here - there) <= 0.03, (here, there)


def test_the_prefix_changes_persons_more_than_things(drawn: Drawn) -> None:
    def moved(pair: NDArray[np.uint8]) -> float:
        return float(np.abs(pair[0].astype(float) - pair[1]).mean())

    assert moved(drawn.neutral_host) < moved(drawn.host)
