"""Load Anonymization Prompt: from a name in a list to the prefix itself."""

from __future__ import annotations

from comfy_api.latest import io

from ..apl_core.errors import APLError
from .folders import file_fingerprint, prefix_library, prefix_names
from .schema import AnonymizationPromptType, schema


def _level(level: int) -> int | None:
    return None if level == 0 else level


class LoadAnonymizationPrompt(io.ComfyNode):
    """Reads a prefix file, checked, from the folders that the host and this pack name."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_LoadAnonymizationPrompt",
            display_name="Load Anonymization Prompt",
            description="Loads a learned prefix that reduces the recognisable likeness of named persons. "
            "Connect it to Anonymize.",
            search_aliases=["privacy", "APL", "anonymize", "prefix"],
            inputs=[
                io.Combo.Input(
                    "prompt_name", options=prefix_names(), display_name="anonymization prompt",
                    tooltip="A .safetensors file in models/anonymization_prompts, or one that comes with this pack. "
                    "It must have been made for the family of your checkpoint.",
                ),
                io.Int.Input(
                    "level", default=0, min=0, max=999_999_999,
                    tooltip="How far the training had come: 0 takes the finished prefix; a number of steps takes the "
                    "level saved there (the file NAME.step-NUMBER), where there is one. Lower is weaker.",
                ),
            ],
            outputs=[
                AnonymizationPromptType.Output(
                    "anonymization_prompt", display_name="anonymization prompt", tooltip="Connect it to Anonymize."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt_name: str, level: int) -> bool | str:
        try:
            prefix_library().load(prompt_name, _level(level))
        except APLError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, prompt_name: str, level: int) -> str:
        return file_fingerprint(prefix_library().resolve(prompt_name, _level(level)))

    @classmethod
    def execute(cls, prompt_name: str, level: int) -> io.NodeOutput:
        return io.NodeOutput(prefix_library().load(prompt_name, _level(level)))


NODES = [LoadAnonymizationPrompt]
