"""What enforced mode costs: `python benchmarks/comfyui_enforcement.py`, where a ComfyUI is (tests/comfy/README.md).

Tokenizing and encoding by a text encoder of CLIP-L's real size (768 wide, 12 layers, random weights), with every hook
in place and with the host's own functions in their places, at one chunk both times. The hooks are put in and taken out
between the two, in turn, in one process; recorded as a claim.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "comfy")]
ROUNDS = 31
TEXT = "a photo of a (person:1.2) " + "in a garden " * 10


def in_the_host(host: Path, folder: Path) -> None:
    import enforced_in_host

    module, _kept = enforced_in_host.start(host, ROOT, folder, spy=False)
    import comfy.sd
    import torch
    from comfy import sd1_clip, supported_models_base

    logging.disable(logging.WARNING)
    hooks = enforced_in_host.enforce(module, folder).hooks.placed
    with torch.inference_mode():
        clip = comfy.sd.CLIP(supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
                             model_options={"dtype": torch.float32})
        for parameter in clip.cond_stage_model.parameters():
            parameter.normal_(0, 0.02)

        def encode(on: bool) -> tuple[float, Any]:
            for hook in hooks:
                setattr(hook.owner, hook.name, hook.replacement if on else hook.replacement.__wrapped__)
            start = time.process_time()
            found = clip.encode_from_tokens_scheduled(clip.tokenize(TEXT))
            return time.process_time() - start, found[0][0]

        shapes = {encode(on)[1].shape for on in (True, False)}
        if len(shapes) != 1 or torch.equal(encode(True)[1], encode(False)[1]):
            raise SystemExit("the prefix is not in, or the number of chunks differs")
        ratios = []
        for at in range(ROUNDS):
            spent = {on: encode(on)[0] for on in ((True, False) if at % 2 else (False, True))}
            ratios.append(spent[True] / spent[False])
    sys.stdout.write("\n" + json.dumps(sorted(ratios)) + "\n")


def main() -> int:
    from enforced_server import host_folder, host_python, make_base, write_policy

    from apl_train import claims

    host = host_folder()
    if host is None:
        sys.stderr.write("There is no ComfyUI: set COMFYUI_DIR (tests/comfy/README.md).\n")
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_policy(folder, width_sd1=768)
        make_base(folder)
        done = subprocess.run([host_python(host), __file__, "--in-host", str(host), name], cwd=host, check=False,
                              stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    ratios = json.loads(done.stdout.strip().splitlines()[-1])
    median, spread = ratios[len(ratios) // 2], (ratios[len(ratios) // 4], ratios[-len(ratios) // 4])
    sys.stdout.write(f"encode enforced / encode: median {median:.4f}, middle half {spread[0]:.4f} to {spread[1]:.4f}, "
                     f"{len(ratios)} rounds\n")
    claims.record({"comfy-enforcement": (median, None, len(ratios))})
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-host"]:
        in_the_host(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
