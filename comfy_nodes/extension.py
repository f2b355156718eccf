"""What this pack tells ComfyUI: its nodes, its model folder, and what is written into saved pictures."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    nodes_apply,
    nodes_chunks,
    nodes_compare,
    nodes_files,
    nodes_load,
    nodes_score,
    nodes_train,
    nodes_transfer,
    provenance,
)
from .folders import register

MODULES = (nodes_load, nodes_apply, nodes_chunks, nodes_files, nodes_train, nodes_compare, nodes_score, nodes_transfer)


class APLExtension(ComfyExtension):
    """The pack. Made by the root's `comfy_entrypoint`."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in `on_load`, which ComfyUI 0.3.64 does not call; the nodes' lists need the folder.
        register()
        provenance.register()
        return [node for module in MODULES for node in module.NODES]
