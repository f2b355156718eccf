"""Root of the repository as a host sees it. Nothing is imported here, so pip, pytest and hosts may import it freely."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # noqa: ANN201, RUF100 - its type is the host's
    """What ComfyUI calls, once it has found this folder among its custom nodes."""
    import os

    if "APL_POLICY" in os.environ:
        try:
            from .comfy_nodes.enforcement.start import switch_on
        except Exception as error:  # a damaged copy; ComfyUI would go on, without the protection that was ordered
            raise SystemExit(78) from error
        switch_on()
    from .comfy_nodes.extension import APLExtension

    return APLExtension()
