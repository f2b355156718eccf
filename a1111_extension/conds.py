"""From a job to its conditioning: the job's choice, the cache's key, and when a negative prompt is a positive one.

Hooks on the host's `processing` and `prompt_parser`: everything that encodes a prompt for a picture passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..apl_core.errors import APLError, PolicyError
from ..apl_core.placement import negative_needs_prefix
from .args import KEY, to_infotext
from .encoder import wanted
from .enforce import SELF_TEST
from .hooks import Hooks
from .jobs import JOBS, Choice, Conditioning
from .models import check_model, encoders_of, loaded_model

_CONDS = "get_conds_with_caching"


def weight_sums(prompts: Sequence[str]) -> list[float]:
    """The sum of the weights of each prompt's parts between AND, as the host parses them."""
    from modules import prompt_parser

    parts, *_ = prompt_parser.get_multicond_prompt_list(list(prompts))
    return [sum(weight for _, weight in each) for each in parts]


def negative_acts_positive(p: Any) -> bool:
    """Whether guidance adds the content of a job's negative prompt, in the pass that is being prepared.

    Raises:
        PlacementError: the guidance scale is not a finite number.
    """
    hires = JOBS.hires
    prompts = list((getattr(p, "hr_prompts", None) if hires else None) or getattr(p, "prompts", None) or ())
    # `p.prompt` is the raw text; the lists exist once the host has applied styles and batches.
    prompts = prompts or [p.prompt if isinstance(p.prompt, str) else str((p.prompt or [""])[0])]
    own = getattr(p, "hr_cfg", None) if hires else None  # Forge's hires pass has a scale of its own
    scale = float(p.cfg_scale if own is None else own)
    return any(negative_needs_prefix(scale, weights) for weights in weight_sums(prompts))


def conditioning_of(p: Any, texts: Any) -> Conditioning:
    """What is known while a job's conditioning is computed. Raises `PlacementError`."""
    policy = JOBS.policy if JOBS.enforced else None
    always = policy is not None and policy.negative == "always"
    consented = bool(policy is not None and policy.consent and not getattr(texts, "is_negative_prompt", False)
                     and len(texts) and all(policy.consent.match(text) for text in texts))
    if consented:
        JOBS.counters["consented"] += 1
    return Conditioning(negative=always or negative_acts_positive(p), consented=consented)


def _conds(original: Any, p: Any, function: Any, required_prompts: Any, *args: Any, **kwargs: Any) -> Any:
    with JOBS.conditions(conditioning_of(p, required_prompts)):
        return original(p, function, required_prompts, *args, **kwargs)


def _hires_conds(original: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
    with JOBS.hires_pass():
        return original(p, *args, **kwargs)


def _cached_params(original: Any, p: Any, required_prompts: Any, *args: Any, **kwargs: Any) -> Any:
    choice = wanted(required_prompts)
    return (*original(p, required_prompts, *args, **kwargs), ("apl", choice.digest if choice else ""))


def _learned_conditioning(original: Any, model: Any, prompts: Any, *args: Any, **kwargs: Any) -> Any:
    """The last common step before the text encoders: afterwards every one of them must have shown its rows."""
    choice = wanted(prompts)
    if choice is None or not len(prompts):
        return original(model, prompts, *args, **kwargs)
    model = model if model is not None else loaded_model()
    check_model(model, choice.prefix)
    before = JOBS.counters["verified_rows"]
    result = original(model, prompts, *args, **kwargs)
    if JOBS.counters["verified_rows"] - before < len(encoders_of(model)):
        JOBS.counters["refused"] += 1
        raise PolicyError("The prompt was encoded by something that the anonymization prompt cannot be put into.",
                          "Nothing was generated. Turn off extensions that replace the text encoding.", field="prompt")
    JOBS.counters["encodes"] += 1
    return result


def _empty_cond(original: Any, *args: Any, **kwargs: Any) -> Any:
    with JOBS.suspend():
        return original(*args, **kwargs)


def _reset_caches(p: Any) -> None:
    """For hosts without `cached_params`, whose cache knows nothing of extensions: forget what another state made."""
    choice = JOBS.current()
    state = choice.digest if choice else "off"
    if JOBS.trusted != state:
        JOBS.trusted = state
        for owner in (type(p), p):
            for name in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
                if hasattr(owner, name):
                    setattr(owner, name, [None, None])


def decide(p: Any) -> Choice | None:
    """The choice for a job that is about to start: the policy's, the outer job's, the user's, or the request's.

    Raises:
        APLError: it is on and cannot be kept: no such file, a bad one, or one that does not fit the model.
    """
    if JOBS.enforced:
        SELF_TEST.check()
        choice = JOBS.forced_choice(loaded_model())
    elif JOBS.stack:
        return JOBS.stack[-1].choice
    else:
        from .library import choice_of
        from .script import arguments_of

        asked = arguments_of(p)
        inherited = JOBS.requests[-1].choice if JOBS.requests else None
        choice = inherited if asked is None else choice_of(asked)
    if choice is not None:
        check_model(loaded_model(), choice.prefix)
    return choice


def _process_images_inner(original: Any, p: Any) -> Any:
    from .compare import remember

    try:
        choice = decide(p)
    except APLError:
        JOBS.counters["refused"] += 1
        raise
    nested = bool(JOBS.stack)
    with JOBS.job(choice, p):
        if not hasattr(type(p), "cached_params"):
            _reset_caches(p)
        p.extra_generation_params.pop(KEY, None)
        if choice is not None:
            JOBS.counters["jobs"] += 1
            p.extra_generation_params[KEY] = to_infotext(choice.name, choice.prefix.content_hash, choice.level)
        result = original(p)
    if not nested:
        remember(p, result, choice)
    return result


def _run_script(original: Any, runner: Any, p: Any, *args: Any) -> Any:
    """A selected script (X/Y/Z plot, loopback, another extension's) may start jobs that carry no arguments of ours."""
    if JOBS.enforced:
        return original(runner, p, *args)
    from .library import choice_of
    from .script import arguments_of

    asked = arguments_of(p, args)
    with JOBS.request(choice_of(asked) if asked is not None else None):
        return original(runner, p, *args)


def patch_processing(hooks: Hooks) -> None:
    """Place the hooks on the host's jobs and conditioning."""
    from modules import processing, prompt_parser, scripts, sd_models

    kind = processing.StableDiffusionProcessing
    hooks.wrap(processing, "process_images_inner", _process_images_inner)
    hooks.wrap(kind, _CONDS, _conds)
    if hasattr(kind, "cached_params"):
        hooks.wrap(kind, "cached_params", _cached_params)
    hires = getattr(processing, "StableDiffusionProcessingTxt2Img", kind)
    if hasattr(hires, "calculate_hr_conds"):
        hooks.wrap(hires, "calculate_hr_conds", _hires_conds)
    hooks.wrap(prompt_parser, "get_learned_conditioning", _learned_conditioning)
    if hasattr(sd_models, "get_empty_cond"):
        hooks.wrap(sd_models, "get_empty_cond", _empty_cond)
    hooks.wrap(scripts.ScriptRunner, "run", _run_script)


