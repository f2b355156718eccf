"""The tab "Prefix transfer": a prefix for Stable Diffusion 1.x to one for the XL checkpoint that is loaded.

Token tables are read from the checkpoints' files; nothing is loaded or trained (`apl_core.transfer`).
"""

from __future__ import annotations

import html
import logging
from pathlib import Path
from typing import Any

from ..apl_core.errors import APLError, LibraryError, ModelError, PolicyError
from ..apl_core.library import resolve_within, safe_name
from ..apl_core.prefix import SUFFIX, AnonymizationPrompt, load_prefix, save_prefix
from .library import entries, load, own_folder
from .models import encoders_of, loaded_model

METHODS = ("auto", "ridge", "half", "ptfer", "procrustes", "none")
_log = logging.getLogger("apl")


def checkpoints() -> dict[str, Path]:
    """Title to file of the host's checkpoints that are safetensors files, in the host's order."""
    from modules import sd_models

    found = {str(info.title): Path(info.filename) for info in getattr(sd_models, "checkpoints_list", {}).values()}
    return {title: path for title, path in found.items() if path.suffix == SUFFIX}


def chosen_checkpoint() -> str:
    """Title of the host's current checkpoint; "" where it is none of `checkpoints`."""
    from modules import shared

    wanted = str(getattr(shared.opts, "sd_model_checkpoint", "") or "")
    stem = wanted.partition(" [")[0]
    return next((title for title, path in checkpoints().items() if title == wanted or path.name == Path(stem).name), "")


def prefixes() -> list[str]:
    """Names of prefixes that can be carried over."""
    return [entry.name for entry in entries() if entry.family in ("sd1", "sd2") and not entry.problem]


def _file(title: str, field: str) -> Path:
    path = checkpoints().get(title)
    if path is None:
        raise ModelError(f"{title or 'Nothing'} is no .safetensors checkpoint of this host.",
                         "Choose one from the list.", field=field)
    return path


def _caption_ids(captions: str) -> list[list[int]]:
    lines = [line.strip() for line in captions.splitlines() if line.strip()]
    model = loaded_model()
    if lines and model is None:
        raise ModelError("Captions need a tokenizer, and no checkpoint is loaded.", "Choose a checkpoint first.",
                         field="captions")
    return [list(ids) for ids in encoders_of(model)[0].tokenize(lines)] if lines else []


def _word(token: int) -> str:
    """What the loaded model's tokenizer calls a token; its number where nothing is loaded."""
    model = loaded_model()
    encoder = encoders_of(model)[0] if model is not None else None
    tokenizer = getattr(encoder, "tokenizer", None) or getattr(getattr(encoder, "wrapped", None), "tokenizer", None)
    name = getattr(tokenizer, "convert_ids_to_tokens", str)(token)
    return str(name).replace("</w>", "")


def carry(name: str, level: int | None, source: str, target: str, method: str, captions: str,
          file_name: str) -> tuple[Path, Any]:
    """Carry a prefix of the library over and save it beside the user's own; (file, report).

    Args:
        source, target: titles of checkpoints, the one that the prefix was learned on and the XL one.
        captions: lines of text whose tokens alone are trusted; "" for all tokens alike.
        file_name: of the new prefix, without folder.

    Raises:
        APLError: a name is not in the lists, the checkpoints do not fit, another prefix has the file's name, or the
            host's operator does not allow it.
    """
    from ..apl_core.token_tables import read_table, read_tables
    from ..apl_core.transfer import TransferSettings, caption_weights, transfer

    if not allowed():
        raise PolicyError("Others reach this WebUI: prefixes are not made here.",
                          "Start it with --apl-allow-remote-train, or without --listen.", field="server")
    prefix = load(name, level)
    path = resolve_within(own_folder(), safe_name(file_name.strip()).removesuffix(SUFFIX) + SUFFIX)
    table = read_table(_file(source, "source"))
    targets = read_tables(_file(target, "target"))
    ids = _caption_ids(captions)
    weights = caption_weights(ids, table.vocabulary) if ids else None
    found = transfer(prefix, table, targets, TransferSettings(method, weights=weights))
    made = AnonymizationPrompt(found.prefix.family, found.prefix.tensors,
                               found.prefix.meta.with_fields(title=path.stem))
    if path.exists() and load_prefix(path).content_hash != made.content_hash:
        raise LibraryError(f"{path.name} is there already, with other vectors.", "Choose another name.",
                           field="file_name")
    save_prefix(made, path)
    return path, found.report


def allowed() -> bool:
    """Whether whoever reaches this page may have it write files: only this machine does, or the operator said so."""
    from modules import shared

    from .trainer import is_local

    return bool(getattr(shared.cmd_opts, "apl_allow_remote_train", False)) or is_local()


def pressed(name: str, source: str, target: str, method: str, captions: str, file_name: str) -> str:
    """The button: HTML with the report, or a line that says what is wrong."""
    try:
        path, report = carry(name or "", None, source or "", target or "", method, captions or "", file_name or "")
    except APLError as error:
        return f"<p class='apl-state apl-bad'>{html.escape(str(error))}</p>"
    warned = f" {len(report.warnings)} warnings stand below." if report.warnings else ""
    return (f"<p>Saved as {html.escape(path.name)}: choose it in the Anonymization panel after a refresh.{warned}</p>"
            f"<pre>{html.escape(report.text(_word))}</pre>")


def tab() -> Any:
    """The gradio Blocks of the tab, built when the host asks."""
    import gradio as gr

    def lists() -> tuple[list[str], list[str], str | None]:
        try:
            return prefixes(), list(checkpoints()), chosen_checkpoint() or None
        except Exception as error:  # the host's page must come up without these lists
            _log.warning("APL: no list for the transfer tab: %s", error)
            return [], [], None

    names, titles, now = lists()
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.HTML(value="<p>Carry a prefix that was learned on Stable Diffusion 1.x over to an XL checkpoint, without "
                "training. Only the token tables of both files are read. Compare pictures without and with the result: "
                "a prefix trained on the checkpoint itself does more.</p>")
        with gr.Row():
            name = gr.Dropdown(label="Prefix", choices=names, value=names[0] if names else None,
                               elem_id="apl_transfer_prefix")
            source = gr.Dropdown(label="Learned on", choices=titles, value=None, elem_id="apl_transfer_from")
            target = gr.Dropdown(label="Carry over to", choices=titles, value=now, elem_id="apl_transfer_to")
        with gr.Row():
            method = gr.Dropdown(label="Method", choices=list(METHODS), value="auto", elem_id="apl_transfer_method")
            file_name = gr.Textbox(label="Save as", value="my-prefix-sdxl", elem_id="apl_transfer_name")
        captions = gr.Textbox(label="Captions, one a line, whose words alone are trusted (empty for ordinary "
                              "checkpoints)", value="", lines=2, elem_id="apl_transfer_captions")
        with gr.Row():
            refresh = gr.Button("Refresh lists", elem_id="apl_transfer_refresh")
            button = gr.Button("Transfer", elem_id="apl_transfer")
        out = gr.HTML(value="", elem_id="apl_transfer_result")

        def again() -> list[Any]:
            found, files, loaded = lists()
            return [gr.update(choices=found), gr.update(choices=files), gr.update(choices=files, value=loaded)]

        refresh.click(fn=again, inputs=[], outputs=[name, source, target])
        button.click(fn=pressed, inputs=[name, source, target, method, captions, file_name], outputs=[out])
    return blocks
