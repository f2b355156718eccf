"""What this pack tells ComfyUI: its nodes, and its model folder."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import nodes_apply, nodes_compare, nodes_files, nodes_load, nodes_score
from .folders import register


class APLExtension(ComfyExtension):
    """The pack. Made by the root's `comfy_entrypoint`."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in `on_load`, which ComfyUI 0.3.64 does not call; the nodes' lists need the folder.
        register()
        modules = (nodes_load, nodes_apply, nodes_files, nodes_compare, nodes_score)
        return [node for module in modules for node in module.NODES]
