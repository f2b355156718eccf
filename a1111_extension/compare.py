"""The last pictures of this process, and the last one again: the same seed without and with the prefix."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..apl_core.errors import APLError, ConfigError
from .args import level_label, level_of, name_of
from .jobs import JOBS, Choice
from .models import check_model, loaded_model

_FIELDS = ("prompt", "negative_prompt", "steps", "sampler_name", "scheduler", "cfg_scale", "width", "height", "styles")


@dataclass
class Last:
    """What the last job was made of. Pictures stay in memory only, and only those of one job.

    Attributes:
        settings: the host's parameters, with the seed that was used.
        images: PIL pictures of the last job, without grids.
        pair: pictures without and with the prefix, once asked for.
    """

    settings: dict[str, Any] | None = None
    images: list[Any] = field(default_factory=list)
    pair: tuple[Any, Any] | None = None


LAST = Last()
_comparing = False


def remember(p: Any, result: Any, choice: Choice | None) -> None:
    """Keep the settings and pictures of a finished top-level job."""
    if _comparing or result is None:
        return
    start = getattr(result, "index_of_first_image", 0) or 0
    LAST.images = list(getattr(result, "images", None) or [])[start:][:16]
    if type(p).__name__.endswith("Txt2Img"):
        known = {name: getattr(p, name) for name in _FIELDS if getattr(p, name, None) is not None}
        known["prompt"] = p.prompt if isinstance(p.prompt, str) else str(p.prompt[0])
        negative = known.get("negative_prompt", "")
        known["negative_prompt"] = negative if isinstance(negative, str) else str(negative[0])
        LAST.settings = known | {"seed": int((getattr(p, "all_seeds", None) or [getattr(p, "seed", -1)])[0])}


def picture_html(image: Any, caption: str) -> str:
    """An <img> with the picture in it, and its caption escaped."""
    held = io.BytesIO()
    image.convert("RGB").save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode("ascii")
    return (f"<figure class='apl-figure'><img src='data:image/png;base64,{data}' alt='{html.escape(caption)}'/>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def _render(choice: Choice | None) -> Any:
    """One picture of the last settings with this choice. Inside an open job, whose choice it takes.

    Raises:
        ConfigError: the user interrupted it before there was a picture.
    """
    from modules import processing, shared

    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=shared.sd_model, do_not_save_samples=True, do_not_save_grid=True, **(LAST.settings or {}))
    p.script_args = ()
    with JOBS.job(choice):
        result = processing.process_images(p)
    if not result.images:
        raise ConfigError("The comparison was interrupted.", "Press the button again.", field="images")
    return result.images[getattr(result, "index_of_first_image", 0) or 0]


def before_and_after(prefix: str, level: Any) -> str:
    """HTML with both pictures side by side, or a line that says why not."""
    global _comparing
    try:
        if JOBS.enforced:
            raise ConfigError("This server makes no picture without the prefix.", "Compare on a machine of your own.",
                              field="policy")
        if LAST.settings is None:
            raise ConfigError("There is no picture yet.", "Generate one first.", field="prompt")
        from .library import load

        name, steps = name_of(prefix or ""), level_of(level)
        choice = Choice(name, steps, load(name, steps))
        check_model(loaded_model(), choice.prefix)
        with _turn():
            _comparing = True
            LAST.pair = (_render(None), _render(choice))
    except APLError as error:
        return f"<p class='apl-state apl-bad'>{html.escape(str(error))}</p>"
    finally:
        _comparing = False
    return "<div class='apl-pair'>" + picture_html(LAST.pair[0], "without the prefix") + picture_html(
        LAST.pair[1], f"{name}, {level_label(steps)}") + "</div>"


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    """The host's lock around generation, and a job of its own: an earlier one's *Interrupt* holds until one begins."""
    from modules import call_queue, shared

    with call_queue.queue_lock:
        shared.state.begin(job="apl-compare")
        try:
            yield
        finally:
            shared.state.end()
