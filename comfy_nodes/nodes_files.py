"""Inspect and Save Anonymization Prompt: from a prefix to what it says of itself, and to a file."""

from __future__ import annotations

import json

from comfy_api.latest import io, ui

from ..apl_core.errors import LibraryError
from ..apl_core.families import family_named
from ..apl_core.library import resolve_within, safe_name
from ..apl_core.placement import capacity
from ..apl_core.prefix import SUFFIX, AnonymizationPrompt, load_prefix, save_prefix
from .folders import own_folder
from .schema import AnonymizationPromptType, schema


def description_of(prefix: AnonymizationPrompt) -> str:
    """What is known about a prefix, one fact a line, what is not known left out."""
    meta = prefix.meta
    widths = ", ".join(f"{key}: {width}" for key, width in prefix.widths.items())
    level = f"after {meta.level} of {meta.steps or '?'} steps" if meta.level is not None else ""
    facts = {
        "name": prefix.name,
        "made for": f"{family_named(prefix.family).label} ({widths})",
        "vectors": f"{prefix.num_tokens}; {capacity(prefix.num_tokens)} of a chunk's 75 tokens stay for your words",
        "placement": meta.placement,
        "level": level or (f"finished, {meta.steps} steps" if meta.steps is not None else ""),
        "alpha": "" if meta.alpha is None else f"{meta.alpha:g}",
        "learned on": meta.base_model,
        "carried over from": meta.transferred_from,
        "author": meta.author,
        "licence": meta.license,
        "date": meta.date,
        "about": meta.description,
        "content hash": prefix.content_hash,
        "scores": json.dumps(meta.scores, sort_keys=True, ensure_ascii=False, default=dict) if meta.scores else "",
    }
    return "\n".join(f"{key}: {value}" for key, value in facts.items() if value)


class InspectAnonymizationPrompt(io.ComfyNode):
    """Shows the facts of a prefix; scores are those that its author measured."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_InspectAnonymizationPrompt",
            display_name="Inspect Anonymization Prompt",
            description="Shows what an anonymization prompt says of itself: the model family, how it was learned, "
            "its content hash, and the scores its author measured.",
            search_aliases=["metadata", "hash", "APL"],
            is_output_node=True,
            inputs=[AnonymizationPromptType.Input("anonymization_prompt", display_name="anonymization prompt",
                                                  tooltip="From Load Anonymization Prompt.")],
            outputs=[io.String.Output("description", tooltip="The same as text."),
                     io.String.Output("content_hash", display_name="content hash",
                                      tooltip="SHA-256 of the vectors: the same however the file is named.")],
        )

    @classmethod
    def execute(cls, anonymization_prompt: AnonymizationPrompt) -> io.NodeOutput:
        text = description_of(anonymization_prompt)
        return io.NodeOutput(text, anonymization_prompt.content_hash, ui=ui.PreviewText(text))


class SaveAnonymizationPrompt(io.ComfyNode):
    """Writes a prefix into the host's own folder of prefixes, where the loader finds it at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="APL_SaveAnonymizationPrompt",
            display_name="Save Anonymization Prompt",
            description="Writes an anonymization prompt to models/anonymization_prompts as a .safetensors file.",
            search_aliases=["export", "APL"],
            is_output_node=True,
            inputs=[
                AnonymizationPromptType.Input("anonymization_prompt", display_name="anonymization prompt",
                                              tooltip="What to save."),
                io.String.Input("file_name", default="my-anonymization-prompt", display_name="file name",
                                tooltip="The name of the file, without a folder; .safetensors is added."),
                io.String.Input("title", default="", tooltip="A new title for people to read. Empty keeps the one it "
                                "has."),
                io.Boolean.Input("overwrite", default=False, tooltip="Off refuses to replace another prefix of this "
                                 "name."),
            ],
            outputs=[io.String.Output("path", tooltip="The file that was written.")],
        )

    @classmethod
    def validate_inputs(cls, file_name: str) -> bool | str:
        try:
            safe_name(file_name)
        except LibraryError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, anonymization_prompt: AnonymizationPrompt, file_name: str, title: str, overwrite: bool
    ) -> io.NodeOutput:
        folder = own_folder()
        path = resolve_within(folder, safe_name(file_name).removesuffix(SUFFIX) + SUFFIX)
        if path.exists() and not overwrite and load_prefix(path).content_hash != anonymization_prompt.content_hash:
            raise LibraryError(f"{path.name} is there already, with other vectors.",
                               "Choose another file name, or switch overwrite on.", field="file_name")
        prefix = anonymization_prompt
        if title.strip():
            prefix = AnonymizationPrompt(prefix.family, prefix.tensors, prefix.meta.with_fields(title=title.strip()))
        save_prefix(prefix, path)
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"Saved as {path.name}"))


NODES = [InspectAnonymizationPrompt, SaveAnonymizationPrompt]
