"""Enforced mode on the real server: attempts to have a name encoded without the prefix, and what became of each.

What is expected is one of these: "protected", every row that reached a transformer carries the prefix; "refused", the
graph was not queued or ended with a message, and nothing bare was encoded; "pushes away", bare rows, in the negative
prompt of a guidance above 1 alone; "agreed", bare rows of persons who agreed, without the name. What is seen comes from
the spy of `enforcement_pack`, below the enforcement, and from the signs with which the diffusion model used each row.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from enforced_server import WIDTH_L, M, Server, host_folder, make_base, serving, write_policy

pytestmark = [
    pytest.mark.skipif(host_folder() is None, reason="no ComfyUI: set COMFYUI_DIR and COMFYUI_PYTHON"),
    pytest.mark.timeout(1500),
]
NAME = "zanthor quell"
POLICY = {
    "deny": ["LoadImage*", "*IPAdapter*", "unCLIPConditioning", "StyleModelApply", "HypernetworkLoader",
             "embedding:secret*"],
    "consent": {"persons": [{"id": "agreement-7", "name": "Ada Example"}]},
}


class Graph(dict):
    """A graph in API format under construction."""

    def add(self, kind: str, **inputs: Any) -> list:
        """A node; returns its first output. Further ones: [link[0], n]."""
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]

    def checkpoint(self, name: str = "tiny.safetensors") -> tuple[list, list]:
        """(model, clip) of the host's own loader."""
        node = self.add("CheckpointLoaderSimple", ckpt_name=name)[0]
        return [node, 0], [node, 1]

    def encode(self, clip: list, text: str) -> list:
        """The host's own CLIP Text Encode."""
        return self.add("CLIPTextEncode", clip=clip, text=text)

    def sink(self, conditioning: list) -> Graph:
        """End in what a sampler does first."""
        self.add("TestSink", conditioning=conditioning)
        return self

    def sample(self, model: list, positive: list, negative: list, cfg: float = 7.0, mask: float | None = None,
               **more: Any) -> Graph:
        """Two steps of the host's own KSampler; with a noise mask of one value where it is given."""
        latent = self.add("EmptyLatentImage", width=64, height=64, batch_size=1)
        if mask is not None:
            latent = self.add("TestNoiseMask", latent=latent, value=mask)
        values = {"seed": 1, "steps": 2, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0} | more
        self.add("TestLatent", latent=self.add("KSampler", model=model, positive=positive, negative=negative, cfg=cfg,
                                               latent_image=latent, **values))
        return self

    def guided(self, guider: list, model: list, flip: bool = False, sampler: str = "euler") -> Graph:
        """Two steps of SamplerCustomAdvanced."""
        sigmas = self.add("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
        if flip:
            sigmas = self.add("FlipSigmas", sigmas=sigmas)
        out = self.add("SamplerCustomAdvanced", noise=self.add("RandomNoise", noise_seed=1), guider=guider,
                       sampler=self.add("KSamplerSelect", sampler_name=sampler), sigmas=sigmas,
                       latent_image=self.add("EmptyLatentImage", width=64, height=64, batch_size=1))
        self.add("TestLatent", latent=out)
        return self


@dataclass(frozen=True)
class Attempt:
    """One row of the table. `part` is the row of comfyui.md 4.4 or "own"; `says` must be in a refusal's message."""

    part: str
    name: str
    build: Callable[[str], Any]
    expected: str
    says: str = ""
    sent: tuple[tuple[str, Any], ...] = ()


ATTEMPTS: list[Attempt] = []


def attempt(part: str, name: str, expected: str, says: str = "", **sent: Any) -> Callable[..., Any]:
    def note(build: Callable[[str], Any]) -> Callable[[str], Any]:
        ATTEMPTS.append(Attempt(part, name, build, expected, says, tuple(sent.items())))
        return build

    return note


def simple(part: str, name: str, expected: str, build: Callable[[Graph, list, list, str], Any], says: str = "",
           **sent: Any) -> None:
    """An attempt that begins with the checkpoint: build(graph, model, clip, text)."""

    def whole(text: str) -> Any:
        graph = Graph()
        return build(graph, *graph.checkpoint(), text)

    ATTEMPTS.append(Attempt(part, name, whole, expected, says, tuple(sent.items())))


def to_sink(build: Callable[[Graph, list, str], list]) -> Callable[[Graph, list, list, str], Graph]:
    return lambda g, model, clip, text: g.sink(build(g, clip, text))


def prompt(pattern: str) -> Callable[[Graph, list, list, str], Graph]:
    """CLIP Text Encode of a text with the name somewhere in it."""
    return to_sink(lambda g, clip, text: g.encode(clip, pattern.replace("NAME", text)))


# -- the routes by which a graph reaches the server

PLAIN = prompt("a photo of NAME")
simple("graph", "API format at /prompt", "protected", PLAIN)
simple("graph", "API format at /api/prompt", "protected", PLAIN, path="/api/prompt")
simple("graph", "a node that expands into CLIP Text Encode", "protected",
       to_sink(lambda g, c, t: g.add("TestExpands", clip=c, text=t)))
simple("graph", "partial execution of one output", "protected",
       lambda g, m, c, t: g.sink(g.encode(c, t)).sink(g.encode(c, f"{t} again")), partial_execution_targets=["3"])
simple("graph", "front of the queue, own prompt id", "protected", PLAIN, front=True, prompt_id="NEW")
simple("graph", "nodes of a subgraph, numbered as the page sends them", "protected", lambda g, m, c, t: {
    f"7:{number}": {**node, "inputs": {key: [f"7:{value[0]}", value[1]] if isinstance(value, list) else value
                                       for key, value in node["inputs"].items()}}
    for number, node in PLAIN(g, m, c, t).items()})
simple("own", "policy keys in the request", "protected", PLAIN, APL_POLICY={"mode": "default_off"},
       extra_data={"apl": False, "APL_POLICY": "{}", "mode": "default_off"})


@attempt("own", "the same graph twice (the host's cache)", "protected")
def _cached(text: str) -> Graph:
    graph = Graph()
    clip = graph.checkpoint()[1]
    return graph.sink(graph.encode(clip, f"{NAME} cached"))


# -- loaders, LoRA, hooks, clip skip, merges, weight editing

LOADERS = "loaders and patches"
simple(LOADERS, "clip skip", "protected",
       to_sink(lambda g, c, t: g.encode(g.add("CLIPSetLastLayer", clip=c, stop_at_clip_layer=-2), t)))
simple(LOADERS, "LoRA of the text encoder", "protected", lambda g, m, c, t: g.sink(g.encode(
    [g.add("LoraLoader", model=m, clip=c, lora_name="tiny.safetensors", strength_model=1.0, strength_clip=5.0)[0], 1],
    t)))
simple(LOADERS, "two checkpoints' encoders merged", "protected", lambda g, m, c, t: g.sink(g.encode(
    g.add("CLIPMergeSimple", clip1=c, clip2=g.checkpoint("tiny2.safetensors")[1], ratio=0.5), t)))
simple(LOADERS, "one encoder subtracted from another", "protected", lambda g, m, c, t: g.sink(g.encode(
    g.add("CLIPMergeSubtract", clip1=c, clip2=g.checkpoint("tiny2.safetensors")[1], multiplier=1.0), t)))
simple(LOADERS, "attention of the encoder multiplied", "protected", to_sink(lambda g, c, t: g.encode(
    g.add("CLIPAttentionMultiply", clip=c, q=0.1, k=3.0, v=1.0, out=1.0), t)))


def _hooked(g: Graph, clip: list, text: str) -> list:
    hook = g.add("CreateHookLora", lora_name="tiny.safetensors", strength_model=1.0, strength_clip=1.0)
    frames = g.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    frames = g.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=frames)
    hook = g.add("SetHookKeyframes", hooks=hook, hook_kf=frames)
    return g.encode(g.add("SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True, hooks=hook), text)


simple(LOADERS, "LoRA hooks on a schedule", "protected", to_sink(_hooked))
simple("weight editing", "a node on the deny-list", "refused", lambda g, m, c, t: g.sample(
    g.add("HypernetworkLoader", model=m, hypernetwork_name="x.pt", strength=1.0), g.encode(c, t), g.encode(c, "")),
    says="does not offer the node HypernetworkLoader")
simple("own", "a denied node in an unused branch", "refused",
       lambda g, m, c, t: (g.add("LoadImage", image="x.png"), g.sink(g.encode(c, t)))[1], says="LoadImage")
simple("own", "training on the server", "refused", lambda g, m, c, t: (g.add(
    "TrainLoraNode", model=m), g.sink(g.encode(c, t)))[1], says="TrainLoraNode")
simple("own", "our own training node", "refused", lambda g, m, c, t: (g.add(
    "APL_TrainAnonymizationPrompt"), g.sink(g.encode(c, t)))[1], says="APL_TrainAnonymizationPrompt")


@attempt("own", "SDXL, the name in text_l alone", "protected")
def _sdxl(text: str) -> Graph:
    g = Graph()
    return g.sink(g.add("CLIPTextEncodeSDXL", clip=g.add("TestClip", encoder="sdxl"), width=64, height=64, crop_w=0,
                        crop_h=0, target_width=64, target_height=64, text_g="a garden, " * 60, text_l=text))


@attempt("own", "SDXL, weighted and long", "protected")
def _sdxl_long(text: str) -> Graph:
    g = Graph()
    return g.sink(g.encode(g.add("TestClip", encoder="sdxl"), f"({text}:1.4) " + "in a wide garden, " * 40 + text))


@attempt("own", "the SDXL refiner", "protected")
def _refiner(text: str) -> Graph:
    g = Graph()
    return g.sink(g.add("CLIPTextEncodeSDXLRefiner", clip=g.add("TestClip", encoder="refiner"), ascore=6.0, width=64,
                        height=64, text=text))


@attempt("no prefix", "a T5 encoder", "refused", "no anonymization prompt")
def _t5(text: str) -> Graph:
    g = Graph()
    return g.sink(g.encode(g.add("TestClip", encoder="t5"), text))


@attempt("no prefix", "SD3 with CLIP-L and CLIP-G alone", "refused", "no anonymization prompt")
def _sd3(text: str) -> Graph:
    g = Graph()
    return g.sink(g.encode(g.add("TestClip", encoder="sd3"), text))


# -- what a pack could do with the encoder

simple("raw encoder", "token ids given to the transformer", "refused",
       to_sink(lambda g, c, t: g.add("TestRawIds", clip=c, text=t)), says="without the anonymization prompt")
for _how in ("bare", "behind", "reversed", "nearly", "masked", "short"):
    simple("raw encoder", f"vectors made by hand: {_how}", "refused",
           to_sink(lambda g, c, t, how=_how: g.add("TestRawEmbeds", how=how, clip=c, text=t)),
           says="without the anonymization prompt")
simple("own", "the layers called directly: result not sealed", "refused bare",
       to_sink(lambda g, c, t: g.add("TestLayersDirectly", clip=c, text=t)), says="did not encode")
simple("tokens", "a short row of tokens", "protected",
       to_sink(lambda g, c, t: g.add("TestTokens", how="short", clip=c, text=t)))
simple("tokens", "a full row of 75 tokens", "refused",
       to_sink(lambda g, c, t: g.add("TestTokens", how="full", clip=c, text=t)), says="75 tokens")
for _how, _expected, _says in (("no start", "refused", "start token"), ("name first", "refused", "start token"),
                               ("prefix last", "refused", "repeats"), ("double end", "protected", ""),
                               ("ints of tensors", "protected", "")):
    simple("own", f"tokens: {_how}", _expected,
           to_sink(lambda g, c, t, how=_how: g.add("TestTokens", how=how, clip=c, text=t)), says=_says)
simple("own", "a tokenizer set on the instance", "protected",
       to_sink(lambda g, c, t: g.add("TestInstanceTokenizer", clip=c, text=t)))
simple("own", "an object patch with vectors of its own", "refused",
       to_sink(lambda g, c, t: g.add("TestObjectPatch", clip=c, text=t)), says="without the anonymization prompt")
simple("own", "a text encoder that no loader made", "refused",
       to_sink(lambda g, c, t: g.add("TestOwnEncoder", text=t)), says="not loaded by")
simple("own", "an old pack's own list around encoded tensors", "protected",
       to_sink(lambda g, c, t: g.add("TestOldStyle", clip=c, text=t)))

simple("seal", "an old pack's weighted sums of several encodes", "protected",
       to_sink(lambda g, c, t: g.add("TestOwnSums", how="sums", clip=c, text=t)))
for _how, _name, _expected in (
    ("foreign", "the same with a little of another library's conditioning", "refused"),
    ("bare", "the same with text encoded by the layers directly", "refused bare"),
    ("pooled", "the same with another pooled text", "refused"),
    ("object", "the same with a tensor beside it", "refused"),
    ("noisy", "the same with a foreign chunk behind", "refused"), ("file", "another one from a file", "refused"),
):
    simple("own", _name, _expected, to_sink(lambda g, c, t, how=_how: g.add("TestOwnSums", how=how, clip=c, text=t)),
           says="did not encode")

# -- what a text can hold

for _pattern in ("", "NAME", "(NAME:5)", "(NAME:0)", "(NAME:-1)", "((((NAME))))", "[NAME]", "(((NAME:1.5) a:2) b:0.3)",
                 "a BREAK NAME", "a AND NAME", "a, " * 100 + "NAME", "NAME " * 40, "\u200bNAME\u2028", "NAME\x00\x07",
                 "<|startoftext|>NAME<|endoftext|>", "<|endoftext|> NAME", "{NAME|a}", "\\(NAME\\)", "(NAME", "NAME)",
                 "(NAME:nan)", "(NAME:1e30)", "embedding:absent NAME", "embedding:person NAME",
                 "(embedding:person:3) NAME"):
    simple("own" if _pattern else "empty prompt", f"text {_pattern[:26]!r}{'…' * (len(_pattern) > 26)}", "protected",
           prompt(_pattern))
# The host itself trips over a name that is not there.
simple("own", "text 'NAME embedding:'", "refused or protected", prompt("NAME embedding:"))
for _pattern in ("NAME embedding:ap", "(embedding:ap:0) NAME", "embedding:mirror NAME", "NAME, embedding:stretched"):
    simple("antidotes", f"text {_pattern!r}", "refused", prompt(_pattern), says="repeats the anonymization prompt")
simple("antidotes", "an embedding of NaN", "refused", prompt("embedding:nan NAME"), says="NaN")
simple("antidotes", "an embedding on the deny-list", "refused", prompt("a embedding:secretperson NAME"),
       says="secretperson")
simple("antidotes", "the prefix in the negative prompt", "refused",
       lambda g, m, c, t: g.sample(m, g.encode(c, t), g.encode(c, "embedding:ap")), says="repeats")

# -- conditioning from elsewhere

simple("seal", "a conditioning from another library", "refused", to_sink(lambda g, c, t: g.add("TestForeign", seed=3)),
       says="did not encode")
simple("seal", "a conditioning through a file", "refused",
       to_sink(lambda g, c, t: g.add("TestThroughFile", conditioning=g.encode(c, t))), says="did not encode")
simple("own", "a mark made of text", "refused",
       to_sink(lambda g, c, t: g.add("TestForgedMark", conditioning=g.encode(c, t))), says="did not encode")
simple("own", "foreign conditioning washed by ConditioningAverage", "refused", to_sink(lambda g, c, t: g.add(
    "ConditioningAverage", conditioning_to=g.encode(c, t), conditioning_from=g.add("TestForeign", seed=4),
    conditioning_to_strength=0.0)), says="did not encode")
simple("own", "foreign conditioning washed by ConditioningConcat", "refused", to_sink(lambda g, c, t: g.add(
    "ConditioningConcat", conditioning_to=g.encode(c, t), conditioning_from=g.add("TestForeign", seed=5))),
    says="did not encode")
simple("seal", "LoadTrainingDataset", "refused",
       lambda g, m, c, t: g.sink(g.add("LoadTrainingDataset", folder_name="x")), says="LoadTrainingDataset")
simple("seal", "ConditioningZeroOut", "protected",
       to_sink(lambda g, c, t: g.add("ConditioningZeroOut", conditioning=g.encode(c, t))))
simple("seal", "average, concat, combine, area, range of sealed ones", "protected", to_sink(lambda g, c, t: g.add(
    "ConditioningSetTimestepRange", start=0.1, end=0.9, conditioning=g.add(
        "ConditioningSetArea", width=64, height=64, x=0, y=0, strength=1.0, conditioning=g.add(
            "ConditioningCombine", conditioning_1=g.add(
                "ConditioningAverage", conditioning_to=g.encode(c, t), conditioning_from=g.encode(c, f"{t} b"),
                conditioning_to_strength=0.5), conditioning_2=g.add(
                "ConditioningConcat", conditioning_to=g.encode(c, f"{t} c"),
                conditioning_from=g.encode(c, f"{t} d")))))))

# -- the negative prompt

simple("negative", "name in the negative, cfg 7", "pushes away",
       lambda g, m, c, t: g.sample(m, g.encode(c, "a garden"), g.encode(c, t)))
simple("negative", "a long negative, cfg 7", "pushes away",
       lambda g, m, c, t: g.sample(m, g.encode(c, "a garden"), g.encode(c, "ugly, " * 50 + t)))
simple("negative", "CFGGuider, cfg 7", "pushes away", lambda g, m, c, t: g.guided(g.add(
    "CFGGuider", model=m, positive=g.encode(c, "a"), negative=g.encode(c, t), cfg=7.0), m))
for _cfg in (0.0, 0.5, 1.0):
    simple("negative", f"name in the negative, cfg {_cfg}", "protected",
           lambda g, m, c, t, cfg=_cfg: g.sample(m, g.encode(c, "a garden"), g.encode(c, t), cfg=cfg))
for _key in ("area", "mask", "strength", "start_percent", "default", "unknown"):
    simple("negative", f"a positive that vanishes: {_key}", "protected", lambda g, m, c, t, key=_key: g.sample(
        m, g.add("TestSetKey", key=key, conditioning=g.encode(c, "a garden")), g.encode(c, t)))
simple("negative", "positive under the host's own mask", "protected", lambda g, m, c, t: g.sample(m, g.add(
    "ConditioningSetMask", conditioning=g.encode(c, "a"), mask=g.add("SolidMask", value=0.0, width=64, height=64),
    strength=1.0, set_cond_area="default"), g.encode(c, t)))
simple("negative", "positive that ends before the last step", "protected", lambda g, m, c, t: g.sample(m, g.add(
    "ConditioningSetTimestepRange", conditioning=g.encode(c, "a"), start=0.0, end=0.5), g.encode(c, t)))
simple("negative", "a second positive everywhere, the first masked", "protected", lambda g, m, c, t: g.sample(m, g.add(
    "ConditioningCombine", conditioning_1=g.encode(c, "a"), conditioning_2=g.add(
        "TestSetKey", key="mask", conditioning=g.encode(c, "b"))), g.encode(c, t)))
simple("negative", "no positive at all", "protected", lambda g, m, c, t: g.sample(
    m, g.add("TestEmpty", conditioning=g.encode(c, "a")), g.encode(c, t)))
simple("negative", "unsampling with flipped sigmas", "protected", lambda g, m, c, t: g.guided(g.add(
    "CFGGuider", model=m, positive=g.encode(c, "a"), negative=g.encode(c, t), cfg=7.0), m, flip=True))
simple("negative", "guidance by PerpNeg", "protected", lambda g, m, c, t: g.guided(g.add(
    "PerpNegGuider", model=m, positive=g.encode(c, "a"), negative=g.encode(c, t), empty_conditioning=g.encode(c, ""),
    cfg=7.0, neg_scale=1.0), m))
simple("negative", "guidance by two conditions", "protected", lambda g, m, c, t: g.guided(g.add(
    "DualCFGGuider", model=m, cond1=g.encode(c, "a"), cond2=g.encode(c, f"{t} b"), negative=g.encode(c, t),
    cfg_conds=7.0, cfg_cond2_negative=7.0, style="regular"), m))
simple("own", "guidance by none", "protected", lambda g, m, c, t: g.guided(g.add(
    "BasicGuider", model=m, conditioning=g.encode(c, t)), m))
simple("negative", "guidance rescaled", "protected", lambda g, m, c, t: g.sample(
    g.add("RescaleCFG", model=m, multiplier=0.7), g.encode(c, "a"), g.encode(c, t)))
simple("own", "another prediction type", "protected", lambda g, m, c, t: g.sample(
    g.add("ModelSamplingDiscrete", model=m, sampling="x0", zsnr=False), g.encode(c, "a"), g.encode(c, t)))
simple("own", "a sampler that uses the negative's direction", "protected", lambda g, m, c, t: g.sample(
    m, g.encode(c, "a"), g.encode(c, t), sampler_name="euler_cfg_pp"))
simple("own", "a negative changed by a node", "protected", lambda g, m, c, t: g.sample(m, g.encode(c, "a"), g.add(
    "ConditioningAverage", conditioning_to=g.encode(c, t), conditioning_from=g.encode(c, f"{t} b"),
    conditioning_to_strength=0.5)))
for _key in ("area", "mask", "strength", "start_percent"):
    simple("own", f"a negative that comes and goes, in a multistep sampler: {_key}", "protected",
           lambda g, m, c, t, key=_key: g.sample(m, g.encode(c, "a"), g.add("ConditioningCombine", conditioning_1=g.add(
               "TestSetKey", key=key, conditioning=g.encode(c, t)), conditioning_2=g.encode(c, "")),
               sampler_name="dpmpp_2m"))
simple("own", "the model's last layers subtracted", "protected", lambda g, m, c, t: g.sample(g.add(
    "ModelMergeSubtract", model1=m, model2=g.checkpoint("tiny2.safetensors")[0], multiplier=-1.0), g.encode(c, "a"),
    g.encode(c, t)))
for _value, _expected in ((-0.5, "protected"), (1.5, "protected"), (0.5, "pushes away")):
    simple("own", f"a noise mask of {_value}", _expected, lambda g, m, c, t, value=_value: g.sample(
        m, g.encode(c, "a"), g.encode(c, t), mask=value))
simple("own", "a LoRA on the model", "pushes away", lambda g, m, c, t: g.sample(g.add(
    "LoraLoaderModelOnly", model=m, lora_name="tiny.safetensors", strength_model=1.0), g.encode(c, "a"),
    g.encode(c, t)))
simple("own", "positive and negative swapped", "pushes away",
       lambda g, m, c, t: g.sample(m, g.encode(c, t), g.encode(c, "bad quality")))
simple("own", "one conditioning on both sides, cfg 7", "pushes away",
       lambda g, m, c, t: (lambda same: g.sample(m, same, same))(g.encode(c, t)))
simple("own", "the difference of two pictures turned round", "refused",
       lambda g, m, c, t: (g.add("LatentSubtract", samples1=["9", 0], samples2=["9", 0]), g.sink(g.encode(c, t)))[1],
       says="LatentSubtract")


@attempt("own", "the same, by a node that expands", "refused")
def _expanded(text: str) -> Graph:
    g = Graph()
    g.checkpoint()
    latent = g.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    g.add("TestLatent", latent=g.add("TestExpandsToDenied", latent=latent))
    return g


# -- pictures, and persons who agreed

simple("pixels", "img2img from an uploaded picture", "refused", lambda g, m, c, t: (g.add(
    "LoadImage", image="x.png"), g.sink(g.encode(c, t)))[1], says="LoadImage")
simple("pixels", "an uploaded latent", "refused", lambda g, m, c, t: (g.add(
    "LoadLatent", latent="x.latent"), g.sink(g.encode(c, t)))[1], says="LoadLatent")
simple("pixels", "pictures as conditioning", "refused", lambda g, m, c, t: (g.add(
    "unCLIPConditioning", conditioning=["9", 0]), g.sink(g.encode(c, t)))[1], says="unCLIPConditioning")
simple("consent", "a person who agreed", "agreed", prompt("a photo of Ada Example"))
simple("consent", "a person who agreed, and another", "protected", prompt("a photo of Ada Example and NAME"))
simple("consent", "a person who agreed, with syntax", "protected", prompt("(Ada Example:1.2), NAME"))

# -- requests that are none


@attempt("malformed", "nodes that are no objects", "refused")
def _no_objects(text: str) -> Any:
    return {"1": None, "2": [text]}


@attempt("malformed", "a class type that is no text", "refused")
def _no_text(text: str) -> Any:
    return {"1": {"class_type": {"CLIPTextEncode": text}, "inputs": {}}}


@attempt("malformed", "a list instead of a graph", "refused")
def _list(text: str) -> Any:
    return [{"class_type": "CLIPTextEncode", "inputs": {"text": text}}]


@attempt("malformed", "a text instead of a graph", "refused")
def _text(text: str) -> Any:
    return text


@attempt("malformed", "no class type", "refused")
def _no_class(text: str) -> Any:
    return {"1": {"inputs": {"text": text}}}


simple("malformed", "a text that is a number", "refused or protected",
       lambda g, m, c, t: g.sink(g.encode(c, 5)))  # type: ignore[arg-type]
simple("malformed", "a text that is a list", "refused",
       lambda g, m, c, t: g.sink(g.encode(c, [t, t, t])))  # type: ignore[arg-type]


# -- judging


def seen_of(server: Server, status: str, answer: Any) -> tuple[str, str]:
    """What happened, in the words of the table, and the details."""
    report = server.get("/spy/report")
    rows, contexts = report["rows"], report["contexts"]
    bare = sum(number for kind, number in rows.items() if kind.startswith("bare"))
    bare_named = rows.get("bare+name", 0)
    wrong = [kind for kind in contexts if kind.startswith("bare") and not kind.endswith("@1")]
    detail = f"rows {rows} contexts {contexts}"
    if wrong:
        return "UNPROTECTED", detail
    if status != "ok":
        return ("refused" if not bare else "refused bare"), f"{answer} {detail}"
    if not bare:
        return "protected", detail
    if not bare_named and not contexts:
        return "agreed", detail
    return ("pushes away" if any(kind.startswith("bare") for kind in contexts) else "UNPROTECTED"), detail


def make_files(base: Path) -> None:
    """Embeddings that help an attacker, one that does not, and a LoRA of the small text encoder."""
    folder = base / "models" / "embeddings"
    ap = safetensors.torch.load_file(base.parent / "prefixes" / "a-sd1.safetensors")["emb_params"]
    generator = torch.Generator().manual_seed(8)
    rows = {"ap": ap, "mirror": -ap, "stretched": ap[:3] * 1.7, "nan": torch.full((1, WIDTH_L), float("nan")),
            "person": torch.randn(3, WIDTH_L, generator=generator), "secretperson": torch.randn(2, WIDTH_L)}
    for name, tensor in rows.items():
        safetensors.torch.save_file({"emb_params": tensor.contiguous()}, folder / f"{name}.safetensors")
    key = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    lora = {f"{key}.lora_up.weight": torch.randn(64, 4, generator=generator),
            f"{key}.lora_down.weight": torch.randn(4, WIDTH_L, generator=generator), f"{key}.alpha": torch.tensor(4.0)}
    safetensors.torch.save_file(lora, base / "models" / "loras" / "tiny.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enforced")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    policy = write_policy(place, **POLICY)
    base = make_base(place)
    make_files(base)
    with serving(place, base, str(policy)) as running:
        running.get("/spy/report")
        yield running


def test_every_attempt(server: Server) -> None:
    """The table: attempt, expected, seen."""
    lines, wrong = [], []
    for number, row in enumerate(ATTEMPTS):
        graph = row.build(f"{NAME} in place {number}")
        sent = dict(row.sent)
        if sent.get("prompt_id"):
            sent["prompt_id"] = str(uuid.uuid4())
        status, answer = server.run(graph, **sent)
        seen, detail = seen_of(server, status, answer)
        right = seen in row.expected.split(" or ") and (not row.says or row.says in str(answer))
        lines.append(f"{row.part:20}{row.name:58}{row.expected:22}{seen:14}{'' if right else '<- WRONG'}")
        if not right:
            wrong.append(f"{row.part}: {row.name}: {row.expected}, seen {seen}: {detail}")
        elif status != "ok":
            lines.append(f"{'':20}  {str(answer)[:150]}")
    own = sum(row.part == "own" for row in ATTEMPTS)
    version = server.get("/system_stats")["system"].get("comfyui_version")
    table = "\n".join([f"{'of':20}{'attempt':58}{'expected':22}{'seen':14}", *lines,
                       f"ComfyUI {version}: {len(ATTEMPTS)} attempts, {own} own, {len(wrong)} wrong"])
    print(table)  # noqa: T201 - what this test is for; `pytest -s` or a failure shows it
    assert not wrong, "\n".join(wrong)
    assert own >= 25


def test_the_status_tells_what_happened(server: Server) -> None:
    status = server.get("/apl/status")
    assert status["ok"] and status["mode"] == "enforced" and all(status["hooks"].values()) and status["self_test"]["ok"]
    counters = status["counters"]
    for name in ("verified_rows", "inserted", "refused", "denied", "unsealed_refused", "negatives_plain",
                 "negatives_kept", "consented"):
        assert counters[name] > 0, f"{name}: {counters}"
    assert counters["unprotected_rows"] == 0
    text = str(status)
    assert NAME not in text and "Ada" not in text


def test_the_log_names_agreements_and_no_prompts(server: Server) -> None:
    ours = [line for line in server.text().splitlines() if "agreement-7" in line]
    assert ours and not any("Ada" in line or "photo" in line for line in ours)
    # The host logs a failed node's own message; none of ours quotes the prompt.
    refusals = re.findall(r"PolicyError: .*|PlacementError: .*", server.text())
    assert refusals and not any(NAME in line for line in refusals)


def test_enforced_equals_the_anonymize_node_wired_by_hand(server: Server) -> None:
    """With the node in the graph too, the latents are the same ones: the prefix goes in once."""
    shutil.copy(server.log.parent / "prefixes" / "a-sd1.safetensors",
                server.log.parent / "base" / "models" / "anonymization_prompts" / "ap.safetensors")
    found = []
    for node in (False, True):
        g = Graph()
        model, clip = g.checkpoint()
        on = clip
        if node:
            on = g.add("APL_Anonymize", clip=clip, enabled=True, overflow="chunk", anonymization_prompt=g.add(
                "APL_LoadAnonymizationPrompt", prompt_name="ap", level=0))
        g.sample(model, g.encode(on, f"(a photo:1.3) of {NAME}, " + "in a garden, " * 30), g.encode(clip, "bad"))
        status, outputs = server.run(g)
        assert status == "ok", outputs
        found.append(next(iter(outputs.values()))["values"][0])
    assert found[0] == found[1]
    report = server.get("/spy/report")
    assert not any(kind.startswith("bare") for kind in report["contexts"] if not kind.endswith("@1"))


@pytest.mark.slow
def test_many_clients_at_once(server: Server) -> None:
    """200 mixed requests of 8 clients: all answered, all with the prefix, memory flat after the first quarter."""
    server.get("/spy/report")
    kinds: list[Callable[[Graph, list, list, str], Graph]] = [
        lambda g, m, c, t: g.sink(g.encode(c, t)),
        lambda g, m, c, t: g.sink(g.encode(c, f"({t}:1.3) " + "garden, " * 90)),
        lambda g, m, c, t: g.sample(m, g.encode(c, t), g.encode(c, f"bad {t[-8:]}"), cfg=0.5),
        lambda g, m, c, t: g.sink(g.encode(g.add("CLIPSetLastLayer", clip=c, stop_at_clip_layer=-2), t)),
    ]
    lost: list[str] = []
    memory: list[float] = []
    done = threading.Semaphore(0)

    def client(number: int) -> None:
        for at in range(25):
            g = Graph()
            kinds[(number + at) % len(kinds)](g, *g.checkpoint(), f"{NAME} client {number} request {at}")
            try:
                status, answer = server.run(g)
            except Exception as error:  # noqa: BLE001, RUF100 - any of them is a lost request
                status, answer = "lost", error
            if status != "ok":
                lost.append(f"{number}.{at}: {status} {answer}")
            done.release()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for count in range(200):
        assert done.acquire(timeout=600)
        if count >= 50 and count % 10 == 0:
            memory.append(server.memory())
    for thread in threads:
        thread.join()
    report = server.get("/spy/report")
    print(f"200 requests in {time.monotonic() - began:.0f} s; {report['rows']}; "  # noqa: T201
          f"MB {memory[0]:.0f} to {memory[-1]:.0f}")
    assert not lost, lost
    assert not any(kind.startswith("bare") for kind in report["rows"]), report
    assert report["rows"]["prefix+name"] >= 200
    # What the host caches of 150 results is counted in: a few MB, where a leak of a CLIP a request would be GBs.
    assert memory[-1] - memory[0] < 64, memory


@pytest.mark.parametrize("hook", ["process_tokens"])
def test_a_hook_undone_while_serving_stops_the_server(server: Server, hook: str) -> None:
    """Last in this file: the server is gone afterwards, with the exit code for a policy that cannot be kept."""
    g = Graph()
    g.add("TestOverwrites", hook=hook)
    code, _ = server.queue(g)
    assert code == 200
    assert server.ended(30) == 78
    assert "SDClipModel.process_tokens was replaced while the server was running" in server.text()


# -- starting


OVERWRITER = """
import comfy.{module} as module
owner = module{of}
original = owner.{name}
def {name}(*args, **kwargs):
    return original(*args, **kwargs)
owner.{name} = {name}
NODE_CLASS_MAPPINGS = {{}}
"""


@pytest.mark.parametrize(("policy", "says"), [
    ("", "set but empty"), ("MISSING", "cannot be read"), ("HASH", "is not the file that the policy names"),
    ("SUFFIX", 'placement "prefix" only'),
])
def test_it_does_not_start_with_a_policy_that_cannot_be_kept(tmp_path: Path, policy: str, says: str) -> None:
    value = policy
    if policy == "MISSING":
        value = str(tmp_path / "absent.json")
    elif policy:
        path = write_policy(tmp_path)
        prefix = tmp_path / "prefixes" / "a-sd1.safetensors"
        if policy == "HASH":
            from apl_core.prefix import load_prefix, save_prefix

            save_prefix(load_prefix(prefix), prefix)
            prefix.write_bytes(prefix.read_bytes().replace(b"test sd1", b"Test sd1"))
        else:
            import hashlib
            import json

            from apl_core.prefix import load_prefix, save_prefix

            old = load_prefix(prefix)
            save_prefix(type(old)("sd1", old.tensors, old.meta.with_fields(placement="suffix")), prefix)
            data = json.loads(path.read_text("utf-8"))
            data["embeddings"]["sd1"]["sha256"] = hashlib.sha256(prefix.read_bytes()).hexdigest()
            path.write_text(json.dumps(data), "utf-8")
        value = str(path)
    (tmp_path / "prefixes").mkdir(exist_ok=True)
    server = Server(tmp_path, make_base(tmp_path), value, ["--quick-test-for-ci"])
    try:
        assert server.ended() == 78, server.text()[-3000:]
        assert says in server.text(), server.text()[-3000:]
    finally:
        server.stop()


def test_another_pack_on_a_hook_keeps_the_server_from_starting(tmp_path: Path) -> None:
    """Loaded before or after this pack, whichever order the folder has."""
    pack = tmp_path / "overwriter"
    pack.mkdir()
    (pack / "__init__.py").write_text(OVERWRITER.format(module="sampler_helpers", of="", name="convert_cond"), "utf-8")
    policy = write_policy(tmp_path)
    server = Server(tmp_path, make_base(tmp_path, [pack]), str(policy))
    try:
        assert server.ended() == 78, server.text()[-3000:]
        assert "sampler_helpers.convert_cond was replaced" in server.text()
    finally:
        server.stop()


def test_m_is_what_the_policy_pins() -> None:
    """The figures of this file's comments hold: 65 words beside 10 rows."""
    assert M == 10
