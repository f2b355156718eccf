"""Writes `locales/en` anew from the nodes: `python tests/comfy/write_locales.py`; a test holds the two together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from comfy_host import ROOT, host_folder, host_python


def main() -> int:
    host = host_folder()
    if host is None:
        sys.stderr.write("There is no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md).\n")
        return 1
    script = Path(__file__).with_name("in_host.py")
    return subprocess.run([host_python(host), str(script), str(host), str(ROOT), "--write-locales"], cwd=host,
                          check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
