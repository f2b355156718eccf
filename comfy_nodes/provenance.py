"""Which prefix a picture was made with, in the picture's own metadata.

Step prefix -> saved file. The host writes the dict `extra_pnginfo` of a prompt into every picture that it saves; the
key `anonymization_prompt` there maps each Anonymize node to the prefix's name, content hash and level. A node that the
host takes from its cache does not run, so what it recorded when it ran is kept, by everything upstream of it, and put
into later prompts that hold the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ..apl_core.prefix import AnonymizationPrompt

KEY = "anonymization_prompt"
NODE = "APL_Anonymize"
_MOST = 256
_known: OrderedDict[str, dict[str, Any]] = OrderedDict()
_log = logging.getLogger("apl")


def facts_of(prefix: AnonymizationPrompt) -> dict[str, Any]:
    """Name, content hash and level (None: the finished prefix) as JSON values; nothing of any prompt or person."""
    return {"name": prefix.name, "content_hash": prefix.content_hash, "level": prefix.meta.level}


def upstream(prompt: Mapping[str, Any], node: str) -> str | None:
    """Hash of everything that a node's result follows from; None when part of it is not in the prompt, or in a loop.

    Nodes' own numbers have no part in it: the host takes a result from its cache where class and inputs are the same.
    """
    known: dict[str, str | None] = {}

    def signed(name: str, above: frozenset[str]) -> str | None:
        if name not in known:
            entry = prompt.get(name)
            if name in above or not isinstance(entry, dict) or not isinstance(entry.get("inputs", {}), dict):
                return None
            said = [entry.get("class_type")]
            for key, value in sorted(entry.get("inputs", {}).items()):
                if isinstance(value, list) and len(value) == 2:
                    source = signed(str(value[0]), above | {name})
                    if source is None:
                        return None
                    value = [source, value[1]]
                said.append([key, value])
            known[name] = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
        return known[name]

    return signed(str(node), frozenset())


def record(prefix: AnonymizationPrompt, hidden: Any) -> None:
    """Write down that the running Anonymize node applied `prefix`. `hidden`: the node's hidden inputs, or None."""
    node, extra = getattr(hidden, "unique_id", None), getattr(hidden, "extra_pnginfo", None)
    if node is None:
        return
    facts = facts_of(prefix)
    if isinstance(extra, dict):
        extra.setdefault(KEY, {})[str(node)] = facts
    if key := upstream(getattr(hidden, "prompt", None) or {}, str(node)):
        _known[key] = facts
        _known.move_to_end(key)
        while len(_known) > _MOST:
            _known.popitem(last=False)


def recall(request: dict[str, Any]) -> dict[str, Any]:
    """A prompt as it was posted, with what is known of its Anonymize nodes; they may come from the host's cache."""
    prompt = request.get("prompt")
    if not isinstance(prompt, dict):
        return request
    nodes = [name for name, entry in prompt.items() if isinstance(entry, dict) and entry.get("class_type") == NODE]
    if nodes:
        extra = request.setdefault("extra_data", {})
        if extra.get("extra_pnginfo") is None:
            extra["extra_pnginfo"] = {}
        # what a picture's own workflow brought along is not this prompt's
        found = {name: _known[key] for name in nodes if (key := upstream(prompt, name)) in _known}
        extra["extra_pnginfo"][KEY] = found
    return request


def register() -> None:
    """Hang `recall` into the host's server, where there is one."""
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        _log.debug("No server: pictures do not say which prefix they were made with.")
        return
    server.add_on_prompt_handler(recall)
