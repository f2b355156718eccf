"""Root of the repository as a host sees it. Nothing is imported here, so pip, pytest and hosts may import it freely."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # noqa: ANN201, RUF100 - its type is the host's
    """What ComfyUI calls, once it has found this folder among its custom nodes."""
    from .comfy_nodes.extension import APLExtension

    return APLExtension()
