"""One training step as others take it, written anew after their published code, for comparison.

`paper_step`: shiliang26/APL train.py at commit 8e14d91. `inversion_step`: diffusers' examples/textual_inversion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apl_train.model.files import Parts

LENGTH, VECTORS = 77, 10


def _with_vectors(text: Any, ids: Tensor, vectors: Tensor) -> Tensor:
    """States of prompts whose first ten tokens after BOS are `vectors`: [N, 77, W]."""
    def replace(_module: Any, _args: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1], vectors.expand(len(ids), -1, -1), out[:, 1 + VECTORS :]], 1)

    handle = text.get_input_embeddings().register_forward_hook(replace)
    try:
        return text(input_ids=ids).last_hidden_state
    finally:
        handle.remove()


def paper_step(parts: Parts, pixels: Tensor, ids: Tensor, second: Tensor) -> Callable[[], None]:
    """The released code: it encodes the picture every step, predicts three times for samples of either set, one after
    the other, and lets the backward pass compute gradients of all of the UNet's weights, which Adam does not own.

    pixels: float [N, 3, H, W]; ids, second: token ids of c1 (with room for the prefix) and c2, int64 [N, 77]. N is 1 in
    the released code. Its configuration has no gradient checkpointing.
    """
    unet, vae, text = parts.unet, parts.vae.requires_grad_(False), parts.text_encoder.requires_grad_(False)
    unet.requires_grad_(True)
    width, device = text.config.hidden_size, pixels.device
    vectors = torch.nn.Parameter(torch.rand(VECTORS, width, device=device))
    adam = torch.optim.Adam([vectors], lr=1e-3)
    bar = torch.linspace(0.9991, 0.0047, 1000, device=device)

    def predict(x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        return unet(x_t, t, encoder_hidden_states=states, return_dict=False)[0]

    def step() -> None:
        adam.zero_grad()
        with torch.no_grad():
            x0 = vae.encode(pixels, return_dict=False)[0].sample() * 0.18215
            t = torch.zeros(len(pixels), dtype=torch.int64, device=device) + 500
            a = bar[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
            neutral = predict(x_t, t, text(input_ids=second).last_hidden_state)
            private = predict(x_t, t, _with_vectors(text, ids, vectors))
        found = predict(x_t, t, _with_vectors(text, ids, vectors))
        torch.nn.functional.mse_loss(found, neutral - (private - neutral)).backward()
        adam.step()

    return step


def inversion_step(parts: Parts, pixels: Tensor, ids: Tensor) -> Callable[[], None]:
    """diffusers' example with --num_vectors 10: it encodes the pictures every step, predicts once, learns the whole
    token table with AdamW and copies all rows but the new ones back.

    pixels: float [N, 3, H, W]; ids: int64 [N, 77], the new tokens among them.
    """
    unet, vae, text = (m.requires_grad_(False) for m in (parts.unet, parts.vae, parts.text_encoder))
    table = text.get_input_embeddings().weight.requires_grad_(True)
    before = table.detach().clone()
    adam = torch.optim.AdamW([table], lr=5e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    bar = torch.linspace(0.9991, 0.0047, 1000, device=pixels.device)
    ids = ids.clone()
    ids[:, 1 : 1 + VECTORS] = torch.arange(len(table) - VECTORS, len(table), device=ids.device)

    def step() -> None:
        x0 = vae.encode(pixels, return_dict=False)[0].sample().detach() * 0.18215
        noise = torch.randn_like(x0)
        t = torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device) + 500
        a = bar[t].view(-1, 1, 1, 1)
        found = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t,
                     encoder_hidden_states=text(input_ids=ids).last_hidden_state, return_dict=False)[0]
        torch.nn.functional.mse_loss(found, noise).backward()
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            table[:-VECTORS] = before[:-VECTORS]

    return step
