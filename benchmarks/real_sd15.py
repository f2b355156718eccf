"""Stable Diffusion 1.5's own architecture at full size on a CPU: `python benchmarks/real_sd15.py [--work FOLDER]`.

Weights are random, since none may ship; everything else is what a user has: a single file without a yaml, the preset
sd15-paper, pictures of 512 x 512, and no network (every attempt to connect fails). Measured, each in a process of its
own: two training steps and the most memory they take, beside the estimate made before; the prefix's gradient against
equations 5-7 written down once more in plain diffusers; the single file's predictions against the folder's. Needs about
9 GB of memory, 10 GB of disk and a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("write", "train", "reference", "folder", "presets")


def block_network() -> None:
    """From here on, any attempt to reach another machine ends the measurement."""
    import socket

    def refuse(*_args: object, **_options: object) -> None:
        raise SystemExit("something asked the network")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse


def write(work: Path) -> None:
    """The model in both forms, and a set of one named person and one thing."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from apl_train.model.single_file import to_ldm

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # diffusers' defaults are SD1's otherwise
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407, pad_token_id=1))
    save_file({k: v.contiguous() for k, v in to_ldm(unet, vae, text).items()}, work / "sd15.safetensors")
    for module, name in ((unet, "unet"), (vae, "vae"), (text, "text_encoder")):
        module.save_pretrained(work / "folder" / name)
    PNDMScheduler(1000, 0.00085, 0.012, "scaled_linear", skip_prk_steps=True).save_pretrained(work / "folder/scheduler")
    (work / "folder" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    rows = {"id": "Ada Brown,A photo of Ada Brown,\"A female British mathematician, dark hair\",id",
            "reg": ",a red apple on a table,,nonface"}
    for k, (name, row) in enumerate(rows.items()):
        folder = work / name
        folder.mkdir()
        pixels = np.random.default_rng(k).integers(0, 256, (512, 512, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "0.png")
        (folder / "metadata.csv").write_text(f"image,name,prompt,description,kind\n0.png,{row}\n", encoding="utf-8")


def settings(work: Path) -> object:
    """The preset as it ships, for two steps; seed 0 draws one sample of each set."""
    from apl_train.training import config as configs

    return configs.from_dict(configs.preset("sd15-paper") | {
        "base_model": str(work / "sd15.safetensors"), "s_id": str(work / "id"), "s_reg": str(work / "reg"), "steps": 2,
        "device": "cpu", "seed": SEED})


SEED = 0


def train(work: Path) -> None:
    """Two steps through the product; what they saw and what came out goes to train.safetensors."""
    import torch
    from safetensors.torch import save_file

    from apl_train.model.backend import Backend
    from apl_train.training.command import load_training_set
    from apl_train.training.memory import estimate
    from apl_train.training.preflight import PeakMemory
    from apl_train.training.trainer import Trainer

    config, kept = settings(work), {}
    expected = estimate(config.base_model, config)
    print(expected.text(), flush=True)
    with PeakMemory(torch.device("cpu")) as peak:
        backend = Backend.for_settings(config.base_model, config)
        data = load_training_set(backend, config, work / "cache")
        trainer = Trainer(backend, data, config, work / "run", cache=work / "cache")
        (work / "run").mkdir()
        losses, batches, make = [], [], trainer._targets.batch
        trainer._targets.batch = lambda step: batches.append(make(step)) or batches[-1]
        for step in range(2):
            (vectors,) = trainer.vectors.values()
            before = vectors.detach().clone()
            losses.append(trainer.one_step())
            batch = batches[-1]
            kept |= {f"{step}.vectors": before, f"{step}.grad": vectors.grad.detach().clone(), f"{step}.t": batch.t,
                     f"{step}.x_t": batch.x_t, f"{step}.eps_c1": batch.eps_c1, f"{step}.rows": batch.rows}
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, work / "train.safetensors")
    texts = [[data.c1[i], data.c2[i]] for i in range(len(data.c1))]
    found = {"texts": texts, "losses": losses, "peak": peak.bytes, "expected": expected.to_dict()}
    (work / "train.json").write_text(json.dumps(found))


def reference(work: Path) -> None:
    """Equations 3 and 5-7 in plain diffusers and transformers: the prefix as added tokens, as textual inversion has it.

    Nothing of this project is imported.
    """
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextModel, CLIPTokenizer

    seen, told = load_file(work / "train.safetensors"), json.loads((work / "train.json").read_text())
    unet = UNet2DConditionModel.from_pretrained(work / "folder/unet", local_files_only=True).requires_grad_(False)
    text = CLIPTextModel.from_pretrained(work / "folder/text_encoder", local_files_only=True).requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "apl_train/miniworld/assets/model/tokenizer")
    m, alpha, out = len(seen["0.vectors"]), 1.0, {}
    names = [f"<v{i}>" for i in range(m)]
    plain = len(tokenizer)
    tokenizer.add_tokens(names)
    table = torch.nn.Embedding(plain + m, 768)
    table.weight.data[:plain] = text.get_input_embeddings().weight
    text.set_input_embeddings(table)

    def tau(caption: str) -> torch.Tensor:
        ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        return text(ids)[0]

    for step in range(2):
        table.weight.data[plain:] = seen[f"{step}.vectors"]
        table.weight.requires_grad_(True).grad = None
        c1, c2 = told["texts"][int(seen[f"{step}.rows"])]
        x, t = seen[f"{step}.x_t"], seen[f"{step}.t"]
        with torch.no_grad():
            eps_c1, eps_c2 = (unet(x, t, encoder_hidden_states=tau(c)).sample for c in (c1, c2))
        eps = unet(x, t, encoder_hidden_states=tau(" ".join(names) + " " + c1)).sample
        ((eps - (eps_c2 + alpha * (eps_c2 - eps_c1))) ** 2).mean().backward()
        out |= {f"{step}.grad": table.weight.grad[plain:].clone(), f"{step}.eps_c1": eps_c1}
    save_file(out, work / "reference.safetensors")


