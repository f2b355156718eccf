"""The shipped miniature with the shipped prefix: real weights, read by the tools that users have."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from apl_core.identity import load_embedder
from apl_core.library import PrefixLibrary, shipped_folder
from apl_core.prefix import load_prefix
from apl_train import shipped

pytest.importorskip("diffusers")
pytest.importorskip("insightface")
pytestmark = pytest.mark.world
PREFIX = "anonymize-miniature"


@pytest.fixture(scope="module")
def backend():
    from apl_train.model.backend import Backend

    return Backend.load(shipped.locate("base_model", "miniature"))


@pytest.fixture(scope="module")
def prompt():
    return load_prefix(shipped.prefix_file(PREFIX), enforce=True)


def test_prefix_and_levels_are_whole_files_for_this_model(backend, prompt) -> None:
    entry = next(e for e in PrefixLibrary([shipped_folder()]).entries() if e.name == PREFIX)
    assert entry.problem is None and entry.levels and entry.num_tokens == 10
    assert prompt.meta.base_model_sha256 == backend.sha256
    for level in entry.levels:
        at = load_prefix(shipped.prefix_file(f"{PREFIX}@{level}"), enforce=True)
        assert at.meta.level == level and at.meta.base_model_sha256 == backend.sha256


def test_diffusers_loads_the_prefix_as_a_textual_inversion(backend, prompt) -> None:
    """Contract: diffusers' own loader and its own encoding of "<token> prompt" give the states that ours gives."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = shipped.locate("base_model", "miniature").parent / "tokenizer"
    encoder = backend.text.encoders["emb_params"]
    own = CLIPTextModel(encoder.config).eval()  # a copy: the loader enlarges the embedding table
    own.load_state_dict(encoder.state_dict())
    pipe = StableDiffusionPipeline(backend.vae, own, CLIPTokenizer.from_pretrained(folder), backend.unet,
                                   backend._scheduler, None, None, requires_safety_checker=False)
    pipe.load_textual_inversion(str(shipped.prefix_file(PREFIX)), token="<ap>")
    text = "a close-up portrait of a woman with glasses"
    theirs, _ = pipe.encode_prompt(f"<ap> {text}", "cpu", 1, False)
    with torch.no_grad():
        ours = backend.encode([text], prompt).states
    assert torch.allclose(theirs, ours, atol=1e-5)
    with torch.no_grad():
        plain = backend.encode([text]).states
    assert not torch.allclose(plain, ours, atol=1e-2)


def test_single_file_is_the_model_that_diffusers_builds_from_it(backend) -> None:
    """The UNet that diffusers' converter makes of the shipped LDM file predicts what ours predicts."""
    from diffusers.loaders import single_file_utils as convert
    from safetensors.torch import load_file

    tensors = load_file(shipped.locate("base_model", "miniature"))
    own = type(backend.unet)(**{k: v for k, v in backend.unet.config.items() if not k.startswith("_")})
    converted = convert.convert_ldm_unet_checkpoint(tensors, dict(own.config))
    own.load_state_dict({k: v.float() for k, v in converted.items()})
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 16, 16, generator=g), torch.tensor([10, 900])
    with torch.no_grad():
        states = backend.encode(["a red apple", ""])
        theirs = own.eval()(x, t, encoder_hidden_states=states.states).sample
        assert torch.allclose(theirs, backend.predict(x, t, states), atol=1e-4)


def test_persons_are_recognised_without_and_not_with_the_prefix(backend, prompt) -> None:
    from apl_train.scoring.persons import read_evaluation_set

    people = read_evaluation_set(shipped.locate("persons", "miniature"))
    embedder = load_embedder(shipped.recogniser("miniature"))
    persons = people.of_split("test", 6)
    prompts, means = [f"A close-up portrait of {p.name}" for p in persons], {}
    for name, vectors in (("off", None), ("on", prompt)):
        images = backend.sample(prompts, range(6), vectors=vectors).images
        seen = []
        for person, faces in zip(persons, embedder.faces_of(list(images)), strict=True):
            reference = np.mean([embedder.faces(r)[0].embedding for r in people.references(person)], 0)
            seen += [float(f.embedding @ reference / np.linalg.norm(reference)) for f in faces[:1]]
        assert len(seen) == 6  # a face in every picture, with the prefix too
        means[name] = np.mean(seen)
    assert means["on"] < 0.75 * means["off"]  # six pictures; the figures are in benchmarks/prefix.json


def test_splits_share_no_name_and_the_sets_hold_no_test_person() -> None:
    assets = shipped.ASSETS
    with (assets / "people.csv").open(encoding="utf-8", newline="") as file:
        people = list(csv.DictReader(file))
    names = {s: {p["name"] for p in people if p["split"] == s} for s in ("train", "test", "final")}
    for part in (0, 1):  # given names, then surnames
        parts = {s: {n.split()[part] for n in group} for s, group in names.items()}
        assert not parts["train"] & parts["test"] and not parts["final"] & (parts["train"] | parts["test"])
    with (assets / "s_id" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        assert {r["name"] for r in csv.DictReader(file)} == names["train"]
    with (assets / "s_reg" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        captions = [r["prompt"].lower() for r in csv.DictReader(file)]
    with (assets / "neutral.csv").open(encoding="utf-8", newline="") as file:
        neutral = {r["prompt"].lower() for r in csv.DictReader(file)}
    assert not neutral & set(captions)
    assert not [c for c in captions for p in people if p["name"] in c]


def test_shipped_files_stay_within_thirty_megabytes_a_model() -> None:
    """The miniature SD1 with everything that measures it; and the models that are added to it."""
    root = Path(shipped.ASSETS)
    sizes = {p.relative_to(root): p.stat().st_size for p in root.rglob("*") if p.is_file()}
    added = {p: size for p, size in sizes.items() if p.parts[0] == "model_xl" or "relatives" in p.parts}
    assert added and sum(added.values()) <= 30 * 2**20
    assert sum(sizes.values()) - sum(added.values()) <= 30 * 2**20


def test_a_relative_is_put_together_again_once_the_miniature_changed(tmp_path: Path) -> None:
    from apl_train.miniworld import relatives

    assets, out = tmp_path / "assets", tmp_path / "models"
    shutil.copytree(shipped.ASSETS / "model", assets / "model")
    first = relatives.relative_checkpoint("1.4", out, assets)
    written = first.stat().st_mtime_ns
    assert relatives.relative_checkpoint("1.4", out, assets) == first and first.stat().st_mtime_ns == written
    base = assets / "model" / "miniature-sd1.safetensors"
    tensors = load_file(base)
    norm = next(key for key in tensors if key.endswith("final_layer_norm.bias"))
    tensors[norm] += 1
    save_file(tensors, base, {"format": "pt"})
    again = relatives.relative_checkpoint("1.4", out, assets)
    assert again != first
    assert torch.allclose(load_file(again)[norm], load_file(first)[norm] + 1)
