"""Routes beside the host's own: GET /apl/v1/status, GET /apl/v1/prefixes, POST /apl/v1/score.

Plain routes of the web framework that every host of this family brings; they ask for the host's --api-auth.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
from collections.abc import Callable
from typing import Any

from ..apl_core.errors import APLError, ConfigError
from .enforce import status
from .hooks import Hooks
from .library import entries, unfit_reason

MAX_BODY = 64 * 2**20
MAX_PICTURES = 64


def is_allowed(header: str | None, api_auth: str | None) -> bool:
    """Whether an Authorization header satisfies the host's `--api-auth user:password[,user:password]`."""
    if not api_auth:
        return True
    scheme, _, value = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        given = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return False
    known = [pair.strip() for pair in api_auth.split(",")]
    # All are compared, so that the time says nothing of which one was close.
    return any([hmac.compare_digest(given, pair.encode("utf-8")) for pair in known])  # noqa: C419


def prefixes() -> list[dict[str, Any]]:
    """The library, each with why it cannot be used with the loaded model, if so."""
    listed = []
    for entry in entries():
        reason = unfit_reason(entry)
        listed.append({"name": entry.name, "title": entry.title, "family": entry.family, "tokens": entry.num_tokens,
                       "levels": list(entry.levels), "sha256": entry.content_hash, "fits": not reason,
                       "reason": reason})
    return listed


def pictures_of(values: Any, field: str) -> list[Any]:
    """uint8 RGB arrays of base64 pictures (a data URL's beginning is allowed).

    Raises:
        ConfigError: not a list of 1 to 64 of them.
    """
    import numpy as np
    from PIL import Image

    if not isinstance(values, list) or not 1 <= len(values) <= MAX_PICTURES:
        raise ConfigError(f"{field} is not a list of 1 to {MAX_PICTURES} pictures.", "Send base64 PNG or JPEG.",
                          field=field)
    found = []
    for index, value in enumerate(values):
        try:
            data = base64.b64decode(str(value).rpartition(",")[2], validate=True)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
                if picture.width * picture.height > 64_000_000:
                    raise ValueError("too large")
                found.append(np.array(picture.convert("RGB")))
        except Exception as error:  # Pillow's decoders raise all kinds
            raise ConfigError(f"{field}[{index}] is not a picture: {error}.", "Send base64 PNG or JPEG.",
                              field=field) from error
    return found


def scored(body: Any) -> dict[str, Any]:
    """The answer to POST /apl/v1/score of {"images": [...], "references": [...], "threshold": 0.32}.

    Optional too: "recogniser" (a name that the tab offers) and "face_choice" (largest, best, all).

    Raises:
        APLError: the body is wrong, or there is no recogniser.
    """
    from .identity import score

    if not isinstance(body, dict) or set(body) - {"images", "references", "threshold", "recogniser", "face_choice"}:
        raise ConfigError("The body is not an object with images, references, threshold, recogniser and face_choice.",
                          "Send only these.", field="body")
    for field in ("recogniser", "face_choice"):
        if not isinstance(body.get(field, ""), str):
            raise ConfigError(f"{field} is {body[field]!r}.", "Send text.", field=field)
    threshold = body.get("threshold", None)
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)
                                  or not -1 <= threshold <= 1):
        raise ConfigError(f"threshold is {threshold!r}.", "Use a number from -1 to 1.", field="threshold")
    found = score(pictures_of(body.get("images"), "images"), pictures_of(body.get("references"), "references"),
                  threshold, recogniser=body.get("recogniser"), face_choice=body.get("face_choice", "largest"))
    return found.as_dict()


def add_routes(app: Any, hooks: Hooks, *, api: bool, api_auth: str | None) -> None:
    """Register the routes on the host's application.

    Args:
        app: the application.
        hooks: for the status.
        api: whether the host was started with --api; without, only the status is served.
        api_auth: the host's --api-auth.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse

    def answer(work: Callable[[Any], tuple[int, Any]]) -> Callable[[Any], Any]:
        async def endpoint(request: Any) -> Any:
            if not is_allowed(request.headers.get("authorization"), api_auth):
                return JSONResponse({"error": "Incorrect username or password"}, 401, {"WWW-Authenticate": "Basic"})
            try:
                body = await _body(request) if request.method == "POST" else None
                code, found = await run_in_threadpool(work, body)
            except APLError as error:
                code, found = 422, {"error": error.message, "hint": error.hint, "field": error.field}
            return JSONResponse(found, code)

        return endpoint

    app.router.add_route("/apl/v1/status", answer(lambda _: status(hooks)), methods=["GET"])
    if api:
        app.router.add_route("/apl/v1/prefixes", answer(lambda _: (200, prefixes())), methods=["GET"])
        app.router.add_route("/apl/v1/score", answer(lambda body: (200, scored(body))), methods=["POST"])


async def _body(request: Any) -> Any:
    held = b""
    async for part in request.stream():
        held += part
        if len(held) > MAX_BODY:
            raise ConfigError(f"The body is larger than {MAX_BODY // 2**20} MiB.", "Send fewer pictures.",
                              field="body")
    try:
        return json.loads(held)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The body is not JSON: {error}.", "Send a JSON object.", field="body") from error
