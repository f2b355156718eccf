"""Foreign embeddings come in with equal vectors, hostile ones run nothing, and exports have the shape readers want."""

from __future__ import annotations

import io
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apl_core.convert import export, read_foreign
from apl_core.errors import PrefixFileError
from apl_core.metadata import PrefixMetadata
from apl_core.prefix import AnonymizationPrompt, load_prefix, save_prefix

VECTORS = torch.randn(10, 768, generator=torch.Generator().manual_seed(1))


def webui(params: Any) -> dict[str, Any]:
    return {
        "string_to_token": {"*": 265}, "string_to_param": params, "name": "from webui", "step": 500,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    }


PICKLES = {
    "webui": lambda: webui({"*": VECTORS}),
    "webui parameter": lambda: webui({"*": torch.nn.Parameter(VECTORS)}),
    "paper": lambda: {"string_to_token": {"alz": torch.tensor(3)}, "string_to_param": {"alz": VECTORS}},
    "paper parameter": lambda: {"string_to_token": {"alz": 3}, "string_to_param": {"alz": torch.nn.Parameter(VECTORS)}},
    "paper parameter dict": lambda: {
        "string_to_token": {"alz": 3}, "string_to_param": torch.nn.ParameterDict({"alz": torch.nn.Parameter(VECTORS)})
    },
    "diffusers": lambda: {"<apl>": VECTORS},
    "half": lambda: webui({"*": VECTORS.half().float().half()}),
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(tmp_path: Path, kind: str, old_format: bool) -> None:
    path = tmp_path / "alz.pt"
    torch.save(PICKLES[kind](), path, _use_new_zipfile_serialization=not old_format)
    try:
        prefix = read_foreign(path)
    except PrefixFileError:  # some versions of torch let no module out of its format before 1.6; all else must be read
        assert old_format and kind == "paper parameter dict"
        return
    wanted = VECTORS.half().float() if kind == "half" else VECTORS
    assert prefix.family == "sd1" and torch.equal(prefix.vectors(), wanted) and not prefix.vectors().requires_grad
    assert prefix.name == ("from webui" if "webui" in kind or kind == "half" else "alz")
    save_prefix(prefix, tmp_path / "out.safetensors")
    assert torch.equal(load_prefix(tmp_path / "out.safetensors", enforce=True).vectors(), wanted)


def test_old_parameter_dict_layout() -> None:
    """Old torch kept the tensors in `_parameters`."""
    from apl_core.convert import _parameter_dict

    class Old:
        def __init__(self) -> None:
            self._parameters = {"alz": VECTORS}

    assert list(_parameter_dict(Old())) == ["alz"]


def test_one_vector_without_its_axis(tmp_path: Path) -> None:
    torch.save({"<apl>": VECTORS[0]}, tmp_path / "learned_embeds.bin")
    assert read_foreign(tmp_path / "learned_embeds.bin").vectors().shape == (1, 768)


SAFETENSORS = {
    "kohya": ({"emb_params": VECTORS}, "sd1"),
    "kohya sdxl": ({"clip_l": VECTORS, "clip_g": torch.ones(10, 1280)}, "sdxl"),
    "onetrainer": ({"emp_params": VECTORS}, "sd1"),
    "onetrainer out": ({"emp_params": VECTORS, "emp_params_out": torch.zeros(10, 768)}, "sd1"),
    "onetrainer sdxl": (
        {"clip_l": VECTORS, "clip_g": torch.ones(10, 1280), "clip_l_out": VECTORS, "clip_g_out": torch.ones(10, 1280)},
        "sdxl",
    ),
    "onetrainer flux": ({"clip_l": VECTORS, "t5": torch.ones(10, 4096)}, "flux"),
    "diffusers": ({"<apl>": VECTORS}, "sd1"),
    "diffusers sd2": ({"<apl>": torch.ones(10, 1024)}, "sd2"),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors, family = SAFETENSORS[kind]
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING, "apl"):
        prefix = read_foreign(tmp_path / "a.safetensors")
    assert prefix.family == family and prefix.name == "a"
    first = "emb_params" if family in ("sd1", "sd2") else "clip_l"
    if family != "sd2":
        assert torch.equal(prefix.vectors(first), VECTORS)
    assert ("left out" in caplog.text) == any(key.endswith("_out") for key in tensors)


class Bomb:
    """A pickle that makes a file when it is read carelessly."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


@pytest.mark.parametrize("where", ["whole", "inside", "plain pickle", "protocol 0", "renamed"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "executed"
    bomb = Bomb(os.mkdir, str(trace))
    path = tmp_path / ("bomb.safetensors" if where == "renamed" else "bomb.pt")
    if where in ("plain pickle", "protocol 0"):
        path.write_bytes(pickle.dumps(webui({"*": bomb}), protocol=0 if where == "protocol 0" else 4))
    else:
        torch.save(bomb if where == "whole" else webui({"*": VECTORS, "x": bomb}), path)
    for read in (read_foreign, load_prefix):
        with pytest.raises(PrefixFileError) as caught:
            read(path)
        assert caught.value.hint and not trace.exists()
    if where in ("whole", "inside", "renamed"):
        with pytest.raises(PrefixFileError, match="run code of its own") as caught:
            read_foreign(path)
        assert "Do not open this file" in caught.value.hint
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)  # the payload is real: a careless reader runs it
        assert trace.exists()


def test_eval_and_module_payloads_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    for call, argument in ((eval, f"open({str(trace)!r}, 'w')"), (os.system, f"touch {trace}")):
        torch.save({"string_to_param": {"*": Bomb(call, argument)}}, tmp_path / "a.pt")
        with pytest.raises(PrefixFileError, match="run code"):
            read_foreign(tmp_path / "a.pt")
        assert not trace.exists()


REFUSED = {
    "image": (b"\x89PNG\r\n\x1a\n" + b"x" * 40, "hidden in pictures", ".safetensors or .pt"),
    "text": (b"hello, this is text and no pickle", "neither safetensors", "download it again"),
    "cut zip": (b"PK\x03\x04" + b"\0" * 30, "neither safetensors", "download it again"),
    "empty": (b"", "is empty", "again"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_with_a_sentence(tmp_path: Path, kind: str) -> None:
    data, message, hint = REFUSED[kind]
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(PrefixFileError) as caught:
        read_foreign(tmp_path / "a.pt")
    assert message in caught.value.message and hint in caught.value.hint


CONTENTS = {
    "list": ([1, 2], "not named tensors"),
    "nothing": ({"string_to_param": {}}, "no embedding"),
    "several": ({"a": VECTORS, "b": VECTORS}, "several tensors"),
    "integers": ({"a": torch.ones(2, 768, dtype=torch.int64)}, "int64"),
    "width": ({"a": torch.ones(2, 100)}, "fit no supported family"),
    "nan": ({"a": torch.full((2, 768), float("nan"))}, "NaN"),
    "too many": ({"a": torch.ones(65, 768)}, "65 vectors"),
    "3-D": ({"a": torch.ones(1, 2, 768)}, "shape"),
    "lone clip_g": ({"clip_g": torch.ones(2, 1280)}, "fit no supported family"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_that_are_no_embedding(tmp_path: Path, kind: str) -> None:
    value, message = CONTENTS[kind]
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(PrefixFileError) as caught:
        read_foreign(tmp_path / "a.pt")
    assert message in caught.value.message and caught.value.hint


def made(family: str, widths: dict[str, int]) -> AnonymizationPrompt:
    tensors = {key: torch.randn(4, width, generator=torch.Generator().manual_seed(2)) for key, width in widths.items()}
    return AnonymizationPrompt(family, tensors, PrefixMetadata(title="my prefix", alpha=0.8))


SD1, SDXL = {"emb_params": 768}, {"clip_l": 768, "clip_g": 1280}


@pytest.mark.parametrize(
    ("family", "widths", "to", "keys"),
    [
        ("sd1", SD1, "a1111", ["emb_params"]), ("sd1", SD1, "kohya", ["emb_params"]),
        ("sd1", SD1, "diffusers", ["<my-prefix>"]), ("sd1", {"emb_params": 96}, "a1111", ["emb_params"]),
        ("sd1", {"emb_params": 96}, "diffusers", ["<my-prefix>"]), ("sdxl", SDXL, "a1111", ["clip_g", "clip_l"]),
        ("sdxl", SDXL, "diffusers", ["clip_g", "clip_l"]),
        ("flux", {"clip_l": 768, "t5xxl": 4096}, "forge-flux", ["clip_l"]),
    ],
)
def test_exports(tmp_path: Path, family: str, widths: dict[str, int], to: str, keys: list[str]) -> None:
    prefix = made(family, widths)
    path = tmp_path / "out.safetensors"
    export(prefix, path, to)
    found = load_file(path)
    assert sorted(found) == keys
    kept = [prefix.tensors.get(key, next(iter(prefix.tensors.values()))) for key in keys]
    assert all(torch.equal(found[key], value) for key, value in zip(keys, kept, strict=True))
    if family != "flux":
        again = read_foreign(path)
        assert again.family == family and again.content_hash == prefix.content_hash and again.meta == prefix.meta


def test_export_token(tmp_path: Path) -> None:
    export(made("sd1", SD1), tmp_path / "a.safetensors", "diffusers", token="<x>")
    assert list(load_file(tmp_path / "a.safetensors")) == ["<x>"]


@pytest.mark.parametrize(
    ("family", "widths", "to", "name", "message"),
    [
        ("sd1", SD1, "invoke", "a.safetensors", "no export target"), ("sd1", SD1, "a1111", "a.pt", "does not end"),
        ("sd1", SD1, "forge-flux", "a.safetensors", "family sd1"),
        ("flux", {"clip_l": 768, "t5xxl": 4096}, "a1111", "a.safetensors", "family flux"),
    ],
)
def test_export_refusals(tmp_path: Path, family: str, widths: dict, to: str, name: str, message: str) -> None:
    with pytest.raises(PrefixFileError) as caught:
        export(made(family, widths), tmp_path / name, to)
    assert message in caught.value.message and caught.value.hint and not list(tmp_path.iterdir())
