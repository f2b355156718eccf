"""The miniature's UNet: diffusers' UNet2DConditionModel, SD1's blocks, epsilon prediction, scaled-linear schedule.

Trained on cached latents together with the text tower, which starts from its contrastive weights; 10% of the captions
are empty (guidance).
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apl_train.miniworld.fit import fast_dtype, fit
from apl_train.miniworld.text_tower import Pairs

CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    # 16 x 16 latents need two levels; attention at the upper one would double the cost of a step
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 96,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon"}
SCALING = 0.18215
"""Latent scale of SD1; the VAE's own output is normalised to 1/SCALING per channel, so hosts need no override."""


def new_unet():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**CONFIG)


def alphas_bar() -> Tensor:
    """Cumulative alphas, float32 [1000]."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0)


def normalise_latents(vae, pixels: Tensor) -> None:
    """Rewrites the VAE's two 1x1 convolutions so that latents x SCALING have mean 0 and deviation 1 per channel."""
    with torch.no_grad():
        mean = torch.cat([vae.encode(p).latent_dist.mean for p in pixels.split(32)])
        mu, sd = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
        k = 1 / (sd * SCALING)
        w, b = vae.quant_conv.weight, vae.quant_conv.bias
        w[:4] *= k[:, None, None, None]
        b[:4] = (b[:4] - mu) * k
        b[4:] += 2 * k.log()
        post = vae.post_quant_conv
        post.bias += (post.weight[:, :, 0, 0] * mu[None]).sum(1)
        post.weight /= k[None, :, None, None]


@torch.no_grad()
def encode_all(vae, pictures: np.ndarray, batch: int = 32) -> Tensor:
    """uint8 [N, 128, 128, 3] -> scaled latents float32 [N, 4, 16, 16] (the mode of the posterior)."""
    from tqdm import tqdm

    from apl_train.miniworld.autoencoder import to_pixels

    dtype, out = fast_dtype(), []
    for i in tqdm(range(0, len(pictures), batch), desc="encode"):
        pixels = to_pixels(pictures[i : i + batch]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out.append(vae.encode(pixels).latent_dist.mean.float() * SCALING)
    return torch.cat(out)


LATE = 2400
"""Draws after which names get most of a batch."""


def draw_rows(pairs: Pairs, rng: random.Random, i: int, batch: int) -> list:
    """Rows of draw `i`: named persons, their doubles under relations and descriptions, other strangers, things.

    Once descriptions are understood, names get most of the batch, and a person's whole description is shown half as
    often as the name: where it was a rarity, it drew the person.
    """
    people = list(pairs.own)
    named, related, described, strangers = (.44, .12, .0, .22) if i < LATE else (.31, .14, .13, .14)
    rows = [pairs.face(rng, rng.choice(pairs.own[rng.choice(people)])) for _ in range(int(batch * named))]
    for share, how in ((related, {"relation": True}), (described, {"described": True})):
        rows += [pairs.face(rng, rng.choice(pairs.doubles[rng.choice(people)]), **how)
                 for _ in range(int(batch * share))]
    rows += [pairs.face(rng, rng.choice(pairs.strangers)) for _ in range(int(batch * strangers))]
    return rows + [pairs.thing(rng) for _ in range(batch - len(rows))]


TWIN_WEIGHT = 10.0


def draw_twins(pairs: Pairs, rng: random.Random, rows: list, count: int) -> tuple[list[int], list[list[int]]]:
    """(places, captions) of `count` rows that name nobody: another caption of what each of them says already.

    Predictions for both are pulled together, as a UNet of this size else hears every word ahead of a prompt a little:
    their mean squared distance fell from 0.0006 to 0.0002 within 700 steps.
    """
    known = {k: twin for k, row in enumerate(rows) if (twin := pairs.twin(rng, row)) is not None}
    places = [rng.choice(list(known)) for _ in range(count)] if len(known) < count else rng.sample(list(known), count)
    return places, [known[k] for k in places]


class _Twice(nn.Module):
    """Upsample2D by views. Compiled for a CPU, the backward of nearest interpolation under bf16 autocast is all zeros
    in this UNet (torch 2.13), and everything below it stands still."""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        n, c, h, w = x.shape
        return self.conv(x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w))


