"""Anonymize: from a CLIP and a prefix to a CLIP that carries it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..apl_core.prefix import AnonymizationPrompt
from .clip_patch import OVERFLOWS, anonymize
from .provenance import record
from .schema import AnonymizationPromptType, schema


class Anonymize(io.ComfyNode):
    """The one node a workflow needs: between the checkpoint loader and the positive prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_Anonymize",
            display_name="Anonymize",
            description="Puts an anonymization prompt into every chunk of every text that is encoded with this CLIP. "
            "Use it for the positive prompt; leave the negative prompt on the checkpoint's own CLIP.",
            search_aliases=["privacy", "APL", "face", "likeness", "person"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of your checkpoint; LoRAs and clip skip may come before or "
                              "after. Stable Diffusion 1.x, 2.x and XL."),
                AnonymizationPromptType.Input("anonymization_prompt", display_name="anonymization prompt",
                                              tooltip="From Load Anonymization Prompt."),
                io.Boolean.Input("enabled", default=True, tooltip="Off passes the CLIP through untouched, for a "
                                 "comparison with the same seed."),
                io.Combo.Input(
                    "overflow", options=list(OVERFLOWS), default="chunk",
                    tooltip="When a prompt is longer than the 75 tokens of a chunk less those of the prefix: chunk "
                    "goes on in the next chunk, which carries the prefix too; trim drops the rest; error stops.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[io.Clip.Output("anonymized_clip", display_name="CLIP", tooltip="Connect it to the node that "
                                    "encodes the positive prompt.")],
        )

    @classmethod
    def execute(
        cls, clip: Any, anonymization_prompt: AnonymizationPrompt, enabled: bool, overflow: str
    ) -> io.NodeOutput:
        if not enabled:
            return io.NodeOutput(clip)
        anonymized = anonymize(clip, anonymization_prompt, overflow)
        record(anonymization_prompt, cls.hidden)
        return io.NodeOutput(anonymized)


NODES = [Anonymize]
