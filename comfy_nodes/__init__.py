"""ComfyUI nodes, thin over `apl_core`. Nothing is imported here; `extension` is the host's way in."""
