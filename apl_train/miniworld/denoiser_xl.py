"""The miniature SDXL's UNet: SDXL's conditioning (two encoders' states side by side, pooled state, sizes) on one world.

As in SDXL the first encoder is Stable Diffusion 1's own, frozen, read at its penultimate layer. The second one, trained
apart from it (`text_tower`), goes on learning here. Its share is made real by dropping either encoder from some
captions, as Stable Diffusion 3 was trained: otherwise the first encoder, which knows the persons, would do all the
work, and carrying a prefix over to the second would be put to no test.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.denoiser import CONFIG, LATE, alphas_bar, draw_rows, encode_all, ready_to_compile
from apl_train.miniworld.fit import fast_dtype, fit
from apl_train.miniworld.render import SIZE
from apl_train.miniworld.text_tower import SECOND, Pairs, pad_with

FIRST_WIDTH, SECOND_WIDTH, SIZES = CONFIG["cross_attention_dim"], SECOND["hidden_size"], 256
CONFIG_XL = CONFIG | {
    "cross_attention_dim": FIRST_WIDTH + SECOND_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    # hosts have this width of a size's embedding written into their code
    "addition_time_embed_dim": SIZES,
    "projection_class_embeddings_input_dim": SECOND["projection_dim"] + 6 * SIZES,
}
DROP_FIRST, DROP_SECOND, DROP_BOTH = 0.35, 0.15, 0.1
"""Shares of captions that lose the first encoder's words, the second's, or both (guidance)."""
RESIZED = 1536
"""Pictures shown once more: half of them blurred as small originals are, half of them cropped."""


@dataclass(frozen=True)
class Resized:
    """Latents of pictures of other sizes or crops: float32 [N, 4, 16, 16], their row of `faces`, int [N, 6] sizes."""

    latents: Tensor
    rows: np.ndarray
    sizes: Tensor


def new_unet_xl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONFIG_XL)


def resized(vae: nn.Module, faces: np.ndarray, count: int = RESIZED, seed: int = 5) -> Resized:
    """Pictures as a real training set has them: enlarged from a small original, or cut out of a larger one."""
    from PIL import Image

    rng, pictures, rows, sizes = random.Random(seed), [], [], []
    smooth = Image.Resampling.BICUBIC
    for i in range(count):
        row = rng.randrange(len(faces))
        picture = Image.fromarray(np.asarray(faces[row]))
        if i % 2:
            edge = rng.randint(24, 96)
            picture = picture.resize((edge, edge), smooth).resize((SIZE, SIZE), smooth)
            sizes.append((edge, edge, 0, 0, SIZE, SIZE))
        else:
            large = SIZE + SIZE // 4
            top, left = rng.randrange(SIZE // 4 + 1), rng.randrange(SIZE // 4 + 1)
            picture = picture.resize((large, large), smooth)
            picture = picture.crop((left, top, left + SIZE, top + SIZE))
            sizes.append((SIZE, SIZE, top, left, SIZE, SIZE))
        pictures.append(np.asarray(picture))
        rows.append(row)
    return Resized(encode_all(vae, np.stack(pictures)), np.array(rows), torch.tensor(sizes))


@torch.no_grad()
def from_sd1(unet: nn.Module, text: nn.Module, ids: Tensor) -> nn.Module:
    """A UNet of SDXL's shape that draws, at the start, what the SD1 miniature draws.

    The keys and values that read the last layer's states are refitted to the penultimate layer's by least squares over
    the captions `ids`, int64 [N, 77]; the second encoder's share starts near zero.
    """
    out = text(input_ids=ids, output_hidden_states=True)
    before, after = out.hidden_states[-2].flatten(0, 1), out.last_hidden_state.flatten(0, 1)
    ridge = 1e-3 * before.pow(2).mean() * len(before) * torch.eye(before.shape[1])
    carry = torch.linalg.solve(before.T @ before + ridge, before.T @ after)  # after ~ before @ carry
    torch.manual_seed(13)
    xl = new_unet_xl()
    own = xl.state_dict()
    for key, value in unet.state_dict().items():
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            value = torch.cat([value @ carry.T, 0.1 * own[key][:, FIRST_WIDTH:]], dim=1)
        own[key] = value.reshape(own[key].shape)
    own["add_embedding.linear_2.weight"].zero_()
    own["add_embedding.linear_2.bias"].zero_()
    xl.load_state_dict(own)
    return xl


def train_unet_xl(folder: Path, pairs: Pairs, text: nn.Module, second: nn.Module, unet: nn.Module, faces: Tensor,
                  things: Tensor, odd: Resized, *, steps: int, batch: int = 32, lr: float = 7e-4,
                  minutes: float | None = None, compiled: bool = False) -> Any:
    """Returns (UNet, second encoder), averaged and frozen.

    text, unet: of the SD1 miniature, frozen; second: contrastively trained, goes on learning.
    faces, things: scaled latents [N, 4, 16, 16] in the order of `pairs`; odd: of other sizes and crops.
    """
    rng = random.Random(17)
    some = torch.from_numpy(pairs.captioner.pad([r[0] for r in draw_rows(pairs, rng, LATE, 192)]))
    xl = from_sd1(unet, text, some).to(memory_format=torch.channels_last)
    xl = ready_to_compile(xl) if compiled else xl
    second.requires_grad_(True)
    dtype, bar = fast_dtype(), alphas_bar()
    by_row: dict[int, list[int]] = {}
    for k, row in enumerate(odd.rows):
        by_row.setdefault(int(row), []).append(k)
    empty = np.full((1, 77), 49407)
    empty[0, 0] = 49406

    def predict(x_t: Tensor, t: Tensor, first_ids: Tensor, second_ids: Tensor, sizes: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                a = text(input_ids=first_ids, output_hidden_states=True).hidden_states[-2]
            out = second(input_ids=second_ids, output_hidden_states=True)
            states = torch.cat([a, out.hidden_states[-2]], dim=-1)
            added = {"text_embeds": out.text_embeds, "time_ids": sizes}
            return xl(x_t, t, encoder_hidden_states=states, added_cond_kwargs=added).sample.float()

    predict = torch.compile(predict) if compiled else predict

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(15_485_863 * i + 7)
        rows = draw_rows(pairs, rng, LATE, batch)
        latents, sizes = [], []
        for _, _, (kind, k), _ in rows:
            other = by_row.get(k) if kind == "face" else None
            if other:  # every use of such a picture, or they would be seen once in an age
                pick = rng.choice(other)
                latents.append(odd.latents[pick])
                sizes.append(odd.sizes[pick])
            else:
                latents.append((faces if kind == "face" else things)[k])
                sizes.append(torch.tensor((SIZE, SIZE, 0, 0, SIZE, SIZE)))
        x0 = torch.stack(latents)
        ids = pairs.captioner.pad([r[0] for r in rows])
        u = torch.rand(len(rows), generator=g).numpy()
        first, both = ids.copy(), u < DROP_BOTH
        first[both | (u >= 1 - DROP_FIRST)] = empty
        other_ids = ids.copy()
        other_ids[both | ((u >= DROP_BOTH) & (u < DROP_BOTH + DROP_SECOND))] = empty
        t = ((1 - torch.rand(len(rows), generator=g) ** 1.5) * 1000).long().clamp(0, 999)
        noise = torch.randn(x0.shape, generator=g) + 0.05 * torch.randn(len(rows), 4, 1, 1, generator=g)
        a = bar[t][:, None, None, None]
        x_t = (a.sqrt() * x0 + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        found = predict(x_t, t, torch.from_numpy(first), torch.from_numpy(pad_with(other_ids, SECOND["pad_token_id"])),
                        torch.stack(sizes))
        return {"loss": F.mse_loss(found, noise)}

    fit("unet_xl", folder, {"unet": xl, "second": second}, step, steps=steps, lr=lr, ema=0.999, minutes=minutes)
    return xl.eval().requires_grad_(False), second.eval().requires_grad_(False)
