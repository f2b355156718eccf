"""Switching enforced mode on while ComfyUI starts, and seeing to it that it stays on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from ...apl_core.errors import APLError, PolicyError
from ...apl_core.policy import Policy, current_policy
from .encoding import hooked_clip_init, hooked_forward, hooked_process_tokens, hooked_tokenize
from .graph import hooked_validate, remove_denied
from .guard import Guard
from .hooks import Hooks, refuse_to_start, stop_serving
from .negative import hooked_sample
from .seal import Sealer
from .selftest import run_self_test
from .status import Status

WATCH_SECONDS = 1.0
_log = logging.getLogger("apl")


def switch_on() -> Status | None:
    """Read the policy and do what it says; None where there is no policy. Called before any node of this pack is made.

    Raises:
        SystemExit: 78, when there is a policy and it cannot be kept.
    """
    try:
        policy = current_policy()
        if policy is None:
            return None
        if not policy.enforced:
            _log.info("APL policy %s: mode %s, users decide.", policy.source, policy.mode)
            status = Status(policy)
            _serve(status)
            return status
        return enforce(policy)
    except Exception as error:  # whatever it is: a server that was to be enforced must not start without
        refuse_to_start(error)


def enforce(policy: Policy) -> Status:
    """Place every hook and arrange for the checks at start-up.

    Raises:
        APLError: the policy's files are not what it says, or this host cannot be enforced.
    """
    from comfy.cli_args import args

    if getattr(args, "enable_manager", False):
        raise PolicyError("ComfyUI-Manager is on, which lets users install code.", "Start without --enable-manager.",
                          field="enable_manager")
    guard = Guard(policy, policy.load_prefixes())
    hooks, sealer = Hooks(), Sealer(guard)
    place_all(hooks, guard, sealer)
    status = Status(policy, guard, hooks)
    _serve(status)
    _log.warning("APL enforced mode is on: %s, policy %s (sha256 %s).", ", ".join(
        f"{family} {prefix.name}" for family, prefix in guard.prefixes.items()), policy.source, policy.sha256[:16])
    return status


def place_all(hooks: Hooks, guard: Guard, sealer: Sealer) -> None:
    """Every hook of the enforcement. Raises `PolicyError` where one cannot be placed."""
    import comfy.clip_model
    import comfy.sampler_helpers
    import comfy.samplers
    import comfy.sd
    import comfy.sd1_clip
    import execution

    def check() -> None:
        if missing := hooks.missing():
            stop_serving(f"{', '.join(missing)} was replaced while the server was running.")

    hooks.place(comfy.sd1_clip, "SDTokenizer.tokenize_with_weights", ("self", "text", "return_word_ids"),
                hooked_tokenize(guard))
    hooks.place(comfy.sd1_clip, "SDClipModel.process_tokens", ("self", "tokens", "device"),
                hooked_process_tokens(guard))
    hooks.place(comfy.clip_model, "CLIPTextModel_.forward", ("self", "input_tokens", "attention_mask", "embeds"),
                hooked_forward(guard, sealer.workings))
    hooks.place(comfy.sd, "CLIP.__init__", ("self", "target"), hooked_clip_init(guard))
    hooks.place(comfy.sd, "CLIP.encode_from_tokens", ("self", "tokens"), sealer.hooked_encode)
    hooks.place(comfy.sd, "CLIP.encode_from_tokens_scheduled", ("self", "tokens", "unprojected"),
                sealer.hooked_scheduled)
    hooks.place(comfy.sampler_helpers, "convert_cond", ("cond",), sealer.hooked_convert)
    hooks.place(comfy.samplers, "CFGGuider.sample", ("self", "noise", "latent_image", "sampler", "sigmas"),
                hooked_sample(guard))
    hooks.place(execution, "merge_result_data", ("results", "obj"), sealer.hooked_merge)
    hooks.place(execution, "validate_prompt", ("prompt_id", "prompt"), hooked_validate(guard))
    guard.check = check


def _serve(status: Status) -> None:
    """The status route, the last look before serving, and the watch afterwards; none of it where no server runs."""
    from aiohttp import web
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    @server.routes.get("/apl/status")
    async def apl_status(request: Any) -> Any:
        code, body = status.report()
        return web.json_response(body, status=code)

    if status.guard is not None and status.hooks is not None:
        server.app.cleanup_ctx.append(lambda app: _serving(status, status.guard, status.hooks))


async def _serving(status: Status, guard: Guard, hooks: Hooks) -> AsyncIterator[None]:
    """Up to the `yield`, every pack is loaded and nothing is served yet; after it, the server has ended."""
    import nodes

    if missing := hooks.missing():
        refuse_to_start(f"{', '.join(missing)} was replaced by another custom node.")
    status.removed = remove_denied(guard, nodes.NODE_CLASS_MAPPINGS)
    if status.removed:
        _log.info("APL enforced mode: %d nodes are not offered: %s.", len(status.removed), ", ".join(status.removed))
    try:
        status.self_test = run_self_test(guard)
    except APLError as error:
        refuse_to_start(error)
    except Exception as error:  # the host's own code failed under the hooks: neither may be trusted
        refuse_to_start(f"The self-test ended with {type(error).__name__}: {error}.")
    watch = asyncio.get_running_loop().create_task(_watch(hooks))
    yield
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch


async def _watch(hooks: Hooks) -> None:
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        if missing := hooks.missing():
            stop_serving(f"{', '.join(missing)} was replaced while the server was running.")
