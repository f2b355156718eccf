"""What the extension costs in a WebUI: `python benchmarks/webui_cost.py`, where tests/a1111 finds a WebUI.

Import of the extension into an interpreter that has what every host has loaded; an encode with the prefix beside one
without, at equal chunks, through the host's own text encoder class around CLIP-L of the real size. Ratios within one
run, in turn; recorded as claims.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 25
TEXT = "a photo of a (person:1.2) " + "in a garden " * 10


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    """CPU time of `one` over that of `other`: the median of the rounds' ratios, each doing both."""
    found = []
    for index in range(rounds):
        spent = {}
        for work in (one, other) if index % 2 else (other, one):
            start = time.process_time()
            work()
            spent[work] = time.process_time() - start
        found.append(spent[one] / spent[other])
    return sorted(found)[len(found) // 2]


def import_cost() -> dict[str, Any]:
    """Milliseconds of CPU to load the extension as the host does, least of five, and what came along."""
    import importlib
    import importlib.util

    import numpy  # noqa: F401 - hosts have these
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    name, least, foreign = "apl_anonymization_prompt", float("inf"), set()
    for _ in range(5):
        for known in [known for known in sys.modules if known.startswith(name)]:
            del sys.modules[known]
        before, start = set(sys.modules), time.process_time()
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py",
                                                      submodule_search_locations=[str(ROOT)])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        importlib.import_module(f"{name}.a1111_extension.register")
        least = min(least, time.process_time() - start)
        foreign |= {each.split(".")[0] for each in set(sys.modules) - before if not each.startswith(name)}
    return {"import_ms": least * 1e3, "foreign": sorted(foreign - set(sys.stdlib_module_names))}


def encode_cost() -> float:
    """Encode with the prefix over encode without, by the host's encoder around a random CLIP-L; run in the host."""
    sys.argv = [sys.argv[0], "--use-cpu", "all", "--no-half", "--precision", "full", "--skip-torch-cuda-test"]
    sys.path.insert(0, str(Path.cwd()))
    import torch
    from modules import initialize

    initialize.imports()
    from modules import sd_hijack, sd_hijack_clip, shared
    from modules import sd_hijack_clip_utils as clip_utils
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import_cost()  # loads the package as the host would
    package = "apl_anonymization_prompt"
    encoder_module = sys.modules[f"{package}.a1111_extension.encoder"]
    jobs = sys.modules[f"{package}.a1111_extension.jobs"]
    prefix_module = sys.modules[f"{package}.apl_core.prefix"]
    metadata = sys.modules[f"{package}.apl_core.metadata"]
    hooks = sys.modules[f"{package}.a1111_extension.register"].HOOKS
    torch.set_num_threads(1)
    transformer = CLIPTextModel(CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, hidden_act="quick_gelu",
        bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)).eval()
    wrapped = torch.nn.Module()
    wrapped.transformer, wrapped.max_length = transformer, 77
    wrapped.tokenizer = CLIPTokenizer.from_pretrained(ROOT / "apl_train/miniworld/assets/model/tokenizer")
    layer = clip_utils.clip_text_embeddings(transformer)
    layer.token_embedding = sd_hijack.EmbeddingsWithFixes(layer.token_embedding, sd_hijack.model_hijack)
    encoder = sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords(wrapped, sd_hijack.model_hijack)
    plain = type(encoder).forward
    shared.opts.data["use_old_emphasis_implementation"] = False
    prefix = prefix_module.AnonymizationPrompt("sd1", {"emb_params": torch.randn(10, 768)}, metadata.PrefixMetadata())
    shapes = {tuple(plain(encoder, [TEXT]).shape)}
    encoder_module.patch_encoders(hooks)
    with torch.no_grad(), jobs.JOBS.job(jobs.Choice("test", None, prefix)):
        shapes.add(tuple(encoder([TEXT]).shape))
        assert jobs.JOBS.counters["verified_rows"] == 1
    assert len(shapes) == 1, f"the UNet would work more: {shapes}"

    def on() -> None:
        encoder_module.patch_encoders(hooks)
        with jobs.JOBS.job(jobs.Choice("test", None, prefix)):
            encoder([TEXT])

    def off() -> None:
        hooks.remove()  # the host as it comes
        encoder([TEXT])

    with torch.no_grad():
        return ratio(on, off, ROUNDS)


def startup_ratio(rounds: int = 3) -> float:
    """CPU time of the server until it answers, with the extension over without: the median of the rounds' ratios."""
    import os

    from webui_host import running

    found = []
    for index in range(rounds + 1):
        spent = {}
        for extension in (True, False) if index % 2 else (False, True):
            with running("--skip-load-model-at-start", probe=False, extension=extension, ui=True) as server:
                words = Path(f"/proc/{server.process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
                spent[extension] = sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")  # its children's too
        if index:  # the first round fills the caches of the disk and of compiled modules
            found.append(spent[True] / spent[False])
    return sorted(found)[len(found) // 2]


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "a1111")]
    from webui_host import host_folder, host_python

    from apl_train import claims

    host = host_folder()
    if host is None:
        sys.stderr.write("There is no WebUI: set WEBUI_DIR (tests/a1111/README.md).\n")
        return 1
    found: dict[str, Any] = {}
    for part in ("import", "encode"):
        done = subprocess.run([host_python(host), __file__, f"--{part}"], cwd=host, check=False,
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        found |= json.loads(done.stdout.strip().splitlines()[-1])
    found["startup"] = startup_ratio()
    sys.stdout.write(json.dumps(found) + "\n")
    claims.record({"webui-import": (found["import_ms"], None, 5), "webui-encode": (found["encode"], None, ROUNDS),
                   "webui-startup": (found["startup"], None, 3),
                   "webui-foreign": (float(len(found["foreign"])), None, 1)})
    return 0


if __name__ == "__main__":
    if "--import" in sys.argv:
        sys.stdout.write("\n" + json.dumps(import_cost()) + "\n")
    elif "--encode" in sys.argv:
        sys.stdout.write("\n" + json.dumps({"encode": encode_cost()}) + "\n")
    else:
        sys.exit(main())
