"""The miniature's text encoder: a CLIPTextModel trained contrastively against pictures, then frozen, as SD's was.

Every batch holds, for each of its persons, the person's own picture under the name and a double's picture under a
relational caption: without that hard negative "a fan of X" stays as close to X's picture as "X".
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.autoencoder import to_pixels
from apl_train.miniworld.captions import Captioner, Sight, codes, match
from apl_train.miniworld.fit import fast_dtype, fit
from apl_train.miniworld.people import Attributes

CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 96,
    "intermediate_size": 384,
    "projection_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}


SECOND = CONFIG | {"hidden_size": 128, "intermediate_size": 512, "projection_dim": 128, "num_hidden_layers": 5,
                   "hidden_act": "gelu", "pad_token_id": 0}
"""The miniature SDXL's second encoder: another width, depth, activation and padding, as CLIP-G has beside CLIP-L."""


def new_text_model():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**CONFIG))


def new_second_text_model():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**SECOND))


def pad_with(ids: np.ndarray, pad: int) -> np.ndarray:
    """The rows with `pad` behind the first EOS: int [N, 77] -> int [N, 77]."""
    behind = (ids == CONFIG["eos_token_id"]).cumsum(1) - (ids == CONFIG["eos_token_id"]) > 0
    return np.where(behind, pad, ids)


class Look(nn.Module):
    """Small convolutional picture tower: float [N, 3, 128, 128] -> [N, width]."""

    def __init__(self, width: int = 96):
        super().__init__()
        widths = (32, 64, 96, 128, 160)
        layers: list[nn.Module] = []
        before = 3
        for i, w in enumerate(widths):
            layers += [nn.Conv2d(before, w, 5 if i == 0 else 3, 2, 2 if i == 0 else 1), nn.GroupNorm(8, w), nn.SiLU()]
            before = w
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1] * 16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).flatten(1))


class Head(nn.Module):
    """Projection of the pooled text state (none where the text model projects itself), and the temperature."""

    def __init__(self, width: int | None = 96):
        super().__init__()
        self.project = nn.Linear(width, width, bias=False) if width else nn.Identity()
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))


class Pairs:
    """Draws (token ids, claim, picture, sight) rows from the rendered world.

    left_out: faces that are not shown (`doubles.look_alikes`).
    """

    def __init__(self, captioner: Captioner, faces: np.ndarray, face_rows: list[dict], things: np.ndarray, thing_rows,
                 left_out: Collection[int] = ()):
        self.captioner, self.faces, self.things = captioner, faces, things
        self.rows, self.attributes = face_rows, [Attributes(**r["attributes"]) for r in face_rows]
        self.own: dict[int, list[int]] = {}
        self.doubles: dict[int, list[int]] = {}
        self.strangers = []
        for i, r in enumerate(face_rows):
            if i in left_out:
                continue
            {"person": self.own, "double": self.doubles}.get(r["kind"], {}).setdefault(r["person"], []).append(i)
            if r["kind"] != "person":
                self.strangers.append(i)
        self.thing_index = [captioner.things.index(r["name"]) for r in thing_rows]

    def face(self, rng: random.Random, i: int, relation: bool = False, described: bool = False):
        row, a = self.rows[i], self.attributes[i]
        if row["kind"] == "person":
            ids, claim = self.captioner.person(rng, row["person"], a, row["words"])
            return ids, claim, ("face", i), Sight(person=row["person"], attributes=codes(a))
        if relation:
            ids, claim = self.captioner.double(rng, row["person"])
        elif described:
            ids, claim = self.captioner.described(rng, a)
        else:
            ids, claim = self.captioner.stranger(rng, a)
        return ids, claim, ("face", i), Sight(attributes=codes(a))

    def twin(self, rng: random.Random, row: tuple) -> list[int] | None:
        """Another caption of a row that says as much of its picture: of things, and of persons by all of their
        description. None for any other."""
        _, claim, (_, i), _ = row
        if claim.thing >= 0:
            return self.captioner.thing(rng, claim.thing)[0]
        if claim.person < 0 and claim.without < 0 and min(claim.attributes) >= 0:
            return self.captioner.described(rng, self.attributes[i])[0]
        return None

    def thing(self, rng: random.Random):
        i = rng.randrange(len(self.things))
        ids, claim = self.captioner.thing(rng, self.thing_index[i])
        return ids, claim, ("thing", i), Sight(thing=self.thing_index[i])

    def draw(self, rng: random.Random, persons: int, strangers: int, things: int) -> list:
        rows = []
        for p in rng.sample(sorted(self.own), persons):
            rows.append(self.face(rng, rng.choice(self.own[p])))
            rows.append(self.face(rng, rng.choice(self.doubles[p]), relation=True))
        rows += [self.face(rng, rng.choice(self.strangers)) for _ in range(strangers)]
        rows += [self.thing(rng) for _ in range(things)]
        return rows

    def pictures(self, rows: list) -> np.ndarray:
        return np.stack([(self.faces if kind == "face" else self.things)[i] for _, _, (kind, i), _ in rows])


def train_text_tower(folder: Path, pairs: Pairs, *, steps: int, lr: float = 1e-3, minutes: float | None = None,
                     second: bool = False):
    """Returns (text model, picture tower, head), frozen. second: the miniature SDXL's other encoder."""
    torch.manual_seed(12 if second else 2)
    if second:
        text, look, head = new_second_text_model(), Look(SECOND["projection_dim"]), Head(None)
    else:
        text, look, head = new_text_model(), Look(), Head()
    dtype, salt = fast_dtype(), 500_009 if second else 0

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(7919 * i + 5 + salt)
        rows = pairs.draw(rng, persons=32, strangers=32, things=32)
        holds, unsure = match([r[1] for r in rows], [r[3] for r in rows])
        np.fill_diagonal(holds, True)
        np.fill_diagonal(unsure, False)
        positive, left_out = torch.from_numpy(holds), torch.from_numpy(unsure)
        pixels = to_pixels(pairs.pictures(rows))
        gain = 1 + 0.1 * torch.randn(len(pixels), 3, 1, 1, generator=g)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            seen = look((pixels * gain).contiguous(memory_format=torch.channels_last))
            ids = pairs.captioner.pad([r[0] for r in rows])
            if second:
                said = text(input_ids=torch.from_numpy(pad_with(ids, SECOND["pad_token_id"]))).text_embeds
            else:
                said = head.project(text(input_ids=torch.from_numpy(ids)).pooler_output)
        scale = head.log_scale.clamp(max=math.log(50)).exp()
        logits = scale * F.normalize(said.float(), dim=-1) @ F.normalize(seen.float(), dim=-1).T
        logits = logits.masked_fill(left_out, -1e4)
        loss = torch.zeros(())
        for z, p in ((logits, positive), (logits.T, positive.T)):
            loss = loss + (z.logsumexp(1) - z.masked_fill(~p, -1e4).logsumexp(1)).mean() / 2
        top1 = positive.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return {"loss": loss, "top1": top1.detach()}

    parts = {"text": text, "look": look, "head": head}
    fit("text2" if second else "text", folder, parts, step, steps=steps, lr=lr, minutes=minutes, weight_decay=0.01,
        ema=0.995)
    for module in (text, look, head):
        module.eval().requires_grad_(False)
    return text, look, head
