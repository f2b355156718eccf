"""Nodes that an enforced server does not offer: the operator's deny-list, training, and calls to outside services."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from .guard import Guard

TRAINING = ("APL_Train*", "APL_Transfer*", "TrainLoraNode", "MakeTrainingDataset", "SaveTrainingDataset",
            "LoadTrainingDataset")
# A plain negative prompt shows in the difference of two pictures. Without these two and uploaded latents, the graph
# has no means to turn that difference round; "negative": "always" leaves no such difference, and these nodes in place.
LATENT_ARITHMETIC = ("LatentSubtract", "LatentMultiply", "LoadLatent")


def is_denied(guard: Guard, name: str) -> bool:
    """Whether the policy keeps a node of this class from being used."""
    own = (*(TRAINING if guard.policy.lock_training else ()),
           *(LATENT_ARITHMETIC if guard.policy.negative == "auto" else ()))
    return guard.policy.denies(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in own)


def hooked_validate(guard: Guard) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `execution.validate_prompt`, the last look at a graph before it is queued."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        async def validate_prompt(prompt_id: Any, prompt: Any, *args: Any, **kwargs: Any) -> tuple:
            guard.check()
            if not isinstance(prompt, dict) or not all(isinstance(node, dict) for node in prompt.values()):
                return _error("invalid_prompt", "The prompt is not an object of nodes.", "Send the API format.", {})
            for number, node in prompt.items():
                name = node.get("class_type")
                if name is not None and not isinstance(name, str):
                    return _error("invalid_prompt", f"Node {number} has no class type.", "Send the API format.", {})
                if isinstance(name, str) and is_denied(guard, name):
                    guard.count("denied")
                    return _error("apl_denied", f"This server does not offer the node {name}.",
                                  "Its operator's policy for anonymized pictures excludes it.", {str(number): name})
            return await original(prompt_id, prompt, *args, **kwargs)

        return validate_prompt

    return make


def _error(kind: str, message: str, details: str, nodes: dict[str, str]) -> tuple:
    """What `validate_prompt` returns for a graph that is not run; the page shows the message on the node."""
    one = {"type": kind, "message": message, "details": details, "extra_info": {}}
    return False, one, [], {number: {"errors": [one], "dependent_outputs": [], "class_type": name}
                            for number, name in nodes.items()}


def remove_denied(guard: Guard, mappings: dict[str, Any]) -> list[str]:
    """Take denied classes, and those that send prompts to outside services, out of the host's table.

    A graph can also grow while it runs; nodes that are in no table cannot be reached that way either.
    """
    gone = [name for name, node in mappings.items() if is_denied(guard, name) or str(
        getattr(node, "RELATIVE_PYTHON_MODULE", "")).startswith("comfy_api_nodes")]
    for name in gone:
        del mappings[name]
    return sorted(gone)
