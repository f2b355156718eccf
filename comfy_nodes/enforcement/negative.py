"""The negative prompt. It goes without the prefix only where it does nothing but push away.

Guidance gives u + cfg (c - u) = cfg c + (1 - cfg) u. Above cfg 1 the negative prompt's share is below zero, and the
prefix on both sides would cancel. At or below 1 it is a positive prompt like any other; so it is wherever the positive
one is absent, guidance is computed by something else, or the sampler walks backwards. A negative that changes with time
comes back with the other sign in samplers that subtract their last step; one under a mask below zero, at once. Then the
prefix stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..clip_patch import Layout
from .guard import TAG, Encoder, Guard
from .seal import KEY, Seal, Twin

# All that a conditioning may hold, on either side. What is not listed could make it vanish or change sign somewhere: an
# area, a mask, a start or an end, a schedule, a default.
_HARMLESS = frozenset(
    {KEY, "cross_attn", "pooled_output", "model_conds", "uuid", "width", "height", "crop_w", "crop_h", "target_width",
     "target_height", "aesthetic_score", "control", "control_apply_to_uncond", "concat_latent_image", "concat_mask"}
)
_NEUTRAL = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
_OWN_GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function",
                 "sampler_calc_cond_batch_function", "model_function_wrapper", "context_handler",
                 "denoise_mask_function")
_LAST_LAYERS = "diffusion_model.out."  # turned round by a merge, they turn every prompt's sign
_SAMPLERS = frozenset({"comfy.k_diffusion.sampling", "comfy.samplers", "comfy.extra_samplers.uni_pc"})


def only_pushes_away(guider: Any, sampler: Any, sigmas: Any, denoise_mask: Any = None) -> bool:
    """Whether the negative conditioning of a run is subtracted at every step and everywhere in the picture."""
    import comfy.samplers

    if type(guider) is not comfy.samplers.CFGGuider or type(sampler) is not comfy.samplers.KSAMPLER:
        return False
    cfg = guider.cfg
    if isinstance(cfg, bool) or not isinstance(cfg, int | float) or not math.isfinite(cfg) or cfg <= 1.0:
        return False
    options, patcher = guider.model_options, guider.model_patcher
    if any(options.get(name) for name in _OWN_GUIDANCE) or _any_wrapper(options):
        return False
    if getattr(patcher, "object_patches", None) or any(key.startswith(_LAST_LAYERS) for key in patcher.patches):
        return False
    function = sampler.sampler_function
    if getattr(function, "__module__", "") not in _SAMPLERS or "cfg_pp" in getattr(function, "__name__", "cfg_pp"):
        return False
    positive, negative = (guider.original_conds.get(side) or [] for side in ("positive", "negative"))
    return (bool(positive) and all(map(_is_everywhere, [*positive, *negative])) and _falls(sigmas)
            and (denoise_mask is None or _is_share(denoise_mask)))


def _any_wrapper(options: Mapping[str, Any]) -> bool:
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    return any(functions for keyed in wrappers.values() for functions in keyed.values())


def _is_everywhere(cond: Mapping[str, Any]) -> bool:
    return all(key in _HARMLESS or (key in _NEUTRAL and value == _NEUTRAL[key]) for key, value in cond.items())


def _falls(sigmas: Any) -> bool:
    values = torch.as_tensor(sigmas).detach().to("cpu", torch.float64).flatten()
    return bool(torch.isfinite(values).all() and (values >= 0).all() and (values[1:] < values[:-1]).all())


def _is_share(mask: Any) -> bool:
    return torch.is_tensor(mask) and not mask.is_nested and bool(((mask >= 0) & (mask <= 1)).all())


def hooked_sample(guard: Guard) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `CFGGuider.sample`: negatives lose the prefix for this one run, where that is safe."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def sample(self: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any,
                   **kwargs: Any) -> Any:
            guard.check()
            before = self.original_conds
            if "negative" in before and guard.policy.negative == "auto":
                mask = args[0] if args else kwargs.get("denoise_mask")
                if only_pushes_away(self, sampler, sigmas, mask):
                    negative = [_plain(guard, cond) for cond in before["negative"]]
                    self.original_conds = {**before, "negative": negative}
                else:
                    guard.count("negatives_kept", len(before["negative"]))
            try:
                return original(self, noise, latent_image, sampler, sigmas, *args, **kwargs)
            finally:
                self.original_conds = before

        return sample

    return make


def _plain(guard: Guard, cond: dict[str, Any]) -> dict[str, Any]:
    """The conditioning without the prefix, or as it is where a node changed it or did not encode it here."""
    seal = cond.get(KEY)
    twin = seal.twin if type(seal) is Seal else None
    if (twin is None or twin.cond() is not cond.get("cross_attn")
            or twin.pooled() is not cond.get("pooled_output")):
        guard.count("negatives_kept")
        return cond
    if twin.plain is None:
        twin.plain = _encode_plain(guard, twin)
    guard.count("negatives_plain")
    states, pooled = twin.plain
    plain = {**cond, "cross_attn": states}
    if pooled is not None:
        plain["pooled_output"] = pooled
    return plain


def _encode_plain(guard: Guard, twin: Twin) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens = {name: _without(guard, twin.clip, name, chunks) for name, chunks in twin.tokens.items()}
    with guard.plain():
        states, extra = twin.encode(twin.clip, tokens, twin.unprojected, show_pbar=False)[twin.at]
    return states, extra.get("pooled_output")


def _without(guard: Guard, clip: Any, name: str, chunks: Any) -> Any:
    """An encoder's chunks with the prefix taken out and as many pads at their ends."""
    tokenizer = getattr(clip.tokenizer, f"clip_{name}", None)
    encoder = getattr(tokenizer, TAG, None)
    if not isinstance(encoder, Encoder) or encoder.problem:
        return chunks
    layout = guard.layout(encoder, tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token,
                          tokenizer.max_length)
    return [_plain_chunk(chunk, layout) for chunk in chunks]


def _plain_chunk(chunk: Sequence[tuple], layout: Layout) -> list[tuple]:
    m = len(layout.rows)
    if not layout.carries([entry[0] for entry in chunk]):
        return list(chunk)
    pad = (layout.pad, 1.0, *(0 for _ in chunk[0][2:]))
    return [chunk[0], *chunk[1 + m :], *[pad] * m]
