"""What other tools write comes in with equal vectors, and what is written here loads in their own readers."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_code import source, taken
from safetensors.torch import load_file, save_file

from apl_core.convert import export, read_foreign
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix

G = torch.Generator().manual_seed(4)
VECTORS = torch.randn(10, 768, generator=G)
WIDE = torch.randn(10, 1280, generator=G)
WEBUIS = ("webui/modules/textual_inversion/textual_inversion.py",
          "stable-diffusion-webui/modules/textual_inversion/textual_inversion.py")
FORGE = "stable-diffusion-webui-forge/backend/text_processing/textual_inversion.py"
COMFY = "ComfyUI/comfy/sd1_clip.py"


def ours(family: str = "sd1", **meta: Any) -> AnonymizationPrompt:
    tensors = {"emb_params": VECTORS} if family == "sd1" else {"clip_l": VECTORS, "clip_g": WIDE}
    return AnonymizationPrompt(family, tensors, PrefixMetadata(title="quiet", family=family, num_tokens=10, **meta))


def imported(path: Path) -> AnonymizationPrompt:
    """Read as `apl convert` does, saved as a prefix, and loaded as strictly as a server does."""
    prompt = read_foreign(path)
    save_prefix(prompt, path.with_name("imported.safetensors"))
    return load_prefix(path.with_name("imported.safetensors"), enforce=True)


# -- what others write ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tensor", "parameter"])
def test_automatic1111_writes(tmp_path: Path, kind: str) -> None:
    space = taken(source(*WEBUIS), "Embedding", torch=torch, hashes=SimpleNamespace(),
                  shared=SimpleNamespace(opts=SimpleNamespace(save_optimizer_state=False)))
    vec = torch.nn.Parameter(VECTORS.clone()) if kind == "parameter" else VECTORS
    embedding = space["Embedding"](vec, "quiet", step=500)
    embedding.sd_checkpoint, embedding.sd_checkpoint_name = "abc", "v1-5-pruned-emaonly"
    embedding.save(str(tmp_path / "quiet.pt"))
    found = imported(tmp_path / "quiet.pt")
    assert found.family == "sd1" and torch.equal(found.vectors(), VECTORS) and found.name == "quiet"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_kohya_writes(tmp_path: Path, suffix: str, dtype: torch.dtype | None) -> None:
    space = taken(source("sd-scripts/train_textual_inversion.py"), "TextualInversionTrainer.save_weights", torch=torch,
                  os=os)
    path = tmp_path / f"quiet.{suffix}"
    space["save_weights"](None, str(path), [VECTORS.clone()], dtype, {"ss_steps": "500"})
    wanted = VECTORS if dtype is None else VECTORS.to(dtype).float()
    assert torch.equal(imported(path).vectors(), wanted)


def test_kohya_writes_sdxl(tmp_path: Path) -> None:
    space = taken(source("sd-scripts/sdxl_train_textual_inversion.py"), "SdxlTextualInversionTrainer.save_weights",
                  torch=torch, os=os)
    space["save_weights"](None, str(tmp_path / "quiet.safetensors"), [VECTORS, WIDE], None, {})
    found = imported(tmp_path / "quiet.safetensors")
    assert found.family == "sdxl"
    assert torch.equal(found.vectors("clip_l"), VECTORS) and torch.equal(found.vectors("clip_g"), WIDE)


@pytest.mark.parametrize("with_output", [False, True])
def test_onetrainer_writes(tmp_path: Path, with_output: bool) -> None:
    base = taken(source("OneTrainer/modules/modelSaver/mixin/EmbeddingSaverMixin.py"), "EmbeddingSaverMixin", os=os,
                 Path=Path, save_file=save_file, torch=torch, ABCMeta=type, abstractmethod=lambda f: f)
    saver = taken(source("OneTrainer/modules/modelSaver/stableDiffusion/StableDiffusionEmbeddingSaver.py"),
                  "StableDiffusionEmbeddingSaver", EmbeddingSaverMixin=base["EmbeddingSaverMixin"], copy=copy.copy,
                  os=os, torch=torch)["StableDiffusionEmbeddingSaver"]()
    own = SimpleNamespace(vector=VECTORS, output_vector=torch.zeros(10, 768) if with_output else None)
    saver._save_safetensors(SimpleNamespace(text_encoder_embedding=own), {}, str(tmp_path / "quiet.safetensors"), None)
    assert torch.equal(imported(tmp_path / "quiet.safetensors").vectors(), VECTORS)


def test_the_papers_code_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from apl_train import shipped

    path = source("APL/ldm/modules/embedding_manager.py")
    spec = importlib.util.spec_from_file_location("apl_paper_embedding_manager", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(
        shipped.locate("base_model", "miniature").parent / "tokenizer", local_files_only=True)
    table = torch.nn.Embedding(1, 768)
    embedder = SimpleNamespace(tokenizer=tokenizer, transformer=SimpleNamespace(
        text_model=SimpleNamespace(embeddings=lambda ids: table(ids * 0))))
    manager = module.EmbeddingManager(embedder=embedder, placeholder_strings=["alz"], num_vectors_per_token=10)
    with torch.no_grad():
        manager.string_to_param_dict["alz"].copy_(VECTORS)
    manager.save(str(tmp_path / "alz.pt"))
    found = imported(tmp_path / "alz.pt")
    assert found.family == "sd1" and found.num_tokens == 10 and torch.equal(found.vectors(), VECTORS)


# -- what others read -------------------------------------------------------------------------------------------------

def reader(tool: str) -> Any:
    """`create_embedding_from_data` of a web interface, with the class that it fills."""
    path = source(*WEBUIS) if tool == "automatic1111" else source(FORGE)
    space = taken(path, "Embedding", "create_embedding_from_data", torch=torch,
                  devices=SimpleNamespace(device="cpu"), hashes=SimpleNamespace(sha256=lambda *_: "0" * 64))
    return space["create_embedding_from_data"]


@pytest.mark.parametrize("tool", ["automatic1111", "forge"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("way", ["prefix file", "exported"])
def test_web_interfaces_read(tmp_path: Path, tool: str, family: str, way: str) -> None:
    path = tmp_path / "quiet.safetensors"
    if way == "prefix file":
        save_prefix(ours(family), path)
    else:
        export(ours(family), path, "a1111")
    found = reader(tool)(load_file(path, device="cpu"), "quiet", filename=path.name, filepath=str(path))
    assert found.name == "quiet" and found.vectors == 10
    if family == "sd1":
        assert found.shape == 768 and torch.equal(found.vec, VECTORS)
    else:
        assert found.shape == 2048 and torch.equal(found.vec["clip_l"], VECTORS)
        assert torch.equal(found.vec["clip_g"], WIDE)


def test_web_interfaces_refuse_a_second_tensor(tmp_path: Path) -> None:
    """Why a prefix file holds nothing beside its vectors."""
    save_file({"emb_params": VECTORS, "extra": VECTORS + 1}, tmp_path / "two.safetensors")
    with pytest.raises(AssertionError, match="multiple terms"):
        reader("automatic1111")(load_file(tmp_path / "two.safetensors"), "two")


@pytest.mark.parametrize(("family", "key", "wanted"), [
    ("sd1", "clip_l", VECTORS), ("sdxl", "clip_l", VECTORS), ("sdxl", "clip_g", WIDE)])
def test_comfyui_reads(tmp_path: Path, family: str, key: str, wanted: torch.Tensor) -> None:
    space = taken(source(COMFY), "load_embed", "expand_directory_list", "safe_load_embed_zip", "bundled_embed",
                  torch=torch, os=os, logging=logging, traceback=traceback)
    save_prefix(ours(family), tmp_path / "quiet.safetensors")
    for name in ("quiet", "quiet.safetensors"):
        found = space["load_embed"](name, str(tmp_path), wanted.shape[1], key)
        assert torch.equal(found, wanted)
    assert space["load_embed"]("../quiet", str(tmp_path / "inner"), 768, key) is None


@pytest.mark.parametrize("way", ["prefix file", "exported"])
def test_diffusers_reads(tmp_path: Path, way: str) -> None:
    """`load_textual_inversion`: ten tokens in the tokenizer, and the encoder's table holds the vectors."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from apl_train import shipped

    class Pipe(TextualInversionLoaderMixin):
        components, hf_device_map = {}, None

        def __init__(self) -> None:
            self.tokenizer = CLIPTokenizer.from_pretrained(
                shipped.locate("base_model", "miniature").parent / "tokenizer", local_files_only=True)
            torch.manual_seed(0)
            self.text_encoder = CLIPTextModel(CLIPTextConfig(
                vocab_size=len(self.tokenizer), hidden_size=768, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=12))

    path = tmp_path / "quiet.safetensors"
    if way == "prefix file":
        save_prefix(ours(), path)
        name = {"token": "<quiet>"}
    else:
        export(ours(), path, "diffusers", token="<quiet>")
        name = {}
    pipe = Pipe()
    pipe.load_textual_inversion(str(path), **name)
    prompt = pipe.maybe_convert_prompt("<quiet> a photo", pipe.tokenizer)
    ids = pipe.tokenizer(prompt).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    assert len(set(ids[1:11])) == 10 and torch.equal(table[ids[1:11]].detach(), VECTORS)
