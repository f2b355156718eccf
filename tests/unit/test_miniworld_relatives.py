"""The relatives of the miniature: another rendering style, another training, another conditioning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apl_core.errors import ModelError
from apl_train.miniworld import denoiser_xl, relatives, restyle, text_tower


def _picture() -> np.ndarray:
    picture = np.full((128, 128, 3), (200, 220, 255), np.uint8)
    picture[30:100, 40:90] = (230, 190, 160)
    picture[30:32, 40:90] = 0
    return picture


def test_the_other_style_keeps_the_face_and_replaces_what_is_behind_it() -> None:
    picture = _picture()
    first, again, other = (restyle.restyle(picture, seed) for seed in (3, 3, 4))
    assert first.shape == picture.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    behind = np.abs(first[:20].astype(int) - picture[:20]).mean()
    assert behind > 40 and np.abs(first[50:80, 55:75].astype(int) - picture[50:80, 55:75]).mean() < behind
    assert first[30:32, 50:80].mean() > 25  # black lines turn brown


@pytest.mark.parametrize("shape", [(12, 7), (8, 4, 3, 3)])
def test_a_change_of_low_rank_comes_back_whole(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Linear(7, 12) if len(shape) == 2 else nn.Conv2d(4, 8, 3)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    flat = (shape[0], int(np.prod(shape[1:])))
    change = (torch.randn(flat[0], 2) @ torch.randn(2, flat[1])).reshape(shape)
    parts = {"weight": relatives.low_rank(change, 2), "bias": relatives.low_rank(torch.ones(shape[0]), 2)}
    assert set(parts["weight"]) == {"down", "up"} and set(parts["bias"]) == {"whole"}
    path = tmp_path / "change.safetensors"
    save_file({f"{key}|{p}": v.contiguous() for key, of in parts.items() for p, v in of.items()}, path)
    relatives.apply_change(module, path)
    after = module.state_dict()
    assert torch.allclose(after["weight"], before["weight"] + change, atol=2e-2)
    assert torch.equal(after["bias"], before["bias"] + 1)


def test_the_best_change_of_a_rank_is_the_truncated_svd() -> None:
    torch.manual_seed(1)
    change = torch.randn(20, 30)
    parts = relatives.low_rank(change, 5)
    values = np.linalg.svd(change.numpy(), compute_uv=False)
    left = (change - parts["up"].float() @ parts["down"].float()).norm().item()
    assert left == pytest.approx(float(np.sqrt((values[5:] ** 2).sum())), rel=1e-3)


def test_a_change_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_file({"weight|whole": torch.zeros(5, 5)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors changes weight"):
        relatives.apply_change(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="no relative"):
        relatives.relative_checkpoint("2.0", tmp_path)


def test_padding_follows_the_first_end_of_text_only() -> None:
    ids = np.array([[49406, 5, 6, 49407, 49407, 49407], [49406, 49407, 49407, 49407, 49407, 49407]])
    assert text_tower.pad_with(ids, 0).tolist() == [[49406, 5, 6, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0]]


def test_the_xl_unet_starts_with_what_the_first_one_draws() -> None:
    """Where both encoders' states are one, the refitted keys and values change nothing but the second's share."""
    from apl_train.miniworld.denoiser import new_unet

    torch.manual_seed(2)
    unet = new_unet().eval()

    class Same(nn.Module):
        def forward(self, input_ids: torch.Tensor, output_hidden_states: bool = True):
            g = torch.Generator().manual_seed(int(input_ids.sum()))
            states = torch.randn(len(input_ids), 77, 96, generator=g)
            return type("Out", (), {"hidden_states": [states, states], "last_hidden_state": states})

    ids = torch.arange(4 * 77).reshape(4, 77)
    xl = denoiser_xl.from_sd1(unet, Same(), ids).eval()
    states = Same()(ids).last_hidden_state
    x, t = torch.randn(4, 4, 16, 16), torch.full((4,), 500)
    both = torch.cat([states, torch.zeros(4, 77, denoiser_xl.SECOND_WIDTH)], dim=-1)
    added = {"text_embeds": torch.randn(4, 128), "time_ids": torch.tensor([[128, 128, 0, 0, 128, 128]] * 4)}
    with torch.no_grad():
        want = unet(x, t, encoder_hidden_states=states).sample
        found = xl(x, t, encoder_hidden_states=both, added_cond_kwargs=added).sample
    assert (found - want).abs().max() < 5e-3
