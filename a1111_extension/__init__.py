"""The extension for AUTOMATIC1111's WebUI and Forge, over `apl_core`. The way in is `register`.

The host's modules are imported inside functions only: this package is loaded while the host is still half made.
"""
