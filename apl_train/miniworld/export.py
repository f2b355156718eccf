"""What ships of the miniature world: the checkpoint, the measuring models, the persons and both training sets.

Everything is written under names and formats that real ones have: a single-file checkpoint with its yaml and tokenizer,
ONNX models with JSON manifests, CSV tables with zipped pictures. Nothing that reads them knows that they are miniature.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from tqdm import tqdm

from apl_core.atomic import write_bytes, write_json, write_safetensors, write_text
from apl_train.miniworld import relatives, sdxl_file
from apl_train.miniworld.build import Build
from apl_train.miniworld.denoiser import LATE, draw_rows
from apl_train.miniworld.newcomers import write_newcomers
from apl_train.miniworld.onnx_export import exported
from apl_train.miniworld.people import HEADS, draw_attributes
from apl_train.miniworld.picture_tower import write_clip
from apl_train.miniworld.presence import Looker
from apl_train.miniworld.recogniser import CROP
from apl_train.miniworld.render import SIZE
from apl_train.miniworld.set_files import write_pictures, write_table

C1_TEMPLATES = ("A photo of {}", "A portrait of {}", "A close-up photo of {}", "A close-up portrait of {}", "{}")
"""Caption templates of S_ID (the paper's own code uses these)."""
IMAGES_PER_PERSON = 4
REFERENCES = 4
HELD_OUT_THINGS = 48
"""Things that S_Reg does not show: drift is measured on them."""
UNNAMED_PROMPTS = 48


# -- models -----------------------------------------------------------------------------------------------------------

def write_checkpoint(build: Build, assets: Path) -> None:
    """model/miniature-sd1.safetensors (fp16, LDM names), its yaml and its tokenizer."""
    from apl_train.model.single_file import ldm_config, to_ldm

    folder = assets / "model"
    unet, text = build.unet, build.tower
    build.vae.register_to_config(scaling_factor=0.18215)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in to_ldm(unet, build.vae, text).items()}
    write_safetensors(folder / "miniature-sd1.safetensors", tensors, {"format": "pt"})
    config = ldm_config(unet, build.vae, text)
    write_text(folder / "miniature-sd1.yaml", yaml.safe_dump(config, sort_keys=False))
    build.tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        source = build.work / "tokenizer" / name
        if source.exists():
            shutil.copyfile(source, folder / "tokenizer" / name)
    vocabulary = folder / "tokenizer" / "vocab.json"
    words = json.loads(vocabulary.read_text(encoding="utf-8"))
    write_text(vocabulary, json.dumps(words, ensure_ascii=False, separators=(",", ":")))
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)  # three times as large, and says the same


class _Named(nn.Module):
    """A Looker whose heads come out as a tuple, as ONNX wants them."""

    def __init__(self, look: Looker, heads: Sequence[str]) -> None:
        super().__init__()
        self.look, self.heads = look, tuple(heads)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.look(x)
        return tuple(out[h] for h in self.heads)


def write_onnx(path: Path, module: nn.Module, edge: int, outputs: Sequence[str]) -> None:
    """One ONNX file with half-precision weights (widened again at load), input float32 [N, 3, edge, edge]."""
    write_bytes(path, _halved(exported(module, (3, edge, edge), outputs)).SerializeToString())


