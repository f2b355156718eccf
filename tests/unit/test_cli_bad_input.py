"""Wrong checkpoints, settings, datasets and flags on the command line: a message with a way out, and nothing written.

Datasets row by row: test_bad_input.py; prefix files: test_bad_files.py; sources of S_Reg: test_neutral_sources.py.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apl_train.commands import cli

pytest.importorskip("diffusers")
SD_IN = "model.diffusion_model.input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


class Bomb:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return (Path.write_text, (Path("exploded"), "x"))


def model(**shapes: tuple[int, ...]) -> Callable[[Path], object]:
    """A .safetensors file of such tensors: "in_" and "clip" stand for SD1's, other names go in as they are."""
    names = {"in_": SD_IN, "clip": CLIP}
    return lambda path: save_file({names.get(k, k): torch.zeros(s) for k, s in shapes.items()} |
                                  {f"filler.{i}": torch.zeros(2, 2, 2) for i in range(8)}, path)


def text(body: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(body, encoding="utf-8")


def data(body: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(body)


def index(kind: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    return write


def ckpt(value: object) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


MAKE = ["make", "--run", "run", "--checkpoint"]
# what: (file, how it is made, arguments, exit code, part of the message, part of the way out)
CHECKPOINTS = {
    "missing": ("x", None, [*MAKE, "gone.safetensors"], 6, "gone.safetensors does not exist", "Stable Diffusion 1.x"),
    "not on this machine": ("x", None, [*MAKE, "someone/nothing"], 6, "nor a hub model", "hf download"),
    "unknown kind": ("m.onnx", data(b"x"), [*MAKE, "m.onnx"], 6, "not a model of a known kind", "Supported"),
    "pickle": ("m.ckpt", data(b"x"), [*MAKE, "m.ckpt"], 6, "m.ckpt is a pickle", "apl convert m.ckpt"),
    "damaged": ("m.safetensors", data(b"\0" * 100), [*MAKE, "m.safetensors"], 6, "Cannot read m.safetensors", "again"),
    "cut off": ("m.safetensors", lambda p: (model(clip=(8, 64))(p), p.write_bytes(p.read_bytes()[:-8])),
                [*MAKE, "m.safetensors"], 6, "Cannot read m.safetensors", "again"),
    "refiner": ("m.safetensors", model(**{"conditioner.embedders.0.model.x": (2, 2), "in_": (384, 4, 3, 3)}),
                [*MAKE, "m.safetensors"], 6, "the refiner of Stable Diffusion XL", "Supported"),
    "SD2": ("m.safetensors", model(**{"cond_stage_model.model.x": (2, 2), "in_": (320, 4, 3, 3)}),
            [*MAKE, "m.safetensors"], 6, "a Stable Diffusion 2.x model", "Supported"),
    "SD3": ("m.safetensors", model(**{"model.diffusion_model.joint_blocks.0.x": (2, 2)}), [*MAKE, "m.safetensors"], 6,
            "a Stable Diffusion 3 model", "Supported"),
    "Flux": ("m.safetensors", model(**{"double_blocks.0.x": (2, 2)}), [*MAKE, "m.safetensors"], 6, "a Flux model",
             "Supported"),
    "inpainting": ("m.safetensors", model(in_=(320, 9, 3, 3), clip=(8, 64)), [*MAKE, "m.safetensors"], 6,
                   "an inpainting model", "Supported"),
    "LoRA": ("m.safetensors", model(**{"lora_unet_x.lora_down.weight": (2, 2)}), [*MAKE, "m.safetensors"], 6, "a LoRA",
             "Supported"),
    "no text encoder": ("m.safetensors", model(in_=(320, 4, 3, 3)), [*MAKE, "m.safetensors"], 6,
                        "no CLIP text encoder", "Supported"),
    "narrow without a yaml": ("m.safetensors", model(in_=(64, 4, 3, 3), clip=(8, 64)), [*MAKE, "m.safetensors"], 6,
                              "no yaml beside it", "m.yaml"),
    "layers are missing": ("m.safetensors", model(in_=(320, 4, 3, 3), clip=(8, 64)), [*MAKE, "m.safetensors"], 6,
                           "lacks layers", "again"),
    "refiner folder": ("m", index("StableDiffusionXLImg2ImgPipeline"), [*MAKE, "m"], 6,
                       "StableDiffusionXLImg2ImgPipeline", "Supported"),
    "folder of something else": ("m", lambda p: p.mkdir(), [*MAKE, "m"], 6, "Cannot read m/model_index.json", ""),
    "a pickle that runs code": ("m.ckpt", ckpt({"state_dict": Bomb()}),
                                ["convert", "m.ckpt", "--out", "m.safetensors"], 6, "asks to run code", ".safetensors"),
    "a pickle of the oldest kind": ("m.ckpt", data(pickle.dumps(Bomb())),
                                    ["convert", "m.ckpt", "--out", "m.safetensors"], 6, "no readable checkpoint", ""),
    "a checkpoint without tensors": ("m.ckpt", ckpt({"epoch": 3}), ["convert", "m.ckpt", "--out", "m.safetensors"], 6,
                                     "no named tensors", "whole model"),
    "an SD2 pickle": ("m.ckpt", ckpt({"state_dict": {"cond_stage_model.model.x": torch.zeros(2, 2, 2),
                                                     SD_IN: torch.zeros(2, 4, 3, 3)}}),
                      ["convert", "m.ckpt", "--out", "m.safetensors"], 6, "a Stable Diffusion 2.x model", "Supported"),
    "converted to a pickle": ("m.ckpt", ckpt({}), ["convert", "m.ckpt", "--out", "n.ckpt"], 2,
                              "does not end in .safetensors", "n.safetensors"),
}
ID, REG = ["generate", "id", "--out", "set"], ["generate", "reg", "--out", "set"]
DATA = {
    "no people": ("x", None, [*ID, "--people", "gone.csv"], 5, "cannot be read", "CSV file"),
    "people without names": ("p.csv", text("who\nAda\n"), [*ID, "--people", "p.csv"], 5, "column name is missing", ""),
    "people without descriptions": ("p.csv", text("name\nAda\n"), [*ID, "--people", "p.csv"], 5, "has no description",
                                    "--describe"),
    "a name given away": ("p.csv", text("name,description\nAda Hill,Mrs Hill\n"), [*ID, "--people", "p.csv"], 5,
                          "'Hill' of the name", "without any part"),
    "a template without words": ("p.csv", text("name\nAda\n"), [*ID, "--people", "p.csv", "--describe", "template"], 5,
                                 "1 persons have no description", "gender and occupation"),
    "an endpoint that is none": ("p.csv", text("name\nAda\n"), [*ID, "--people", "p.csv", "--describe", "gpt"], 2,
                                 "not an address", "http"),
    "an endpoint without a model": ("p.csv", text("name\nAda\n"), [*ID, "--people", "p.csv", "--describe",
                                                                   "http://127.0.0.1:1/v1"], 2, "no model",
                                    "--describe-model"),
    "nobody home": ("p.csv", text("name\nAda\n"), [*ID, "--people", "p.csv", "--describe", "http://127.0.0.1:1/v1",
                                                   "--describe-model", "m"], 5, "cannot be asked", "by hand"),
    "no pictures each": ("x", None, [*ID, "--each", "0"], 2, "each is 0", "range"),
    "a negative limit": ("x", None, [*ID, "--limit=-1"], 2, "limit is -1", "range"),
    "too many steps": ("x", None, [*ID, "--steps", "5000"], 2, "steps is 5000", "range"),
    "one neutral picture": ("x", None, [*REG, "--count", "1"], 2, "count is 1", "range"),
    "no folder of pictures": ("x", None, [*REG, "--source", "./gone"], 5, "There is no folder", "Check"),
    "pictures without captions": ("pics", lambda p: p.mkdir(), [*REG, "--source", "./pics", "--size", "16"], 5,
                                  "No picture in", "NAME.txt"),
    "COCO without pictures": ("c.json", text("{}"), [*REG, "--source", "c.json"], 2, "needs its pictures", "--images"),
    "prompts of an unknown kind": ("p.csv", text("prompt,kind\na,thing\n"), [*REG, "--source", "p.csv"], 5, "row 2",
                                   "face or nonface"),
    "no such recogniser": ("x", None, [*ID, "--recogniser", "nobody"], 7, "nobody", ""),
    "nothing to validate": ("x", None, ["validate"], 2, "no set to look at", "--s_id"),
    "room for too many vectors": ("x", None, ["validate", "--s_id", "x", "--num_tokens", "70"], 2, "num_tokens is 70",
                                  "range"),
}
SETTINGS = {
    "no steps": ("x", None, ["make", "--run", "run", "--steps=-1"], 2, "steps is -1", "range"),
    "no seeds": ("x", None, ["make", "--run", "run", "--score_seeds", "0"], 2, "score_seeds is 0", "range"),
    "guidance off the scale": ("x", None, ["make", "--run", "run", "--guidance", "99"], 2, "guidance is 99", "7.5"),
    "unknown preset": ("x", None, ["make", "--run", "run", "--preset", "nope"], 2, "preset is 'nope'", "sd15-paper"),
    "unsafe name": ("x", None, ["make", "--run", "run", "--name", "../x"], 3, "../x", ""),
    "no such host": ("x", None, ["make", "--run", "run", "--host", '["gone"]'], 2, "host is 'gone'", "ComfyUI"),
    "nothing to go on with": ("x", None, ["make", "--run", "run", "--go-on"], 2, "holds no `apl make`", "--checkpoint"),
    "damaged plan": ("run", lambda p: (p.mkdir(), (p / "make.json").write_text("{")), ["resume", "run"], 2,
                     "make.json is damaged", "delete"),
    "fp16 on a CPU": ("x", None, ["train", "--run", "run", "--device", "cpu", "--dtype", "fp16", "--dry-run"], 2,
                      "dtype is 'fp16'", "bf16"),
    "unknown dtype": ("x", None, ["train", "--run", "run", "--dtype", "fp8"], 2, "dtype is 'fp8'", "bf16"),
    "unknown offload": ("x", None, ["train", "--run", "run", "--offload", "unet"], 2, "offload is 'unet'", "vae"),
    "unknown device": ("x", None, ["train", "--run", "run", "--device", "tpu"], 2, "device is 'tpu'", "cpu"),
    "a VAE that is not there": ("x", None, ["train", "--run", "run", "--vae", "gone.safetensors", "--dry-run"], 6,
                                "vae: gone.safetensors", "VAE"),
}
USAGE = {
    "what to generate": ["generate"], "an unknown set": ["generate", "both", "--out", "x"],
    "where to": ["generate", "id"], "a word for a number": ["make", "--steps", "many"],
    "an unknown flag": ["make", "--nope"], "an unknown flag of validate": ["validate", "--nope", "x"],
}


def tree(folder: Path) -> dict[str, bytes | None]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("what", [*CHECKPOINTS, *DATA, *SETTINGS])
def test_bad_input(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make, argv, code, message, hint = (CHECKPOINTS | DATA | SETTINGS)[what]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    if make is not None:
        make(tmp_path / name)
    before = tree(tmp_path)
    assert cli.main(argv) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.out == ""
    first, _, rest = said.err.partition("error: ")[2].partition("\n       ")
    assert message in first, said.err
    assert rest.strip() and hint in rest, said.err
    after = tree(tmp_path)
    # drafts of descriptions are kept on purpose: what was found is not asked for again
    assert {k: v for k, v in after.items() if k not in ("set", "set/descriptions.csv")} == before


@pytest.mark.parametrize("what", USAGE)
def test_usage(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(USAGE[what])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and "error: " in said.err and "Traceback" not in said.err and said.out == ""


def test_forty_rows_at_least() -> None:
    assert len(CHECKPOINTS) + len(DATA) + len(SETTINGS) + len(USAGE) >= 40
