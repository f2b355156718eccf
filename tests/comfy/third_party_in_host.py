"""Other packs' text encoders on an anonymized CLIP, in the host: `third_party_in_host.py HOST REPOSITORY PACKS`.

A spy at the transformer's door looks at every row that is encoded: does the prefix stand at its place? Stock encodes
between the runs show what a pack leaves behind. The last line is JSON: pack to {"runs", "held", "refused": {message:
times}, "rows", "bare": rows without the prefix}.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import os
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["PIP_NO_INDEX"] = "1"  # one of the packs would install libraries as it is imported
PACKS = Path(sys.argv[3])

import in_host  # noqa: E402
import run_host  # noqa: E402
import torch  # noqa: E402

TEXTS = (
    "a photo of a (person:1.3) in a garden",
    "(a person:1.4) " + "in a garden of stones " * 14,
    "a [person] " + "and (a house:0.7) by the sea " * 30,
)
ROWS, BARE = Counter(), Counter()
PREFIXES = [rows for ap in (in_host.AP1, in_host.AP2) for rows in (ap.vectors(key) for key in ap.tensors)]
_now = {"pack": "stock"}


def spy() -> None:
    """Wrap the stack of layers that every CLIP-L and CLIP-G text ends in."""
    import comfy.clip_model

    inner = comfy.clip_model.CLIPTextModel_.forward

    def forward(self, input_tokens=None, *args: Any, embeds=None, **kwargs: Any) -> Any:
        rows = embeds if embeds is not None else self.embeddings(input_tokens)
        for row in rows.float():
            ROWS[_now["pack"]] += 1
            known = [p for p in PREFIXES if p.shape[1] == row.shape[1]]
            BARE[_now["pack"]] += not any(torch.equal(row[1 : 1 + len(p)], p) for p in known)
        return inner(self, input_tokens, *args, embeds=embeds, **kwargs)

    comfy.clip_model.CLIPTextModel_.forward = forward


def load(name: str) -> bool:
    if importlib.util.find_spec("diffusers") is None:  # a library that one of the packs imports imports it, for others
        run_host.stand_in("diffusers")
    return (PACKS / name).is_dir() and asyncio.run(in_host.nodes.load_custom_node(str(PACKS / name)))


def of_adv() -> Iterator[Callable[[], Any]]:
    node, xl = in_host.NODES["BNK_CLIPTextEncodeAdvanced"], in_host.NODES["BNK_CLIPTextEncodeSDXLAdvanced"]
    for text in TEXTS:
        for way in ("comfy", "A1111", "compel", "comfy++", "down_weight"):
            for norm in ("none", "length+mean"):
                yield lambda text=text, way=way, norm=norm: node().encode(in_host.ON1, text, norm, way)
            yield lambda text=text, way=way: xl().encode(in_host.ON2, text, text, "none", way, 0.5)


def of_prompt_control() -> Iterator[Callable[[], Any]]:
    node = in_host.NODES["PCTextEncode"]
    styles = [f"STYLE({style}) {text}" for style in ("comfy", "A1111", "compel", "comfy++", "down_weight", "perp")
              for text in TEXTS]
    for text in (*styles, "a cat BREAK a person", "[CUT:a person:a garden] in the sun", "a dog AVG(0.5) a person",
                 "a dog CAT a person", "a dog AND a person :0.5"):
        for clip in (in_host.ON1, in_host.ON2):
            yield lambda text=text, clip=clip: node.execute(clip, text)


def of_smz() -> Iterator[Callable[[], Any]]:
    node = in_host.NODES["smZ CLIPTextEncode"]
    sizes = (6.0, 1024, 1024, 0, 0, 1024, 1024)
    for text in TEXTS:
        for parser in ("comfy", "comfy++", "A1111", "full", "compel", "fixed attention"):
            for clip in (in_host.ON1, in_host.ON2):
                yield lambda text=text, parser=parser, clip=clip: node().encode(
                    clip, text, parser, True, True, False, False, *sizes, text, text)


def of_negpip() -> Iterator[Callable[[], Any]]:
    import comfy.model_base

    class Model(comfy.model_base.SDXL):
        """The node asks what kind of model it is, and patches its attention; no text is read by that."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.diffusion_model = torch.nn.Identity()

    import comfy.model_patcher

    cpu = torch.device("cpu")
    for text in (*TEXTS, "a photo, (a person:-1.2), in a garden"):
        for plain, ap in ((in_host.SD1, in_host.AP1), (in_host.SDXL, in_host.AP2)):
            for before in (True, False):
                def run(text=text, plain=plain, ap=ap, before=before) -> Any:
                    model = comfy.model_patcher.ModelPatcher(Model(), cpu, cpu)
                    clip = in_host.patch.anonymize(plain, ap) if before else plain
                    clip = in_host.NODES["CLIPNegPip"].execute(model=model, clip=clip).args[1]
                    clip = clip if before else in_host.patch.anonymize(clip, ap)
                    return in_host.NODES["CLIPTextEncode"]().encode(clip, text)

                yield run


WAYS = {"ADV_CLIP_emb": of_adv, "prompt-control": of_prompt_control, "smZNodes": of_smz, "ppm": of_negpip}


def main() -> None:
    import server

    if getattr(server.PromptServer, "instance", None) is None:  # one pack hangs a handler into it
        anything = types.SimpleNamespace(add_on_prompt_handler=lambda handler: None, on_prompt_handlers=[],
                                         routes=types.SimpleNamespace(get=lambda _: lambda f: f,
                                                                      post=lambda _: lambda f: f))
        server.PromptServer.instance = anything
    spy()
    found = {}
    for name, ways in WAYS.items():
        if not load(name):
            found[name] = {"missing": True}
            continue
        logging.disable(logging.WARNING)
        held, refused = 0, Counter()
        for run in ways():
            _now["pack"] = name
            try:
                with torch.inference_mode():
                    run()
                held += 1
            except Exception as error:
                refused[f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"] += 1
            _now["pack"] = f"{name}, stock afterwards"
            with torch.inference_mode():
                for clip in (in_host.ON1, in_host.ON2):
                    in_host.NODES["CLIPTextEncode"]().encode(clip, "a (dog:1.2)")
        logging.disable(logging.NOTSET)
        after = f"{name}, stock afterwards"
        found[name] = {"runs": held + sum(refused.values()), "held": held, "refused": dict(refused),
                       "rows": ROWS[name], "bare": BARE[name], "bare_afterwards": BARE[after]}
    _now["pack"] = "control"
    with torch.inference_mode():
        in_host.NODES["CLIPTextEncode"]().encode(in_host.SD1, "a dog")
    found["control"] = {"rows": ROWS["control"], "bare": BARE["control"]}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
