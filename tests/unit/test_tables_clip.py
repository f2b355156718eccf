"""CLIP scores: the shipped picture tower with the shipped text encoder, and the contracts of others' models."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from apl_core.errors import ScoreError
from apl_train import shipped
from apl_train.tables import clip_score

HAS_ONNX = all(importlib.util.find_spec(m) for m in ("onnx", "onnxruntime"))


def can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        return False
    return True


def test_cosines_by_hand() -> None:
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0]])
    assert clip_score.cosines(a, b) == pytest.approx([24 / 25, -1.0])
    with pytest.raises(ScoreError, match="do not pair up"):
        clip_score.cosines(a, b[:1])


@pytest.mark.world
@pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxruntime are not installed")
def test_the_shipped_clip_finds_persons_by_their_names() -> None:
    """References are renders that no tower learned from; chance is 1 in 24."""
    pytest.importorskip("transformers")
    from apl_train.scoring.persons import read_evaluation_set
    from apl_train.tables.instruments import Instruments
    from apl_train.tables.settings import read_settings

    people = read_evaluation_set(shipped.locate("persons", "miniature"))
    persons = people.of_split("test", 24)
    clip = Instruments(read_settings("miniature")).clip
    images = np.stack([people.references(p)[0] for p in persons])
    pictures = clip.features(images)
    texts = clip.texts([f"A close-up portrait of {p.name}" for p in persons])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, pictures)]
    similar = unit[0] @ unit[1].T
    assert (similar.argmax(1) == np.arange(24)).mean() >= 0.9
    own = clip.scores(images, [f"A close-up portrait of {p.name}" for p in persons])
    assert own == pytest.approx(np.diag(similar), abs=1e-5)
    assert own.mean() > 0.5 > 0.1 > clip.scores(images, ["A photo of a toolbox"] * 24).mean()


@pytest.mark.world
@pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxruntime are not installed")
def test_the_projection_is_a_plain_matrix() -> None:
    """The text half in ONNX against numpy with the weights that the file holds."""
    import onnx
    from onnx import numpy_helper

    path = shipped.locate("clip", "miniature")
    graph = onnx.load(str(path.with_name("clip_text.onnx"))).graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    name = next(k.removesuffix(".int8") for k in known if k.endswith(".int8"))
    matrix = known[f"{name}.int8"].astype(np.float32) * known[f"{name}.scale"][:, None]
    states = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    clip = clip_score.OnnxClip(path, lambda prompts: states[: len(prompts)])
    found = clip.texts(["a"] * 5)
    assert np.allclose(found, states @ matrix, atol=1e-4) or np.allclose(found, states @ matrix.T, atol=1e-4)


@pytest.mark.parametrize(("make", "says"), [
    (lambda p: clip_score.OpenClip("ViT-B-32", str(p / "none.bin")), "not a file"),
    (lambda p: clip_score.TorchmetricsClip(str(p / "none")), "not a folder"),
])
def test_weights_that_are_not_here_are_not_fetched(tmp_path: Path, make, says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        make(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not can_import("open_clip"), reason="open_clip cannot be imported beside this torch")
def test_open_clip_scores_as_its_own_code(tmp_path: Path) -> None:
    """A ViT-B-32-quickgelu of random weights, read from a file as real ones are."""
    import open_clip
    from PIL import Image

    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    weights = tmp_path / "clip.pt"
    torch.save(model.state_dict(), weights)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), np.uint8)
    prompts = ["a dog", "a photo of a man", "blue"]
    found = clip_score.OpenClip("ViT-B-32", str(weights)).scores(images, prompts)
    with torch.no_grad():
        a = model.eval().encode_image(torch.stack([prepare(Image.fromarray(i)) for i in images]))
        b = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts))
    assert found == pytest.approx(torch.cosine_similarity(a, b).numpy(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (can_import("torchmetrics.functional.multimodal") and can_import("transformers")),
                    reason="torchmetrics is not installed")
def test_torchmetrics_scores_as_transformers_own_clip(tmp_path: Path) -> None:
    from fakes import tiny_models as tiny
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer")
    config = CLIPConfig(
        text_config={"vocab_size": 49408, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "image_size": 32, "patch_size": 16}, projection_dim=16)
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**size), tokenizer)
    processor.save_pretrained(folder)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    prompts = ["a cat", "bus"]
    found = clip_score.TorchmetricsClip(str(folder)).scores(images, prompts)
    with torch.no_grad():
        given = processor(text=prompts, images=[torch.from_numpy(i).permute(2, 0, 1) for i in images],
                          return_tensors="pt", padding=True)
        out = model(**given)
    want = torch.cosine_similarity(out.image_embeds, out.text_embeds).clamp(min=0)
    assert found == pytest.approx(want.numpy(), abs=1e-4)