def folder(work: Path) -> None:
    """The folder read by the product: its predictions for the same inputs."""
    import dataclasses

    import torch
    from safetensors.torch import load_file, save_file

    from apl_train.model.backend import Backend

    seen, told = load_file(work / "train.safetensors"), json.loads((work / "train.json").read_text())
    config = dataclasses.replace(settings(work), base_model=str(work / "folder"))
    backend = Backend.for_settings(config.base_model, config)
    out = {}
    with torch.no_grad():
        for step in range(2):
            row = told["texts"][int(seen[f"{step}.rows"])]
            # both captions in one pass, as the trainer makes its targets of a named person
            captions = list(dict.fromkeys(row))
            n = len(captions)
            eps = backend.predict(seen[f"{step}.x_t"].expand(n, -1, -1, -1), seen[f"{step}.t"].expand(n),
                                  backend.encode(captions))
            out[f"{step}.eps_c1"] = eps[:1].contiguous().clone()
    save_file(out, work / "folder.safetensors")


def presets(work: Path) -> None:
    """What every preset takes on a CUDA device, by the estimate: none need be here."""
    import torch

    from apl_train.training import config as configs
    from apl_train.training.memory import estimate

    found = {name: estimate(work / "sd15.safetensors", configs.from_dict(configs.preset(name)),
                            as_on=torch.device("cuda")).to_dict()
             for name in ("sd15-paper", "sd15-fast", "sd15-8gb")}
    (work / "presets.json").write_text(json.dumps(found))


def compare(work: Path) -> dict[str, Any]:
    """The figures of all stages."""
    from safetensors.torch import load_file

    ours, theirs, again = (load_file(work / f"{name}.safetensors") for name in ("train", "reference", "folder"))
    told = json.loads((work / "train.json").read_text())
    gradient = [float((ours[f"{s}.grad"] - theirs[f"{s}.grad"]).norm() / theirs[f"{s}.grad"].norm()) for s in (0, 1)]
    forms = [float((ours[f"{s}.eps_c1"] - again[f"{s}.eps_c1"]).abs().max()) for s in (0, 1)]
    return {"gradient": max(gradient), "forms": max(forms),
            "memory": abs(told["expected"]["peak"] / told["peak"] - 1), "peak": told["peak"],
            "expected": told["expected"]["peak"], "gradients": gradient,
            "presets": {k: v["peak"] for k, v in json.loads((work / "presets.json").read_text()).items()},
            "kinds": ["id" if row["l_id"] is not None else "reg" for row in told["losses"]]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for models and results; a temporary one by default")
    parser.add_argument("--stage", choices=STAGES, help="run this stage alone, in this process")
    args = parser.parse_args()
    if args.stage:
        block_network()
        globals()[args.stage](args.work)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")} | {"PYTHONPATH": str(ROOT)}
        for stage in STAGES:
            print(f"{stage} ...", flush=True)
            subprocess.run([sys.executable, __file__, "--stage", stage, "--work", str(work)], check=True, env=env)
        found = compare(work)
    sys.path.insert(0, str(ROOT))
    from apl_train import claims

    claims.record({"real-gradient": (1e6 * found["gradient"], None, 2), "real-forms": (found["forms"], None, 2),
                   "real-memory": (found["memory"], None, 1),
                   "real-8gb": (found["presets"]["sd15-8gb"] / 1e9, None, 1)})
    print(f"steps of kind {found['kinds']}: gradient off the reference by {found['gradients']} (relative)\n"
          f"single file and folder: predictions differ by {found['forms']:.2e} at most\n"
          f"memory: {found['peak'] / 2**30:.2f} GiB at most, estimated {found['expected'] / 2**30:.2f} GiB\n"
          "by the estimate, on a GPU: "
          + ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in found["presets"].items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
