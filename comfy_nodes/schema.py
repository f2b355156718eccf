"""What all nodes have in common: their category, their socket type, and a schema that older hosts accept."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "conditioning/anonymize"
AnonymizationPromptType = io.Custom("ANONYMIZATION_PROMPT")


def schema(**values: Any) -> io.Schema:
    """An `io.Schema` in this pack's category, without the fields that the running ComfyUI does not know yet."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**{"category": CATEGORY} | {name: value for name, value in values.items() if name in known})