def _halved(model):
    """Stores the large weights as float16 followed by a Cast: half the size, same arithmetic."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in list(model.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 256:
            name = tensor.name
            model.graph.initializer.remove(tensor)
            model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], f"widen.{name}", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(casts + nodes)
    return model


def write_faces(build: Build, assets: Path) -> None:
    """faces/: both recognisers, the presence model (is there a face?) and the attribute model, with their manifests."""
    folder = assets / "faces"
    x0, y0, x1, y1 = CROP
    write_onnx(folder / "presence.onnx", _Named(build.presence, ["face"]), SIZE, ["face"])
    for name in ("recogniser", "recogniser2"):
        write_onnx(folder / f"{name}.onnx", getattr(build, name), 112, ["embedding"])
        write_json(folder / f"{name}.json", {
            "name": f"miniature-{name}", "recogniser": f"{name}.onnx",
            "detector": {"kind": "still", "presence": "presence.onnx", "crop": [x0, y0, x1, y1], "frame": SIZE,
                         "threshold": 0.5},
        })
    write_onnx(folder / "attributes.onnx", _Named(build.attributes, list(HEADS)), SIZE, list(HEADS))
    heads = {k: list(v) for k, v in HEADS.items()}
    write_clip(folder, *build.text[1:])
    write_json(folder / "attributes.json", {"model": "attributes.onnx", "frame": SIZE, "heads": heads})


# -- tables and pictures ----------------------------------------------------------------------------------------------

def write_people(build: Build, assets: Path) -> None:
    """people.csv and references.zip: renders that no generative model has seen; they stand for photos."""
    people = build.people
    rows = [(p.name, p.split, p.attributes.describe(), json.dumps(asdict(p.attributes))) for p in people]
    write_table(assets / "people.csv", ("name", "split", "description", "attributes"), rows)
    pictures, about = build.pictures("references")
    counts: dict[int, int] = {}
    chosen = []
    for i, row in enumerate(about):
        k = counts.get(row["person"], 0)
        if k < REFERENCES:
            chosen.append((f"{people[row['person']].name}/{k}.webp", pictures[i]))
        counts[row["person"]] = k + 1
    write_pictures(assets / "references.zip", chosen, quality=42)


def neutral_prompts(build: Build) -> tuple[list[str], list[str], list[str], list[str]]:
    """(things of S_Reg, held-out things, unnamed-face captions of S_Reg, held-out ones); seeded, no overlap."""
    rng = random.Random(77)
    names = list(dict.fromkeys(r["name"] for r in build.pictures("things")[1]))
    rng.shuffle(names)
    faces: list[str] = []
    simple = ["a woman", "a man", "a lady", "a gentleman"]
    while len(faces) < UNNAMED_PROMPTS + 160:
        a = draw_attributes(rng)
        kind = rng.random()
        if kind < 0.5:
            text = a.describe()
        elif kind < 0.8:
            hair = "a shaved head" if a.hair == "shaved" else f"{a.hair} {a.hair_colour} hair"
            text = f"a {a.gender} {a.occupation} with {hair}"
        else:
            extra = {"glasses": " with glasses"}.get(a.glasses, "")
            template, nouns = rng.choice(C1_TEMPLATES[:4]), simple[::2] if a.gender == "female" else simple[1::2]
            text = template.format(rng.choice(nouns)) + extra
        if text not in faces:
            faces.append(text)
    return names[HELD_OUT_THINGS:], names[:HELD_OUT_THINGS], faces[UNNAMED_PROMPTS:], faces[:UNNAMED_PROMPTS]


def write_neutral(build: Build, assets: Path) -> None:
    """neutral.csv: prompts that name nobody, on which drift is measured; S_Reg holds none of them."""
    _, things, _, faces = neutral_prompts(build)
    rows = [(f"A photo of a {t}", "nonface") for t in things] + [(f, "unnamed_face") for f in faces]
    write_table(assets / "neutral.csv", ("prompt", "kind"), rows)


def write_captions(build: Build, assets: Path, count: int = 4000) -> None:
    """captions.txt: captions as training draws them. How often they use a token says how well its row was learned."""
    rows = draw_rows(build.pairs, random.Random(31), LATE, count)
    texts = [build.tokenizer.decode(row[0]).strip() for row in rows]
    write_text(assets / "captions.txt", "\n".join(texts) + "\n")


def write_all(build: Build, assets: Path) -> None:
    """Everything but the training sets, which the exported checkpoint generates itself, and the other models."""
    write_checkpoint(build, assets)
    write_faces(build, assets)
    write_people(build, assets)
    write_neutral(build, assets)
    write_captions(build, assets)
    write_newcomers(assets / "newcomers")


def write_family(build: Build, assets: Path) -> None:
    """The miniature SDXL and the relatives of the miniature SD1, as what they add to it."""
    unet, second = build.unet_xl
    sdxl_file.write_parts(assets / "model_xl", unet, second)
    for name in relatives.RECIPES:
        relatives.write_relative(build, assets, name)


def write_dataset(build: Build, assets: Path) -> None:
    """S_ID and S_Reg, generated by the exported checkpoint itself: x_i from c1 (paper sec. 4.1), pictures without a
    face drawn again with the next seed."""
    from apl_core.identity import load_embedder
    from apl_train.model.backend import Backend
    from apl_train.seeds import seed_of

    backend = Backend.load(assets / "model" / "miniature-sd1.safetensors")
    embedder = load_embedder(assets / "faces" / "recogniser.json")
    jobs = [(p.name, C1_TEMPLATES[k % len(C1_TEMPLATES)].format(p.name), p.attributes.describe())
            for p in build.people if p.split == "train" for k in range(IMAGES_PER_PERSON)]
    pictures = _generate(backend, [c1 for _, c1, _ in jobs], embedder, wanted=True, label="S_ID", seed_of=seed_of)
    _write_set(assets / "s_id", [(n, c1, c2, "id") for n, c1, c2 in jobs], pictures)
    things, _, faces, _ = neutral_prompts(build)
    captions = [C1_TEMPLATES[i % len(C1_TEMPLATES)].format(f"a {t}") for i, t in enumerate(things)]
    shown = _generate(backend, captions, embedder, wanted=False, label="S_Reg things", seed_of=seed_of)
    persons = _generate(backend, faces, embedder, wanted=True, label="S_Reg faces", seed_of=seed_of)
    rows = [("", c, "", "nonface") for c in captions] + [("", c, "", "face") for c in faces]
    _write_set(assets / "s_reg", rows, np.concatenate([shown, persons]))


def _generate(
    backend, prompts: list[str], embedder, *, wanted: bool, label: str, seed_of, tries: int = 3
) -> np.ndarray:
    todo = list(range(len(prompts)))
    out: np.ndarray | None = None
    for attempt in range(tries):
        with tqdm(total=len(todo), desc=f"generate {label}") as bar:
            last = 0

            def tell(done: int, _total: int, bar=bar) -> None:
                nonlocal last
                bar.update(done - last)
                last = done

            seeds = [seed_of(label, i, attempt) % 2**31 for i in todo]
            made = backend.sample([prompts[i] for i in todo], seeds, progress=tell)
        out = np.zeros((len(prompts), *made.images.shape[1:]), np.uint8) if out is None else out
        out[todo] = made.images
        found = [bool(f) for f in embedder.faces_of(list(made.images))]
        todo = [i for i, face in zip(todo, found, strict=True) if face != wanted]
        if not todo:
            break
    return out


def _write_set(folder: Path, rows: list[tuple[str, str, str, str]], pictures: np.ndarray) -> None:
    names = [f"{i:04d}.webp" for i in range(len(rows))]
    write_pictures(folder / "images.zip", zip(names, pictures, strict=True), quality=82)
    write_table(folder / "metadata.csv", ("image", "name", "prompt", "description", "kind"),
                [(image, name, c1, c2, kind) for image, (name, c1, c2, kind) in zip(names, rows, strict=True)])