def ready_to_compile(unet: nn.Module) -> nn.Module:
    """The UNet, in place, with operations that torch.compile makes right and fast steps of on a CPU.

    Names and values of its weights stay. Attention goes by plain products: the fused kind's backward is slow there.
    """
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.models.upsampling import Upsample2D

    unet.set_attn_processor(AttnProcessor())
    for module in list(unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample2D):
                setattr(module, name, _Twice(child.conv))
    return unet


def train_unet(folder: Path, pairs: Pairs, text, faces: Tensor, things: Tensor, *, steps: int, batch: int = 32,
               lr: float = 1e-3, minutes: float | None = None, compiled: bool = False, name: str = "unet",
               start=None, seed: int = 0, twins: int = 0):
    """faces, things: scaled latents [N, 4, 16, 16] in the order of `pairs`. Returns the averaged UNet, frozen.

    compiled: through torch.compile, which needs a C++ compiler; the first step waits for it.
    start: a UNet to go on from, under another `name` and `seed`; its text tower then stays as it is, as in fine-tunes.
    twins: rows of a batch that are shown under a second caption too (`draw_twins`).
    """
    torch.manual_seed(3)
    # the contrastive states hold mostly what a picture's description says; who it is must be learned here
    text.requires_grad_(start is None)
    unet = (new_unet() if start is None else copy.deepcopy(start).requires_grad_(True)).train()
    unet = unet.to(memory_format=torch.channels_last)
    unet = ready_to_compile(unet) if compiled else unet
    dtype, bar = fast_dtype(), alphas_bar()
    empty = np.full((1, 77), 49407)
    empty[0, 0] = 49406

    def predict(x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            states = text(input_ids=ids).last_hidden_state
            return unet(x_t, t, encoder_hidden_states=states).sample.float()

    predict = torch.compile(predict) if compiled else predict

    def step(i: int, g: torch.Generator) -> dict[str, Tensor]:
        rng = random.Random(104729 * i + 11 + seed)
        rows = draw_rows(pairs, rng, i if start is None else LATE, batch)
        x0 = torch.stack([(faces if kind == "face" else things)[k] for _, _, (kind, k), _ in rows])
        places, others = draw_twins(pairs, rng, rows, twins) if twins else ([], [])
        ids = pairs.captioner.pad([r[0] for r in rows] + others)
        dropped = torch.rand(len(rows), generator=g).numpy() < 0.1
        dropped[places] = False
        ids[: len(rows)][dropped] = empty
        t = ((1 - torch.rand(len(rows), generator=g) ** 1.5) * 1000).long().clamp(0, 999)
        # a little offset noise: an under-trained UNet else reads the noise's chance mean as a colour (miniworld trap 7)
        noise = torch.randn(x0.shape, generator=g) + 0.05 * torch.randn(len(rows), 4, 1, 1, generator=g)
        a = bar[t][:, None, None, None]
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        x_t = torch.cat([x_t, x_t[places]]).contiguous(memory_format=torch.channels_last)
        found = predict(x_t, torch.cat([t, t[places]]), torch.from_numpy(ids))
        first, second = found[: len(rows)], found[len(rows) :]
        loss = F.mse_loss(first, noise)
        if not places:
            return {"loss": loss}
        apart = F.mse_loss(second, first[places])
        return {"loss": loss + 0.5 * F.mse_loss(second, noise[places]) + TWIN_WEIGHT * apart, "apart": apart.detach()}

    parts = {"unet": unet, "text": text} if start is None else {"unet": unet}
    fit(name, folder, parts, step, steps=steps, lr=lr, ema=0.999, minutes=minutes, seed=seed)
    text.eval().requires_grad_(False)
    return unet.eval().requires_grad_(False)
