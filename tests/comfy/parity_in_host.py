"""An anonymized CLIP in the host beside transformers' own text models: `parity_in_host.py HOST REPOSITORY`.

The reference is transformers' CLIPTextModel with the host's weights and the prefix as further rows of its vocabulary;
chunks, emphasis and pooling are worked out here. The last line is JSON: row to the largest relative difference of
states and pooled output, and the same for changes that must show ("sensitivity").
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import in_host
import torch
from in_host import END, START, WIDTH_G, WIDTH_L, M, ids

CHANGE_KEY = "clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.weight"


class Reference:
    """One text encoder of transformers with a host encoder's weights, and further embeddings behind its vocabulary."""

    def __init__(self, encoder: Any, rows: torch.Tensor, kind: str, change: torch.Tensor | None = None) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel

        width = WIDTH_L if kind == "l" else WIDTH_G
        self.kind, self.m, self.pad = kind, M, END if kind == "l" else 0
        config = CLIPTextConfig(
            vocab_size=49408 + len(rows), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu" if kind == "l" else "gelu",
            eos_token_id=END, bos_token_id=START, pad_token_id=END, attn_implementation="sdpa")
        self.model = CLIPTextModel(config).eval()
        inner = getattr(self.model, "text_model", self.model)
        given = {key: value.float() for key, value in encoder.transformer.text_model.state_dict().items()}
        if change is not None:
            given[CHANGE_KEY.split("text_model.")[1]] = given[CHANGE_KEY.split("text_model.")[1]] + change
        name = "embeddings.token_embedding.weight"
        given[name] = torch.cat([given[name], rows])
        known = {key: value for key, value in inner.state_dict().items() if "position_ids" not in key}
        assert set(known) == {key for key in given if "position_ids" not in key}, set(known) ^ set(given)
        inner.load_state_dict(given, strict=False)
        self.final = inner.final_layer_norm
        projection = getattr(encoder.transformer, "text_projection", None)
        self.projection = projection.weight.float() if projection is not None and kind == "g" else None

    def chunk(self, words: Sequence[int]) -> list[int]:
        row = [START, *range(49408, 49408 + self.m), *words, END]
        return row + [self.pad] * (77 - len(row))

    def run(self, row: list[int], skip: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(states [77, width], pooled) of one chunk; `skip` -1 is the last layer."""
        out = self.model(input_ids=torch.tensor([row]), output_hidden_states=True)
        last = self.final(out.hidden_states[-1]) if skip != -1 else out.last_hidden_state
        states = out.last_hidden_state if skip == -1 else out.hidden_states[skip]
        if skip != -1 and self.kind == "l" and self.normed:
            states = self.final(states)
        pooled = last[0, row.index(END)]
        return states[0], pooled if self.projection is None else self.projection @ pooled

    normed = True

    def encode(self, words: Sequence[Any], skip: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
        """Words are ids or (id, weight); weights are measured from an empty chunk that carries the prefix."""
        pairs = [word if isinstance(word, tuple) else (word, 1.0) for word in words]
        room = 75 - self.m
        parts = [pairs[at : at + room] for at in range(0, max(1, len(pairs)), room)]
        empty, _ = self.run(self.chunk([]), skip)
        states, pooled = [], None
        for part in parts:
            z, seen = self.run(self.chunk([word for word, _ in part]), skip)
            pooled = seen if pooled is None else pooled
            weights = torch.ones(77, 1)
            for at, (_, weight) in enumerate(part):
                weights[1 + self.m + at] = weight
            states.append(torch.where(weights == 1, z, (z - empty) * weights + empty))
        return torch.cat(states)[None], pooled[None]


def relative(seen: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[float]:
    """Largest difference over the reference's largest value, of states and of pooled."""
    for a, b in zip(seen, wanted, strict=True):
        assert a.shape == b.shape, (tuple(a.shape), tuple(b.shape))
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(seen, wanted, strict=True)]


