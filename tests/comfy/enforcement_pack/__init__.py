"""A custom node pack for tests only: a small random model that the host's own loader takes, a spy, and attacks.

The spy sits below everything that enforces anything, in the transformer's stack of layers, and at the door of the
diffusion model; it knows the prefix from its file, by safetensors alone. `GET /spy/report` says what it saw,
and forgets it.
"""

from .attacks import NODES as ATTACKS
from .model import register
from .spy import install

register()
install()

NODE_CLASS_MAPPINGS = dict(ATTACKS)
