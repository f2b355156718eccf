"""Transfer Anonymization Prompt: from a prefix for Stable Diffusion 1.x to one for XL, from two files' token tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..apl_core.errors import APLError, ModelError
from ..apl_core.prefix import AnonymizationPrompt
from ..apl_core.relative_maps import METHODS
from ..apl_core.token_tables import read_table, read_tables
from ..apl_core.transfer import TransferSettings, caption_weights, transfer
from .schema import AnonymizationPromptType, schema

NONE_YET = "(none found)"


def checkpoints() -> list[str]:
    """The host's checkpoints that are safetensors files; never empty, since the host cannot show an empty list."""
    found = [name for name in folder_paths.get_filename_list("checkpoints") if name.endswith(".safetensors")]
    return found or [NONE_YET]


def _path(name: str, field: str) -> Path:
    if name == NONE_YET:
        raise ModelError("There is no .safetensors checkpoint.", "Put one into models/checkpoints.", field=field)
    return Path(folder_paths.get_full_path_or_raise("checkpoints", name))


def _tokenizer() -> Any:
    """CLIP's vocabulary, as the host brings it."""
    from comfy.sd1_clip import SDTokenizer

    return SDTokenizer().tokenizer


class TransferAnonymizationPrompt(io.ComfyNode):
    """Carries a prefix over; nothing but the token tables of the checkpoints is read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_TransferAnonymizationPrompt",
            display_name="Transfer Anonymization Prompt",
            description="Carries an anonymization prompt that was learned on Stable Diffusion 1.x over to Stable "
            "Diffusion XL, without training. Look at the report, and try the result before relying on it.",
            search_aliases=["SDXL", "convert", "map", "APL"],
            inputs=[
                AnonymizationPromptType.Input("anonymization_prompt", display_name="anonymization prompt",
                                              tooltip="A prefix for Stable Diffusion 1.x, from Load Anonymization "
                                              "Prompt."),
                io.Combo.Input("from_checkpoint", options=checkpoints(), display_name="from checkpoint",
                               tooltip="The Stable Diffusion 1.x checkpoint that the prefix was learned on. Only its "
                               "token table is read."),
                io.Combo.Input("to_checkpoint", options=checkpoints(), display_name="to checkpoint",
                               tooltip="The Stable Diffusion XL checkpoint to use the prefix with. Only its token "
                               "tables are read."),
                io.Combo.Input("method", options=["auto", *METHODS], default="auto",
                               tooltip="auto takes the map that predicts held-out tokens best, and ptfer, that of the "
                               "published search, where they tell no method apart. none is a baseline to compare "
                               "with."),
                io.String.Input("captions", default="", multiline=True,
                                tooltip="Captions, one a line, like those that the models were trained on: only their "
                                "words are trusted then. Leave it empty for ordinary checkpoints."),
            ],
            outputs=[
                # An id that no input has: ComfyUI 0.3.64 refuses the whole pack otherwise.
                AnonymizationPromptType.Output("carried", display_name="anonymization prompt",
                                               tooltip="The prefix for Stable Diffusion XL: connect it to Anonymize, "
                                               "or save it."),
                io.String.Output("report", tooltip="How well held-out tokens were predicted, and which vectors are "
                                 "unlike any token."),
            ],
        )

    @classmethod
    def validate_inputs(cls, from_checkpoint: str, to_checkpoint: str) -> bool | str:
        try:
            for name, field in ((from_checkpoint, "from_checkpoint"), (to_checkpoint, "to_checkpoint")):
                _path(name, field)
        except (APLError, FileNotFoundError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, from_checkpoint: str, to_checkpoint: str, **_: Any) -> str:
        facts = [_path(name, "checkpoint").stat() for name in (from_checkpoint, to_checkpoint)]
        return str([(each.st_mtime_ns, each.st_size) for each in facts])

    @classmethod
    def execute(cls, anonymization_prompt: AnonymizationPrompt, from_checkpoint: str, to_checkpoint: str, method: str,
                captions: str) -> io.NodeOutput:
        source = read_table(_path(from_checkpoint, "from_checkpoint"))
        targets = read_tables(_path(to_checkpoint, "to_checkpoint"))
        tokenizer = _tokenizer()
        lines = [line.strip() for line in captions.splitlines() if line.strip()]
        weights = None
        if lines:
            # BOS and EOS, which the host's tokenizer puts around every caption, are no anchors anyhow
            weights = caption_weights((tokenizer(line)["input_ids"] for line in lines), source.vocabulary)
        found = transfer(anonymization_prompt, source, targets, TransferSettings(method, weights=weights))
        report = found.report.text(lambda i: str(tokenizer.convert_ids_to_tokens(i)).replace("</w>", ""))
        return io.NodeOutput(found.prefix, report, ui=ui.PreviewText(report))


NODES = [TransferAnonymizationPrompt]
