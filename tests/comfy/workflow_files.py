"""The example workflows as the page sends them: saved nodes and links to the host's prompt format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
NOTES = ("MarkdownNote", "Note")


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def as_prompt(workflow: dict[str, Any]) -> dict[str, Any]:
    """What the page sends for a saved workflow: widgets in order, links as [node, slot]."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = list(node.get("widgets_values", [])), {}
        for entry in node["inputs"]:
            if entry["link"] is not None:
                inputs[entry["name"]] = links[entry["link"]]
            if "widget" in entry:
                value = values.pop(0)
                inputs.setdefault(entry["name"], value)
                if entry["name"] in ("seed", "noise_seed"):
                    values.pop(0)  # what the page does with it after a run
        assert not values, f"{node['type']} has values over: {values}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def prompt_of(path: Path, **changes: Any) -> dict[str, Any]:
    """The prompt of a workflow, with inputs of these names set to other values wherever a node has them."""
    prompt = as_prompt(json.loads(path.read_text("utf-8")))
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in changes.items() if key in node["inputs"]}
    return prompt
