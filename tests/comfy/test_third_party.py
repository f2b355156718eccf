"""Other packs' text encoders on an anonymized CLIP: no row without the prefix is encoded; what cannot be is refused.

The packs are looked for in `COMFY_PACKS` (~/.cache/apl-hosts/packs), each in a folder of the name below; they are other
people's work and never part of this repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfy_host import host_folder, run_in_host

PACKS = Path(os.environ.get("COMFY_PACKS", "~/.cache/apl-hosts/packs")).expanduser()
pytestmark = pytest.mark.skipif(
    host_folder() is None or not PACKS.is_dir(),
    reason="no ComfyUI or no other packs: set COMFYUI_DIR and COMFY_PACKS (tests/comfy/README.md)",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pack", ["ADV_CLIP_emb", "prompt-control", "smZNodes", "ppm"])
def test_no_row_without_the_prefix_is_encoded(pack: str) -> None:
    found = run_in_host("third_party_in_host.py", 1700, str(PACKS))
    if found[pack].get("missing"):
        pytest.skip(f"{pack} is not in {PACKS}, or this host does not load it")
    assert found["control"]["bare"] == found["control"]["rows"] > 0, "the spy sees a plain CLIP's rows as bare"
    assert found[pack]["rows"] > 0 and found[pack]["held"] > 0, found[pack]
    assert found[pack]["bare"] == 0, found[pack]
    assert found[pack]["bare_afterwards"] == 0, found[pack]
    for message in found[pack]["refused"]:
        kind, _, said = message.partition(": ")
        assert kind == "PlacementError" and said, message
