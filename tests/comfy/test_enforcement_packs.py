"""Other packs' encoders on an enforced server, on a plain CLIP: no row without the prefix is ever encoded.

The packs lie in `COMFY_PACKS` (~/.cache/apl-hosts/packs), as for `test_third_party.py`; what is missing is left out,
and without any the file is skipped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from enforced_server import Server, host_folder, make_base, serving, write_policy
from test_enforcement import NAME, Graph, seen_of

PACKS = Path(os.environ.get("COMFY_PACKS", "~/.cache/apl-hosts/packs")).expanduser()
FOUND = [PACKS / name for name in ("ADV_CLIP_emb", "prompt-control", "smZNodes") if (PACKS / name).is_dir()]
pytestmark = [
    pytest.mark.skipif(host_folder() is None or not FOUND, reason="no ComfyUI, or no packs (tests/comfy/README.md)"),
    pytest.mark.timeout(1500),
]
TEXTS = (f"a ({NAME}:1.3) in a garden", f"(a photo:1.2) of {NAME}, " + "in a wide garden, " * 14,
         f"a ({NAME}:0.7) " + "in a garden, " * 60)

@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("enforced-packs")
    policy = write_policy(folder)
    base = make_base(folder, FOUND)
    with serving(folder, base, str(policy), stand_ins=["diffusers"]) as running:
        running.get("/spy/report")
        yield running


def ways(nodes: dict) -> Iterator[tuple[str, dict]]:
    """(pack, graph) of every encode that is tried."""
    for text in TEXTS:
        for kind in ("sd1", "sdxl"):
            def clip_in(g: Graph, kind: str = kind) -> list:
                return g.checkpoint()[1] if kind == "sd1" else g.add("TestClip", encoder="sdxl")

            for way in ("comfy", "A1111", "compel", "comfy++", "down_weight"):
                g = Graph()
                if "BNK_CLIPTextEncodeAdvanced" in nodes and kind == "sd1":
                    yield "ADV_CLIP_emb", g.sink(g.add("BNK_CLIPTextEncodeAdvanced", clip=clip_in(g), text=text,
                                                       token_normalization="none", weight_interpretation=way))
                g = Graph()
                if "BNK_CLIPTextEncodeSDXLAdvanced" in nodes and kind == "sdxl":
                    yield "ADV_CLIP_emb", g.sink(g.add(
                        "BNK_CLIPTextEncodeSDXLAdvanced", clip=clip_in(g), text_l=text, text_g=text, balance=0.5,
                        token_normalization="none", weight_interpretation=way))
                g = Graph()
                if "PCTextEncode" in nodes:
                    yield "prompt-control", g.sink(g.add("PCTextEncode", clip=clip_in(g), text=f"STYLE({way}) {text}"))
            for shape in ("{} BREAK a garden", "[CUT:{}:a garden] in the sun", "a dog AVG(0.5) {}", "a dog CAT {}",
                          "a dog AND {} :0.5"):
                g = Graph()
                if "PCTextEncode" in nodes:
                    yield "prompt-control", g.sink(g.add("PCTextEncode", clip=clip_in(g), text=shape.format(text)))
            for parser in ("comfy", "comfy++", "A1111", "full", "compel", "fixed attention"):
                g = Graph()
                if "smZ CLIPTextEncode" in nodes:
                    inputs = nodes["smZ CLIPTextEncode"]["input"]
                    values = {name: options[1]["default"]
                              for name, options in (*inputs["required"].items(), *inputs.get("optional", {}).items())
                              if len(options) > 1 and isinstance(options[1], dict) and "default" in options[1]}
                    values |= {"clip": clip_in(g), "text": text, "parser": parser, "text_g": text, "text_l": text}
                    yield "smZNodes", g.sink(g.add("smZ CLIPTextEncode", **values))


def test_other_packs_encoders(server: Server) -> None:
    found: Counter[tuple[str, str]] = Counter()
    wrong, foreign = [], []
    for pack, graph in ways(server.get("/object_info")):
        status, answer = server.run(graph)
        seen, detail = seen_of(server, status, answer)
        found[pack, seen if status == "ok" else f"{seen}: {str(answer)[:110]}"] += 1
        if seen not in ("protected", "refused"):
            wrong.append(f"{pack}: {graph}: {seen} {detail}")
        if "did not encode" in str(answer):
            foreign.append(f"{pack}: {graph}")
    print("\n".join(f"{number:4} {pack}: {seen}" for (pack, seen), number in sorted(found.items())))  # noqa: T201
    assert not wrong, "\n".join(wrong)
    assert not foreign, "\n".join(foreign)  # what these packs work out from the server's own rows is served
    assert sum(number for (_, seen), number in found.items() if seen == "protected") > 0
    assert server.get("/apl/status")["ok"]
