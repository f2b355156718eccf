"""Before the server serves: a prompt encoded by a small encoder of the host's own, and attempts that have to fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ...apl_core.errors import APLError, PolicyError
from .guard import Guard
from .seal import KEY, Seal

_SHORT, _LONG = "a self-test", "a photo of a person in a garden, " * 25


def run_self_test(guard: Guard) -> dict[str, Any]:
    """What was tested and how long it took.

    Raises:
        PolicyError: something that has to hold does not.
    """
    start = time.perf_counter()
    before = dict(guard.counters)
    families = [family for family in ("sd1", "sdxl") if family in guard.prefixes]
    with torch.inference_mode():
        for family in families:
            _test_family(guard, family)
    with guard._lock:  # the test's own rows are no users' rows
        guard.counters.clear()
        guard.counters.update(before)
    return {"ok": True, "families": families, "seconds": round(time.perf_counter() - start, 3)}


def _small_clip(guard: Guard, family: str) -> Any:
    """A CLIP of the host's classes in the prefix's widths, three layers deep (SDXL skips two); all weights zero."""
    import comfy.sd
    from comfy import sd1_clip, sdxl_clip, supported_models_base

    widths = {("clip_l" if key == "emb_params" else key): width
              for key, width in guard.prefixes[family].widths.items()}
    options = {f"{name}_model_config": {"hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 1,
                                        "intermediate_size": 8} for name, width in widths.items()}
    classes = ((sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel) if family == "sd1"
               else (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel))
    clip = comfy.sd.CLIP(supported_models_base.ClipTarget(*classes), model_options=options | {"dtype": torch.float16})
    for parameter in clip.cond_stage_model.parameters():
        parameter.zero_()
    return clip


def _test_family(guard: Guard, family: str) -> None:
    import comfy.sampler_helpers

    clip = _small_clip(guard, family)
    names = [name for name in ("clip_l", "clip_g") if hasattr(clip.cond_stage_model, name)]
    for text, least in ((_SHORT, 1), (_LONG, 2)):
        chunks = clip.tokenize(text)
        verified = guard.counters["verified_rows"]
        conditioning = clip.encode_from_tokens_scheduled(chunks)
        rows = sum(map(len, chunks.values()))
        if rows < least * len(names) or guard.counters["verified_rows"] != verified + rows:
            raise _failed(family, f"{rows} chunks were encoded, {guard.counters['verified_rows'] - verified} verified")
        if type(conditioning[0][1].get(KEY)) is not Seal:
            raise _failed(family, "a conditioning was not sealed")
    for name in names:
        encoder = getattr(clip.cond_stage_model, name)
        bare = encoder.transformer.get_input_embeddings()(torch.tensor([[49406, 320, 49407] + [0] * 74]),
                                                          out_dtype=torch.float32)
        _must_fail(family, "vectors without the prefix", lambda e=encoder, b=bare: e.transformer(None, None, embeds=b))
        _must_fail(family, "raw token ids",
                   lambda e=encoder: e.transformer.text_model(torch.zeros(1, 77, dtype=torch.long)))
        _must_fail(family, "an over-full chunk", lambda e=encoder: e.process_tokens([[49406, *[320] * 75, 49407]],
                                                                                   torch.device("cpu")))
    if guard.policy.strict:
        foreign = [[torch.zeros(1, 77, 8), {"pooled_output": torch.zeros(1, 8)}]]
        _must_fail(family, "a foreign conditioning", lambda: comfy.sampler_helpers.convert_cond(foreign))


def _must_fail(family: str, what: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except APLError:
        return
    raise _failed(family, f"{what} was not refused")


def _failed(family: str, what: str) -> PolicyError:
    return PolicyError(f"The self-test failed for {family}: {what}.",
                       "Another custom node may interfere: start with this pack alone.", field="self-test")