def table() -> dict[str, list[float]]:
    sd1, on, ap = in_host.SD1, in_host.ON1, in_host.AP1
    inversion = torch.randn(2, WIDTH_L, generator=torch.Generator().manual_seed(5))
    import safetensors.torch

    safetensors.torch.save_file({"emb_params": inversion}, str(in_host.EMBEDDINGS / "style.safetensors"))
    style = [49408 + M, 49409 + M]
    change = torch.randn(64, WIDTH_L, generator=torch.Generator().manual_seed(6)) * 0.3
    rows = torch.cat([ap.vectors(), inversion])
    one = Reference(sd1.cond_stage_model.clip_l, rows, "l")
    lora = Reference(sd1.cond_stage_model.clip_l, rows, "l", change)
    found: dict[str, list[float]] = {}

    def words(text: str) -> list[int]:
        return ids(sd1, "clip_l", text)

    for name, text in (("short", in_host.SHORT), ("empty", ""), ("65 tokens", "garden " * 65),
                       ("66 tokens", "garden " * 66), ("170 tokens", "garden " * 170)):
        found[f"SD1 {name}"] = relative(in_host.encoded(on, text), one.encode(words(text)))
    for weights in ((1.4, 0.6), (0.0, 1.0)):
        text = f"(a person:{weights[0]}) in a (garden:{weights[1]})"
        said = [(w, weights[0]) for w in words("a person")] + words("in a") + [(w, weights[1]) for w in words("garden")]
        found[f"SD1 weights {weights[0]} and {weights[1]}"] = relative(in_host.encoded(on, text), one.encode(said))
    found["SD1 textual inversion, weighted"] = relative(
        in_host.encoded(on, "(embedding:style:1.3) in a garden"),
        one.encode([(s, 1.3) for s in style] + words("in a garden")))
    for skip in (-1, -2, -3):
        after, before = on.clone(), sd1.clone()
        for skipped in (after, before):
            skipped.clip_layer(skip)
        before = in_host.patch.anonymize(before, ap)
        wanted = one.encode(words(in_host.LONG), skip)
        found[f"SD1 clip skip {skip} after"] = relative(in_host.encoded(after, in_host.LONG), wanted)
        found[f"SD1 clip skip {skip} before"] = relative(in_host.encoded(before, in_host.LONG), wanted)
    patched = []
    for first in (True, False):
        made = (sd1 if first else on).clone()
        made.add_patches({CHANGE_KEY: ("diff", (change,))}, 1.0)
        patched.append(in_host.patch.anonymize(made, ap) if first else made)
    wanted = lora.encode(words(in_host.SHORT))
    found["SD1 LoRA, then prefix"] = relative(in_host.encoded(patched[0], in_host.SHORT), wanted)
    found["SD1 prefix, then LoRA"] = relative(in_host.encoded(patched[1], in_host.SHORT), wanted)
    found["SD1 prefix again, without the LoRA"] = relative(in_host.encoded(on, in_host.SHORT),
                                                           one.encode(words(in_host.SHORT)))
    for strength, seen in enumerate(in_host.scheduled()):
        found[f"SD1 hook, strength {strength}"] = relative(seen, (one, lora)[strength].encode(words(in_host.LONG)))
    foreign = [[(t, 1.0) for t in [START, *words(in_host.SHORT), END]]]
    foreign[0] += [(END, 1.0)] * (77 - len(foreign[0]))
    found["SD1 tokens of another pack"] = relative(on.encode_from_tokens({"l": foreign}, return_pooled=True),
                                                   one.encode(words(in_host.SHORT)))
    found |= _xl()
    return found


def _xl() -> dict[str, list[float]]:
    model, on, ap = in_host.SDXL, in_host.ON2, in_host.AP2
    left = Reference(model.cond_stage_model.clip_l, ap.vectors("clip_l"), "l")
    left.normed = False
    right = Reference(model.cond_stage_model.clip_g, ap.vectors("clip_g"), "g")

    def both(said_l: Sequence[Any], said_g: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        l_states, (g_states, pooled) = left.encode(said_l, -2)[0], right.encode(said_g, -2)
        empty = left.encode([], -2)[0]
        l_states = torch.cat([l_states] + [empty] * ((g_states.shape[1] - l_states.shape[1]) // 77), dim=1)
        return torch.cat([l_states, g_states], dim=-1), pooled

    def words(text: str) -> list[int]:
        return ids(model, "clip_l", text)

    found = {}
    for name, text in (("short", in_host.SHORT), ("170 tokens", "garden " * 170)):
        found[f"SDXL {name}"] = relative(in_host.encoded(on, text), both(words(text), words(text)))
    said = [(w, 1.4) for w in words("a person")] + words("in a garden")
    found["SDXL weight 1.4"] = relative(in_host.encoded(on, "(a person:1.4) in a garden"), both(said, said))
    node = asyncio.run(in_host._extras("nodes_clip_sdxl.py"))["CLIPTextEncodeSDXL"]
    (cond, extra), = node.execute(on, 64, 64, 0, 0, 64, 64, "garden " * 170, in_host.SHORT).args[0]
    found["SDXL node, text_g long, text_l short"] = relative(
        (cond, extra["pooled_output"]), both(words(in_host.SHORT), words("garden " * 170)))
    refiner = in_host.clip("refiner")
    alone = Reference(refiner.cond_stage_model.clip_g, ap.vectors("clip_g"), "g")
    found["SDXL refiner"] = relative(in_host.encoded(in_host.patch.anonymize(refiner, ap), in_host.LONG),
                                     alone.encode(words(in_host.LONG), -2))
    return found


def sensitivity() -> dict[str, float]:
    """What the same comparison says when something is wrong: none of these may look like a match."""
    one = Reference(in_host.SD1.cond_stage_model.clip_l, in_host.AP1.vectors(), "l")
    turned = Reference(in_host.SD1.cond_stage_model.clip_l, in_host.AP1.vectors().flip(0), "l")
    said = ids(in_host.SD1, "clip_l", in_host.SHORT)
    seen = in_host.encoded(in_host.ON1, in_host.SHORT)
    return {
        "no prefix": relative(in_host.encoded(in_host.SD1, in_host.SHORT), one.encode(said))[0],
        "rows reversed": relative(seen, turned.encode(said))[0],
        "clip skip -2": relative(seen, one.encode(said, -2))[0],
        "weight 1.4": relative(seen, one.encode([(word, 1.4) for word in said]))[0],
    }


def main() -> None:
    logging.disable(logging.WARNING)
    import comfyui_version

    with torch.inference_mode():
        found = {"version": comfyui_version.__version__, "table": table(), "sensitivity": sensitivity()}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
