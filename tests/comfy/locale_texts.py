"""The host's translation files of this pack, from the nodes' own schemas: `locales/en/{main,nodeDefs}.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

CATEGORIES = {"conditioning": "conditioning", "anonymize": "anonymize"}
TYPES = {"ANONYMIZATION_PROMPT": "anonymization prompt"}


def _key(name: str) -> str:
    """Names in these files stand in dotted paths."""
    return name.replace(".", "_")


def node_texts(schema: Any) -> dict[str, Any]:
    """One node: display name, description, and name and tooltip of every input and output."""
    inputs, outputs = {}, {}
    for each in schema.inputs:
        inputs[_key(each.id)] = {"name": each.display_name or each.id, "tooltip": each.tooltip}
    for index, each in enumerate(schema.outputs):
        outputs[str(index)] = {"name": each.display_name or each.id, "tooltip": each.tooltip}
    return {"display_name": schema.display_name, "description": schema.description, "inputs": inputs,
            "outputs": outputs}


def texts(schemas: Iterable[Any]) -> dict[str, str]:
    """File name below locales/en to its text."""
    nodes = {schema.node_id: node_texts(schema) for schema in schemas}
    files = {"nodeDefs.json": dict(sorted(nodes.items())), "main.json": {"nodeCategories": CATEGORIES,
                                                                         "dataTypes": TYPES}}
    return {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in files.items()}
